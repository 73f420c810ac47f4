"""The weights of a policy under the names its checkpoint has, adapters merged: what an engine is given."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel


def named_weights(model: PreTrainedModel | PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight and its checkpoint name, one after the other, with LoRA adapters merged.

    Names come from the state dict, not from `named_parameters`: of two tied weights that has both names,
    and vLLM keeps its old head when `lm_head.weight` is missing. Merged matrices are new tensors, made one
    at a time; nothing is ever added to the base weights in place, since in a 16-bit type taking it off
    again would not give back what was there. Unmerged weights are the model's own tensors.

    `model` is not wrapped by DDP; sharded models (FSDP, ZeRO-3) are not supported.
    """
    if not isinstance(model, PeftModel):
        yield from model.state_dict().items()
        return
    base = model.get_base_model()
    modules = dict(base.named_modules())
    active = set(model.active_adapters)
    for name, weight in base.state_dict().items():
        path, _, leaf = name.rpartition(".")
        owner, _, part = path.rpartition(".")
        layer = modules.get(owner)
        if part == "base_layer" and isinstance(layer, LoraLayer):
            yield f"{owner}.{leaf}", _merged(layer, weight) if leaf == "weight" else weight
        elif (kept := _without_wrapper(name, active)) is not None:
            yield kept, weight


def _merged(layer: LoraLayer, weight: torch.Tensor) -> torch.Tensor:
    """Base weight plus the active adapters' updates, summed in float32 and rounded once."""
    waiting = [a for a in layer.active_adapters if a in layer.scaling and a not in layer.merged_adapters]
    if not waiting:
        return weight
    assert isinstance(layer, nn.Module)
    with torch.no_grad():
        merged = weight.float()
        for adapter in waiting:
            merged = merged + layer.get_delta_weight(adapter).float()
        return merged.to(weight.dtype)


def _without_wrapper(name: str, active: set[str]) -> str | None:
    """Checkpoint name of a weight that peft may have wrapped; None for adapters and replaced originals."""
    parts = name.split(".")
    if "original_module" in parts or any(part.startswith("lora_") for part in parts):
        return None
    if "modules_to_save" in parts:
        at = parts.index("modules_to_save")
        return ".".join(parts[:at] + parts[at + 2 :]) if parts[at + 1] in active else None
    return name
