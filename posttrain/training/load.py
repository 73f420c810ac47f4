"""The policy as it is trained: precision, adapters, reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.integrations import unset_hf_deepspeed_config
from transformers.utils import logging

from posttrain.errors import DataError
from posttrain.recipe.schema import LoraConfig, ModelConfig
from posttrain.rollout.build import load_model
from posttrain.training.forward import Reference


def compute_dtype(model: ModelConfig) -> torch.dtype:
    """The type a model computes in: the recipe's, or the checkpoint's own."""
    if model.dtype != "auto":
        return getattr(torch, model.dtype)
    config = AutoConfig.from_pretrained(
        model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    return config.dtype or torch.float32


def load_policy(model: ModelConfig, *, reference_adapter: bool = False) -> Any:
    """The model to train: full weights, or a frozen base with a LoRA adapter.

    Weights that are trained are held in float32 whatever they compute in: an update of relative size 1e-6
    is lost when added to a bfloat16 number. A trained adapter (`model.adapter`) is continued; with
    `reference_adapter` a frozen copy of it is kept for the KL term.
    """
    if model.lora is None and model.adapter is None:
        return load_model(model.model_copy(update={"dtype": "float32"}))
    if model.adapter is not None:
        policy = load_model(model, trainable=True)
        if reference_adapter:
            policy.load_adapter(model.adapter, adapter_name=Reference.ADAPTER, is_trainable=False)
        return policy
    assert model.lora is not None
    return get_peft_model(load_model(model), _adapter(model.lora, "CAUSAL_LM"))


def load_scalar_model(model: ModelConfig, lora: LoraConfig | None) -> Any:
    """A model with one output for a sequence, to be trained as a reward model.

    A language model keeps its weights (those of its trained adapter merged) and gets a new head from torch's
    global random state; a sequence-classification checkpoint with one label keeps its head, too. With `lora`
    only an adapter and the head are trained. What is trained is held in float32, as in `load_policy`.

    Raises:
        DataError: `model.path` has no weights of such a model.
    """
    unset_hf_deepspeed_config()  # what a ZeRO-3 stage of the same run has left, see `load_model`
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # that the head is new, and the language model's is not used, is meant
    try:
        scalar = AutoModelForSequenceClassification.from_pretrained(
            Path(model.path).expanduser() if Path(model.path).expanduser().is_dir() else model.path,
            num_labels=1,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            dtype=model.dtype if lora is not None else "float32",
            attn_implementation=model.attn_implementation,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"model.path: {model.path!r} cannot be loaded as a sequence-classification model: {reason}"
        ) from error
    finally:
        logging.set_verbosity(level)
    if model.adapter is not None:
        policy = load_model(model).merge_and_unload()
        scalar.base_model.load_state_dict(policy.base_model.state_dict())
    if lora is None:
        return scalar
    adapted = get_peft_model(scalar, _adapter(lora, "SEQ_CLS"))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def _adapter(lora: LoraConfig, task: str) -> PeftLoraConfig:
    return PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type=task,
    )


def load_reference(model: ModelConfig, device: torch.device) -> Reference:
    """The reference of a stage that starts from `model`."""
    if model.lora is not None or model.adapter is not None:
        return Reference()
    frozen = load_model(model).to(device).eval()
    return Reference(frozen.requires_grad_(False))
