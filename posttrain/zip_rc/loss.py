"""The loss of a head that forecasts: cross-entropy on the slice, and KL that keeps the policy where it was.

    L = mean CE(z[slice], cell) + weight * mean KL(reference || policy over the tokens outside the slice)

The first touches the slice's logits alone, the second all others: they meet in the body only. Shapes: N
positions, H hidden size, V vocabulary, C cells.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from posttrain.training.logprobs import EXCLUDED, ChunkLogits, OutputHead, chunk_tokens, factor_dtype


@dataclass(frozen=True)
class States:
    """Last hidden states [N, H] of a frozen model, and the head that they go through."""

    hidden: torch.Tensor
    head: OutputHead


def slice_logits(hidden: torch.Tensor, head: OutputHead) -> torch.Tensor:
    """Logits [N, C] of the reserved slice, in float32 or better whatever the model computes in."""
    assert head.reserved is not None
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    bias = None if head.bias is None else head.bias[head.reserved].to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden.to(dtype), head.weight[head.reserved].to(dtype), bias) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def chunked_kl(
    hidden: torch.Tensor,
    head: OutputHead,
    reference: States,
    *,
    top: int | None = None,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """KL(reference || policy) [N] of next-token distributions over the unreserved tokens, in nats.

    Differentiable in `hidden` and the head's parameters. The logits of one chunk of positions exist at a
    time.

    Args:
        hidden: last hidden states [N, H] of the policy.
        head: the policy's.
        reference: the frozen model at the same positions; its vocabulary has the same size.
        top: keep of the reference's distribution this many likeliest tokens and renormalise it, as the
            official code does with 32; then a policy equal to the reference has KL -ln(their mass) and a
            gradient that sharpens it. None is the whole distribution: 0, and no gradient, for equal models.
        chunk_size: positions whose logits exist together; None takes as many as fit into a fixed memory.
    """
    dtype = factor_dtype(hidden, head.weight)
    if chunk_size is None:
        chunk_size = chunk_tokens(head.weight.shape[0], torch.promote_types(dtype, torch.float32).itemsize)
    logits = ChunkLogits(dtype, head.scale, head.softcap, reserved=head.reserved)
    reference = replace(reference, head=replace(reference.head, weight=reference.head.weight.to(dtype)))
    with torch.autocast(hidden.device.type, enabled=False):
        return _ChunkedKl.apply(hidden, head.weight, head.bias, reference, logits, top, chunk_size)


class _ChunkedKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        reference: States,
        logits: ChunkLogits,
        top: int | None,
        chunk_size: int,
    ) -> torch.Tensor:
        def reference_logprobs(rows: slice) -> torch.Tensor:
            head = reference.head
            z, _ = logits.forward(reference.hidden[rows], head.weight, head.bias)
            if top is not None and top < z.shape[1]:
                least = z.topk(top, dim=1).values[:, -1:]
                z = z.masked_fill(z < least, EXCLUDED)
            return z.log_softmax(1)

        cast_weight = weight.to(logits.dtype)
        kl = hidden.new_empty(len(hidden), dtype=torch.promote_types(logits.dtype, torch.float32))
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            z, _ = logits.forward(hidden[rows], cast_weight, bias)
            expected = reference_logprobs(rows)
            kl[rows] = torch.linalg.vecdot(expected.exp(), expected - z.log_softmax(1))
        ctx.save_for_backward(hidden, weight, bias)
        ctx.logits, ctx.chunk_size, ctx.reference_logprobs = logits, chunk_size, reference_logprobs
        return kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_kl: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight, bias = ctx.saved_tensors

        def gradient(rows: slice, z: torch.Tensor) -> torch.Tensor:
            return (z.softmax(1) - ctx.reference_logprobs(rows).exp()) * grad_kl[rows, None]

        needed = ctx.needs_input_grad[:3]
        gradients = ctx.logits.parameter_gradients(hidden, weight, bias, needed, ctx.chunk_size, gradient)
        return (*gradients, None, None, None, None)
