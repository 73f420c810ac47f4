"""The policy as it is trained: precision, adapters, reference."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from transformers import AutoConfig

from posttrain.recipe.schema import ModelConfig
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
    return get_peft_model(
        load_model(model),
        PeftLoraConfig(
            r=model.lora.r,
            lora_alpha=model.lora.alpha,
            lora_dropout=model.lora.dropout,
            target_modules=model.lora.target_modules,
            task_type="CAUSAL_LM",
        ),
    )


def load_reference(model: ModelConfig, device: torch.device) -> Reference:
    """The reference of a stage that starts from `model`."""
    if model.lora is not None or model.adapter is not None:
        return Reference()
    frozen = load_model(model).to(device).eval()
    return Reference(frozen.requires_grad_(False))
