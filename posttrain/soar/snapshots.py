"""The weights of teacher, baseline and students: copies in memory of the one model that they share.

What is copied is what training changes: with LoRA the adapter's tensors, so that a slot costs what an adapter
costs, and otherwise all weights and buffers. Nothing is loaded from disk between two students. Every restore
is verified by a checksum of the bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from posttrain.errors import TrainingError
from posttrain.training.forward import Reference

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**22
_MODULUS = 2**61 - 1


@dataclass(frozen=True)
class Snapshot:
    """Weights by name, on the CPU, and the checksum of their bits."""

    tensors: dict[str, torch.Tensor]
    checksum: int

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Snapshot:
        """A snapshot of tensors that nobody else writes to."""
        return cls(dict(tensors), checksum(tensors))


def checksum(tensors: Mapping[str, torch.Tensor]) -> int:
    """A number that depends on every bit, its place and the names: sums of words, plain and by position."""
    total = 0
    for name in sorted(tensors):
        digest = _digest(tensors[name])
        total = (total * 1_000_003 + _number(name) + digest) % _MODULUS
    return total


def _number(name: str) -> int:
    return int.from_bytes(name.encode(), "big") % _MODULUS


def _digest(tensor: torch.Tensor) -> int:
    words = tensor.detach().contiguous().reshape(-1).view(_WORDS[tensor.element_size()])
    total = 0
    for start in range(0, len(words), _CHUNK):
        chunk = words[start : start + _CHUNK].to(torch.int64)
        places = torch.arange(1, len(chunk) + 1, device=chunk.device)
        total = (total * 31 + int(chunk.sum()) + 7 * int((chunk * places).sum())) % _MODULUS
    return total


class SharedModel:
    """The one model in memory, whose weights are now the teacher's, now the baseline's or a student's."""

    def __init__(self, model: Any):
        """`model` is a PreTrainedModel, or a PeftModel whose adapter is trained."""
        self.model = model
        held: dict[str, torch.Tensor] = {}
        seen: set[int] = set()
        adapted = isinstance(model, PeftModel)
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if (name in trained or not adapted) and id(tensor) not in seen:  # tied weights are one tensor
                seen.add(id(tensor))
                held[name] = tensor
        self._held = held

    def capture(self) -> Snapshot:
        """A copy of the weights of now."""
        copies = {
            name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self._held.items()
        }
        return Snapshot(copies, self.checksum())

    def restore(self, snapshot: Snapshot) -> None:
        """Put a snapshot's weights in place, bit for bit.

        Raises:
            TrainingError: what is there afterwards is not what was captured.
        """
        with torch.no_grad():
            for name, tensor in self._held.items():
                tensor.copy_(snapshot.tensors[name])
        if self.checksum() != snapshot.checksum:
            raise TrainingError(
                "weights restored from memory are not those that were captured: their checksum differs"
            )

    def checksum(self) -> int:
        """Of the weights of now."""
        return checksum(self._held)


class References:
    """What the KL terms pull towards: the teacher to the base model, a student to where its run began.

    With LoRA the reference is a second adapter slot on the same base weights; otherwise it is a second model.
    """

    def __init__(self, model: Any, frozen: Any | None):
        """`frozen` is a model of its own, which is needed where `model` has no adapter."""
        self._frozen = frozen
        self._now: int | None = None
        if frozen is not None:
            self._reference = Reference(frozen)
            self._slot = SharedModel(frozen)
            return
        active = model.active_adapter
        model.add_adapter(Reference.ADAPTER, model.peft_config[active])
        model.set_adapter(active)
        self._adapter = {
            name.replace(f".{Reference.ADAPTER}.", f".{active}."): parameter.requires_grad_(False)
            for name, parameter in model.named_parameters()
            if f".{Reference.ADAPTER}." in name
        }
        self._reference = Reference()

    def at(self, snapshot: Snapshot) -> Reference:
        """The reference with a snapshot's weights."""
        if self._now != snapshot.checksum:
            if self._frozen is not None:
                self._slot.restore(snapshot)
            else:
                with torch.no_grad():
                    for name, parameter in self._adapter.items():
                        parameter.copy_(snapshot.tensors[name])
            self._now = snapshot.checksum
        return self._reference
