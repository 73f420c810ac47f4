"""A key-value cache for decoding many rows that finish at different times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

_ROOM = 64  # tokens; a layer grows by this or by a quarter, whichever is more


class GrowingLayer(DynamicLayer):
    """A full-attention layer that writes new tokens in place, into room made ahead.

    `DynamicLayer` copies the whole cache for every token and again whenever a row leaves. `keys` and
    `values` (B, heads, length, head size) are views of larger buffers here.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states (B, heads, new, head size); keys and values of the whole length."""
        length = self.get_seq_length()
        if length == 0:  # a prefill is copied once more, when its rows are repeated for the completions
            return super().update(key_states, value_states, *args, **options)
        end = length + key_states.shape[-2]
        if self._buffers is None or end > self._buffers[0].shape[-2]:
            self._move(torch.arange(len(self.keys), device=self.keys.device))
        assert self._buffers is not None
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, length:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row b becomes what row `beam_idx[b]` was. Rows that stay where they are cost nothing."""
        rows = len(beam_idx)
        if self._buffers is None or rows > len(self.keys):
            self._move(beam_idx)
            return
        moved = (beam_idx != torch.arange(rows, device=beam_idx.device)).nonzero().squeeze(-1)
        for states in (self.keys, self.values):
            states[moved] = states[beam_idx[moved]]
        self._buffers = self._buffers[0][:rows], self._buffers[1][:rows]
        self.keys, self.values = self.keys[:rows], self.values[:rows]

    def fork(self, rows: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Row b becomes the `lengths[b]` tokens from `starts[b]` on of what row `rows[b]` was.

        They end at the right edge; what is left of them is zero, and is for the attention mask to hide.
        """
        width = max(lengths)
        buffers = []
        for states in (self.keys, self.values):
            _, heads, _, size = states.shape
            buffer = states.new_zeros(len(rows), heads, _capacity(width), size)
            for target, source, start, length in zip(buffer, rows, starts, lengths, strict=True):
                target[:, width - length : width] = states[source, :, start : start + length]
            buffers.append(buffer)
        self._buffers = buffers[0], buffers[1]
        self.keys, self.values = (buffer[:, :, :width] for buffer in buffers)

    def _move(self, rows: torch.Tensor) -> None:
        """Copy the given rows into buffers with room."""
        length = self.get_seq_length()
        buffers = []
        for states in (self.keys, self.values):
            _, heads, _, size = states.shape
            buffer = states.new_empty(len(rows), heads, _capacity(length), size)
            buffer[:, :, :length] = states[rows]
            buffers.append(buffer)
        self._buffers = buffers[0], buffers[1]
        self.keys, self.values = (buffer[:, :, :length] for buffer in buffers)


def _capacity(length: int) -> int:
    return length + max(_ROOM, length // 4)


def decoding_cache(config: PretrainedConfig) -> DynamicCache:
    """An empty cache for a model. Layers of other kinds (sliding window, linear attention) are left alone."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def can_fork(cache: DynamicCache) -> bool:
    """Whether every layer still holds all it was given, so that a prefix can be taken out of it."""
    return all(isinstance(layer, GrowingLayer) for layer in cache.layers)
