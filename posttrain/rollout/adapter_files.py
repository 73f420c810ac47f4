"""A LoRA adapter that is sent to an engine as it is, without the base weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from posttrain.rollout.weight_files import checksum, publish
from posttrain.rollout.weights import whole

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The largest ranks that vLLM can be started for."""


def served_rank(rank: int | None) -> int | None:
    """What `--max-lora-rank` has to be for adapters of this rank; None where vLLM cannot serve them."""
    return None if rank is None else min((limit for limit in SERVED_RANKS if limit >= rank), default=None)


def why_merged(model: PreTrainedModel | PeftModel, max_rank: int | None) -> str | None:
    """Why vLLM could not apply the adapter of `model` to the base it serves; None: it can.

    `max_rank` is the largest rank it was started for; None: it takes no adapters.
    """
    if not isinstance(model, PeftModel):
        return "the model has no adapter"
    if max_rank is None:
        return "the replicas take no adapters of this rank"
    if len(model.active_adapters) != 1:
        return "several adapters are active"
    config = model.peft_config[model.active_adapters[0]]
    if not isinstance(config, LoraConfig):
        return f"the adapter is of type {config.peft_type}"
    refused = {
        "use_dora": config.use_dora,
        "modules_to_save": config.modules_to_save,
        "lora_bias": config.lora_bias or config.bias != "none",
        "trainable_token_indices": config.trainable_token_indices,
        "target_parameters": config.target_parameters,
        "layer_replication": config.layer_replication,
        "alora_invocation_tokens": config.alora_invocation_tokens,
        "init_lora_weights": config.init_lora_weights not in (True, False, "gaussian", "orthogonal"),
    }
    for name, given in refused.items():
        if given:
            return f"vLLM serves no adapter with {name}"
    if max(config.r, *config.rank_pattern.values(), 0) > max_rank:
        return f"its rank is above {max_rank}"
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, LoraLayer) and (
            isinstance(module.get_base_layer(), nn.Embedding) or module is head
        ):
            return "it adapts the embeddings or the head"
    return None


def adapter_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """The active adapter's weights under their names in the model, put together where they are split.

    Every process has to call this.
    """
    (name,) = model.active_adapters
    state = model.state_dict(keep_vars=True)
    return {key: whole(weight) for key, weight in state.items() if ".lora_" in key and name in key.split(".")}


def write_adapter(folder: Path, model: PeftModel, weights: dict[str, torch.Tensor]) -> str:
    """Write the active adapter to the new `folder`, in peft's format. Returns the files' checksum."""
    (name,) = model.active_adapters
    beside = folder.with_name(f".{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(
        str(beside), state_dict=weights, selected_adapters=[name], save_embedding_layers=False
    )
    if name != "default":  # peft then writes to a folder of that name
        inner = beside.with_name(f"{beside.name}.adapter")
        (beside / name).rename(inner)
        shutil.rmtree(beside)
        inner.rename(beside)
    publish(beside, folder)
    return checksum(folder)
