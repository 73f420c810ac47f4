"""The weights of a policy under the names its checkpoint has, adapters merged: what an engine is given.

The policy may be split over processes, by FSDP2 (every parameter is a DTensor) or by DeepSpeed ZeRO-3 (every
parameter is empty outside its forward pass). Its weights are put together one at a time; that is a collective
operation, so every process has to ask for them, and in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def named_weights(
    model: PreTrainedModel | PeftModel, *, merge: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight and its checkpoint name, one after the other, with LoRA adapters merged or left out.

    Names come from the state dict, not from `named_parameters`: of two tied weights that has both names,
    and vLLM keeps its old head when `lm_head.weight` is missing. Merged matrices are new tensors, made one
    at a time; nothing is ever added to the base weights in place, since in a 16-bit type taking it off
    again would not give back what was there. Unmerged weights are the model's own tensors, or whole copies
    of them where the model is split over processes.

    `model` is what the launcher has wrapped: the model below DDP or the DeepSpeed engine.
    """
    if not isinstance(model, PeftModel):
        for name, weight in model.state_dict(keep_vars=True).items():
            yield name, whole(weight)
        return
    base = model.get_base_model()
    modules = dict(base.named_modules())
    active = set(model.active_adapters)
    for name, weight in base.state_dict(keep_vars=True).items():
        path, _, leaf = name.rpartition(".")
        owner, _, part = path.rpartition(".")
        layer = modules.get(owner)
        if part == "base_layer" and isinstance(layer, LoraLayer):
            yield f"{owner}.{leaf}", _merged(layer, weight) if merge and leaf == "weight" else whole(weight)
        elif (kept := _without_wrapper(name, active)) is not None:
            yield kept, whole(weight)


def saved_weights(model: PreTrainedModel | PeftModel, *, keep: bool) -> dict[str, torch.Tensor]:
    """What `model.save_pretrained(folder, state_dict=…)` is to write, on the CPU.

    Of a LoRA policy that is the trained adapter. Tied weights are one tensor. `keep` is false on the
    processes that only take part; they get nothing.
    """
    names = {name for name, weight in model.named_parameters(remove_duplicate=False) if weight.requires_grad}
    wholes: dict[int, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        if isinstance(model, PeftModel) and name not in names:
            continue
        if id(weight) not in wholes:
            copy = whole(weight)
            wholes[id(weight)] = copy.cpu() if keep else copy.new_empty(0)
        if keep:
            weights[name] = wholes[id(weight)]
    return weights


def whole(weight: torch.Tensor) -> torch.Tensor:
    """The whole of a weight that may be split over processes, without its gradient history."""
    weight = weight if _is_zero3(weight) else weight.detach()
    if isinstance(weight, DTensor):
        # A shard that is offloaded to the CPU is gathered where the processes can talk to each other.
        return weight.to(weight.device_mesh.device_type).full_tensor()
    with _gathered([weight]):
        return weight.detach()


def _gathered(weights: list[Any]) -> AbstractContextManager[None]:
    """Within it, the weights that ZeRO-3 has split are whole; other weights stay as they are."""
    split = [weight for weight in weights if _is_zero3(weight)]
    if not split:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(split)


def _is_zero3(weight: Any) -> bool:
    return hasattr(weight, "ds_id")  # DeepSpeed's mark on a parameter it has taken over


def _merged(layer: LoraLayer, weight: torch.Tensor) -> torch.Tensor:
    """Base weight plus the active adapters' updates, summed in float32 and rounded once."""
    waiting = [a for a in layer.active_adapters if a in layer.scaling and a not in layer.merged_adapters]
    if not waiting:
        return whole(weight)
    assert isinstance(layer, nn.Module)
    with torch.no_grad(), _gathered(list(layer.parameters())):
        merged = (weight if _is_zero3(weight) else whole(weight)).float()
        for adapter in waiting:
            merged = merged + whole(layer.get_delta_weight(adapter)).float()
            if layer.use_dora.get(adapter):  # rows get the learned lengths (Liu et al., 2024, equation 5)
                lengths = whole(layer.lora_magnitude_vector[adapter].weight).float()
                merged = merged * (lengths / merged.norm(dim=1))[:, None]
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
