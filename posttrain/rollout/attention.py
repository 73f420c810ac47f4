"""Attention of one new token per row over a long cache, without repeating the cache for grouped queries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface


def attention_of(model: Any) -> str | None:
    """Name of a model's attention implementation."""
    # transformers offers a public setter (`set_attn_implementation`) and no public getter.
    return model.config.get_text_config()._attn_implementation


@contextmanager
def decode_attention(model: Any) -> Iterator[None]:
    """Give `model` an attention that is cheaper for one new token per row, and its own back afterwards.

    For implementations that take the masks of "sdpa"; others (eager, flash attention) are left alone.
    """
    base = attention_of(model)
    masks = AttentionMaskInterface()
    if base is None or masks.get(base) is not masks["sdpa"] or not model.is_backend_compatible():
        yield
        return
    name = f"{base}_decode"
    AttentionInterface.register(name, partial(grouped_attention, base))
    AttentionMaskInterface.register(name, masks["sdpa"])
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(base)


def grouped_attention(
    base: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What the implementation `base` computes, for `AttentionInterface`.

    Where there is a mask, transformers' "sdpa" copies every key and value once for each query head that
    uses it, at each token. The heads of a group are treated as so many query tokens of one head instead,
    which is the same sum as long as they see the same keys: when there is one new token per row.

    Args:
        query: (B, heads, T, D); key and value: (B, key heads, S, D).
        attention_mask: (B, 1, T, S), True where seen.

    Returns:
        (B, T, heads, D), and None for the attention weights.
    """
    rows, heads, tokens, size = query.shape
    same_keys = tokens == 1 and (attention_mask is None or attention_mask.shape[1] == 1)
    changed = options.get("softcap") is not None or options.get("position_bias") is not None
    if heads == key.shape[1] or not same_keys or changed:
        attend = AttentionInterface()[base]
        return attend(module, query, key, value, attention_mask, scaling=scaling, **options)
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], size)
    output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(rows, 1, heads, value.shape[-1]), None
