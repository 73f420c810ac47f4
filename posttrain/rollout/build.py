"""From a recipe's model and rollout sections to a tokenizer, a model and an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import unset_hf_deepspeed_config

from posttrain.errors import DataError
from posttrain.recipe.schema import ModelConfig, RolloutConfig
from posttrain.rollout.engine import RolloutEngine
from posttrain.zip_rc.grid import CONFIG_KEY, Grid, grid_of


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that is saved with a model.

    Raises:
        DataError: nothing at this path, or no tokenizer in it.
    """
    location = _location(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            location, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"model.path: no tokenizer can be loaded from {model.path!r}: {_first_line(error)}"
        ) from error
    # Without tokenizer files transformers makes an empty tokenizer of the model's class instead of failing.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise DataError(f"model.path: there is no tokenizer in {model.path!r}")
    return tokenizer


def load_model(model: ModelConfig, *, trainable: bool = False) -> PreTrainedModel | PeftModel:
    """The causal language model on the CPU, with its trained adapter if `model.adapter` names one.

    `trainable` is about that adapter: whether it goes on being trained or is only used.

    Raises:
        DataError: nothing at this path, or no causal language model or adapter in it.
    """
    location = _location(model)
    # A ZeRO-3 stage of the same run leaves its configuration behind, with which transformers would split
    # every model over the processes while it is loaded, the ones that are to generate by themselves too.
    unset_hf_deepspeed_config()
    try:
        base = AutoModelForCausalLM.from_pretrained(
            location,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            dtype=model.dtype,
            attn_implementation=model.attn_implementation,
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"model.path: {model.path!r} cannot be loaded as a causal language model: {_first_line(error)}"
        ) from error
    if model.adapter is None:
        return base
    try:
        return PeftModel.from_pretrained(base, model.adapter, is_trainable=trainable)
    except (OSError, ValueError) as error:
        raise DataError(f"model.adapter: {model.adapter!r} cannot be loaded: {_first_line(error)}") from error


def load_grid(model: ModelConfig) -> Grid:
    """The grid of a model's forecasts, from its configuration.

    Raises:
        DataError: nothing at this path, or a model without forecasts.
    """
    location = _location(model)
    try:
        config = AutoConfig.from_pretrained(
            location, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"model.path: {model.path!r} has no configuration that can be read: {_first_line(error)}"
        ) from error
    grid = grid_of(config)
    if grid is None:
        raise DataError(
            f"model.path: {model.path!r} foresees neither reward nor length: its config.json has no "
            f"{CONFIG_KEY}. Train it in a stage zip_rc."
        )
    return grid


def build_engine(
    rollout: RolloutConfig,
    model_config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model: PreTrainedModel | PeftModel | None = None,
    own_weights: bool = False,
    seed: int = 0,
) -> RolloutEngine:
    """The engine that `rollout.engine` names.

    `model` is the trainer's live model: the transformers engine samples from it where it is. Without one the
    engine loads `model_config.path` itself, and vLLM does so in any case, until the first `sync`. With
    `own_weights` it does so, too, and a `sync` copies: for a policy that is split over processes, or trained
    while the engine generates.
    """
    if rollout.engine != "transformers":
        engine = _vllm_engine(rollout, model_config, tokenizer, seed)
        # vLLM has loaded the base alone, and a replica that ran already anything.
        if model_config.adapter is not None or (rollout.engine == "vllm_server" and rollout.server.urls):
            engine.sync(model if model is not None else load_model(model_config))
        return engine
    from posttrain.rollout.transformers import TransformersEngine

    if model is None or own_weights:
        model = load_model(model_config).to(torch.accelerator.current_accelerator() or "cpu")
        if own_weights and isinstance(model, PeftModel):
            model = model.merge_and_unload()  # what a `sync` brings is merged
    return TransformersEngine(
        model,
        tokenizer,
        max_model_len=rollout.max_model_len,
        batch_size=rollout.batch_size,
        own_weights=own_weights,
    )


def _vllm_engine(
    rollout: RolloutConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> RolloutEngine:
    options: dict[str, Any] = {
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "dtype": model.dtype,
        "max_model_len": rollout.max_model_len,
        "batch_size": rollout.batch_size,
        "memory_fraction": rollout.memory_fraction,
        "kv_cache_gib": rollout.kv_cache_gib,
        "seed": seed,
    }
    if rollout.engine == "vllm":
        from posttrain.rollout.vllm import VllmEngine

        # On a CPU adapters are merged: vLLM 0.32 needs 1.7 times the CPU seconds to apply one at every token,
        # and a merge once per sync is cheap.
        rank = _adapter_rank(model) if torch.cuda.is_available() else None
        return VllmEngine(_location(model), tokenizer, lora_rank=rank, **options)
    from posttrain.rollout.vllm_server import VllmServerEngine

    rank = _adapter_rank(model)
    return VllmServerEngine(_location(model), tokenizer, server=rollout.server, lora_rank=rank, **options)


def _adapter_rank(model: ModelConfig) -> int | None:
    """Rank of the LoRA adapter that is trained or continued; None without one."""
    if model.adapter is None:
        return None if model.lora is None else model.lora.r
    try:
        return getattr(PeftConfig.from_pretrained(model.adapter), "r", None)
    except (OSError, ValueError) as error:
        raise DataError(f"model.adapter: {model.adapter!r} cannot be loaded: {_first_line(error)}") from error


def _location(model: ModelConfig) -> str:
    """The local folder or hub name; transformers itself cannot tell a missing folder from a name."""
    path = Path(model.path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise DataError(f"model.path: folder {model.path!r} has no config.json, so it is no model")
        return str(path)
    if path.is_file() or model.path.startswith(("/", ".", "~")) or model.path.count("/") > 1:
        raise DataError(f"model.path: there is no model folder {model.path!r}")
    return model.path


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
