"""Log-probabilities and entropies of given tokens without ever holding the logits of all of them.

Shapes: N tokens, H hidden size, V vocabulary. The plain computation keeps several [N, V] tensors for the
backward pass; here the logits of one chunk of tokens exist at a time, forward and backward, and only [N]
and [N, H] tensors are kept in between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from posttrain.errors import TrainingError
from posttrain.rollout.tokens import reserved_ids

CHUNK_BYTES = 128 * 2**20
"""Size of one chunk's logits in float32: 220 tokens of a vocabulary of 152k. Two to four tensors of this size
exist at the peak, which is small beside any model that has such a vocabulary."""

EXCLUDED = -1e4
"""Logit of a token that has no part in a distribution: its probability is exactly 0, and the products with it
stay finite."""


def chunk_tokens(vocab_size: int, element_bytes: int = 4, budget: int = CHUNK_BYTES) -> int:
    """Tokens whose logits fit into `budget` bytes, at least one."""
    return max(1, budget // (vocab_size * element_bytes))


@dataclass(frozen=True)
class OutputHead:
    """How a model turns hidden states into logits: `softcap·tanh(scale·(h Wᵀ + b) / softcap)`.

    Tokens from `reserved.start` to `reserved.stop` are forecasts, not text: they have no part in the softmax.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    reserved: slice | None = None


def output_head(model: Any) -> OutputHead:
    """The output head of a causal language model (`PreTrainedModel` or `PeftModel`).

    Logits are scaled by what the configuration calls `logit_scale` (Cohere), `lm_head_multiplier`
    (Falcon-H1), `output_multiplier` or, inverted, `logits_scaling` (Granite), and capped at
    `final_logit_softcapping` (Gemma).

    Raises:
        TrainingError: an adapter is attached to the head itself, whose product cannot be chunked.
    """
    head = model.get_output_embeddings()
    if hasattr(head, "base_layer"):
        raise TrainingError("the LoRA adapter targets the output head; leave it out of lora.target_modules")
    config = model.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier", "logits_scaling"):
        value = getattr(config, name, None)
        if value is not None:
            # HyperCLOVA X multiplies by its logits_scaling, everybody else divides by it.
            inverted = name == "logits_scaling" and config.model_type != "hyperclovax"
            scale = 1.0 / value if inverted else float(value)
            break
    softcap = getattr(config, "final_logit_softcapping", None)
    ids = reserved_ids(model.config)
    reserved = slice(ids[0], ids[-1] + 1) if ids else None
    return OutputHead(head.weight, getattr(head, "bias", None), softcap, scale, reserved)


class HeadTask(Protocol):
    """What a `ChunkedHead` is asked for during one forward pass, in place of logits.

    Attributes:
        places: [N] which of the hidden states, counted over batch and length.
        dtype: set by the head: the type that the model computes in, for who must know how it rounds.
    """

    places: torch.Tensor
    dtype: torch.dtype | None

    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Whatever is asked for, [N, any], from hidden states [N, H] and the head's parameters."""


@dataclass
class Scoring:
    """Log-probs of the tokens that follow, and entropies: [N, 2].

    Attributes:
        places: see `HeadTask`, as for `dtype`.
        targets: [N] the tokens they predict.
        temperature: see `chunked_logprobs`, as for `softcap`, `scale` and `reserved`.
        train_entropy: whether the entropies get a gradient.
    """

    places: torch.Tensor
    targets: torch.Tensor
    temperature: float = 1.0
    softcap: float | None = None
    scale: float = 1.0
    reserved: slice | None = None
    train_entropy: bool = False
    dtype: torch.dtype | None = None

    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `HeadTask`."""
        logprobs, entropy = chunked_logprobs(
            hidden,
            weight,
            self.targets,
            temperature=self.temperature,
            bias=bias,
            softcap=self.softcap,
            scale=self.scale,
            reserved=self.reserved,
        )
        return torch.stack([logprobs, entropy if self.train_entropy else entropy.detach()], -1)


class ChunkedHead(torch.nn.Linear):
    """An output head that can give something else than logits: log-probs, or what another task asks for.

    It holds the parameters of the layer it replaces. Being called inside the model's forward, it finds its
    weight whole where a launcher shards it (FSDP, ZeRO-3): their hooks gather it around this module's forward
    and backward. Without a `task` it is the linear layer it replaces.
    """

    def __init__(self, head: torch.nn.Linear):
        has_bias = head.bias is not None
        super().__init__(head.in_features, head.out_features, bias=has_bias, device="meta")
        self.weight = head.weight
        if has_bias:
            self.bias = head.bias
        self.train(head.training)
        self.task: HeadTask | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of hidden states [..., H]; with a `task`, what that gives, [1, N, any]."""
        task = self.task
        if task is None:
            return super().forward(hidden)
        device_type = hidden.device.type
        autocast = torch.is_autocast_enabled(device_type)
        task.dtype = torch.get_autocast_dtype(device_type) if autocast else hidden.dtype
        # One tensor, because models go on computing with what their head returns; not a view, which FSDP
        # warns of.
        answer = task(hidden.flatten(0, -2).index_select(0, task.places), self.weight, self.bias)
        return torch.stack([answer])


def chunked_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    reserved: slice | None = None,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of `targets` and entropies of the next-token distributions, in nats.

    The distribution is `softmax(logits / temperature)` with the logits of `OutputHead`. Both outputs are
    differentiable in `hidden`, `weight` and `bias`; the gradient of an output that is not used, or of an
    input that needs none, costs nothing.

    Args:
        hidden: last hidden states [N, H], after the final norm.
        weight: output embedding [V, H].
        targets: token ids [N].
        temperature: the sampling temperature; above 0.
        bias: [V], of heads that have one.
        softcap: final logit soft-capping.
        scale: factor of the logits before the cap.
        reserved: tokens that have no part in the distribution.
        chunk_size: tokens whose logits exist together; None takes as many as `CHUNK_BYTES` holds.

    Returns:
        (logprobs, entropy), each [N] float32 (float64 for float64 inputs). On CUDA the factors of a product
        have the type of the inputs, or autocast's; the logits and the sums of gradients are float32 anywhere.
    """
    dtype = factor_dtype(hidden, weight)
    if chunk_size is None:
        chunk_size = chunk_tokens(weight.shape[0], torch.promote_types(dtype, torch.float32).itemsize)
    logits = ChunkLogits(dtype, scale, softcap, 1.0 / temperature, reserved)
    with torch.autocast(hidden.device.type, enabled=False):
        return _ChunkedLogprobs.apply(hidden, weight, bias, targets, logits, chunk_size)


def factor_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """Type of the factors of products: half precision only where the product can come out in float32."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return dtype if device_type == "cuda" else torch.promote_types(dtype, torch.float32)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` in float32 or better, never rounded to half precision on the way out."""
    if a.dtype.itemsize < 4:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def _accumulate_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`total += a @ b` for a float32 (or float64) `total`.

    Rounding every chunk's product to bfloat16 before the sum would bias the gradient of the head.
    """
    if a.dtype.itemsize < 4:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a, b)


@dataclass(frozen=True)
class ChunkLogits:
    """Tempered logits of a chunk and their gradient with respect to the head's raw product.

    Attributes:
        dtype: of the factors of products, see `factor_dtype`.
        scale: see `OutputHead`, as for `softcap` and `reserved`.
        inverse_temperature: of the distribution.
    """

    dtype: torch.dtype
    scale: float = 1.0
    softcap: float | None = None
    inverse_temperature: float = 1.0
    reserved: slice | None = None

    def forward(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits [n, V] and, with a soft cap, tanh [n, V] for the backward pass; `weight` in `self.dtype`."""
        z, tanh = _product(hidden.to(self.dtype), weight.t()), None
        if bias is not None:
            z.add_(bias)
        if self.softcap is not None:
            tanh = z.mul_(self.scale / self.softcap).tanh_()
            z = tanh * (self.softcap * self.inverse_temperature)
        elif (factor := self.scale * self.inverse_temperature) != 1.0:
            z.mul_(factor)
        if self.reserved is not None:
            z[:, self.reserved] = EXCLUDED
        return z, tanh

    def backward_(self, grad: torch.Tensor, tanh: torch.Tensor | None) -> torch.Tensor:
        """Turn the gradient of the tempered logits into that of the raw product, in place.

        Reserved tokens have none in either: their probability is 0.
        """
        if tanh is not None:
            grad.mul_(tanh.square_().neg_().add_(1.0))
        if (factor := self.scale * self.inverse_temperature) != 1.0:
            grad.mul_(factor)
        return grad

    def parameter_gradients(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        needed: tuple[bool, ...],
        chunk_size: int,
        gradient: Callable[[slice, torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Gradients with respect to `hidden`, `weight` and `bias`, as far as `needed`, chunk by chunk.

        `gradient` gives that of the tempered logits [n, V] of some rows; it may overwrite the logits.
        """
        cast_weight = weight.to(self.dtype)
        sum_dtype = torch.promote_types(self.dtype, torch.float32)
        grad_hidden = torch.zeros_like(hidden) if needed[0] else None
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if needed[1] else None
        grad_bias = torch.zeros_like(bias, dtype=sum_dtype) if bias is not None and needed[2] else None
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            with torch.autocast(hidden.device.type, enabled=False):
                z, tanh = self.forward(hidden[rows], cast_weight, bias)
                dz = self.backward_(gradient(rows, z), tanh)
                if grad_bias is not None:
                    grad_bias += dz.sum(0)
                dz = dz.to(self.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = _product(dz, cast_weight)
                if grad_weight is not None:
                    _accumulate_product(grad_weight, dz.t(), hidden[rows].to(self.dtype))
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        logits: ChunkLogits,
        chunk_size: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # An entropy that is only logged then brings no gradient at all, instead of one of zeros.
        ctx.set_materialize_grads(False)
        out_dtype = torch.promote_types(logits.dtype, torch.float32)
        cast_weight = weight.to(logits.dtype)
        logprobs, entropy, log_norm = (hidden.new_empty(len(hidden), dtype=out_dtype) for _ in range(3))
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            z, _ = logits.forward(hidden[rows], cast_weight, bias)
            top = z.amax(1)
            z.sub_(top[:, None])
            target = z.gather(1, targets[rows, None]).squeeze(1)
            p = z.exp()
            norm = p.sum(1)
            log_sum = norm.log()
            logprobs[rows] = target - log_sum
            # H = log Σexp(z) - Σ p·z, with z ≤ 0 after the shift: small entropies keep their digits.
            entropy[rows] = log_sum - torch.linalg.vecdot(p, z) / norm
            log_norm[rows] = top + log_sum
        ctx.save_for_backward(hidden, weight, bias, targets, log_norm, entropy)
        ctx.logits, ctx.chunk_size = logits, chunk_size
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None
    ) -> tuple[Any, ...]:
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 6
        hidden, weight, bias, targets, log_norm, entropy = ctx.saved_tensors

        def gradient(rows: slice, z: torch.Tensor) -> torch.Tensor:
            return _logit_gradient_(
                z.sub_(log_norm[rows, None]),
                targets[rows],
                None if grad_logprobs is None else grad_logprobs[rows],
                None if grad_entropy is None else grad_entropy[rows],
                entropy[rows],
            )

        needed = ctx.needs_input_grad[:3]
        gradients = ctx.logits.parameter_gradients(hidden, weight, bias, needed, ctx.chunk_size, gradient)
        return (*gradients, None, None, None)


def _logit_gradient_(
    log_p: torch.Tensor,
    targets: torch.Tensor,
    grad_logprobs: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    entropy: torch.Tensor,
) -> torch.Tensor:
    """Gradient [n, V] with respect to the tempered logits, in the memory of `log_p` where that is possible.

    d log p(target) / dz_j = 1[j = target] - p_j  and  dH / dz_j = -p_j (log p_j + H).
    """
    if grad_entropy is None:
        assert grad_logprobs is not None, "one of the two gradients exists"
        dz = log_p.exp_().mul_(-grad_logprobs[:, None])
    else:
        factor = (log_p + entropy[:, None]).mul_(grad_entropy[:, None])
        if grad_logprobs is not None:
            factor.add_(grad_logprobs[:, None])
        dz = log_p.exp_().mul_(factor).neg_()
    if grad_logprobs is not None:
        dz.scatter_add_(1, targets[:, None], grad_logprobs[:, None])
    return dz
