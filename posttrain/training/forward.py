"""Log-probs of a micro-batch's trained tokens under a causal language model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from posttrain.errors import TrainingError
from posttrain.training.batch import MicroBatch
from posttrain.training.logprobs import chunked_logprobs, output_head

HEAD_TOLERANCE = 1e-2
"""Relative to the size of the logits; half precision rounds at 4e-3."""


def _decoder(model: Any) -> torch.nn.Module:
    """The part of a causal language model below its output head."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal.base_model


def last_hidden(wrapped: Any, model: Any, micro: MicroBatch) -> torch.Tensor:
    """Hidden states after the final norm that predict the trained tokens: [N, H].

    `wrapped` is what the launcher made of `model` (DDP, FSDP, DeepSpeed): its forward must be the one that is
    called, so the states are caught on the way by a hook, and only the last position's logits are computed.
    """
    caught: list[torch.Tensor] = []
    hook = _decoder(model).register_forward_hook(
        lambda module, args, output: caught.append(output.last_hidden_state)
    )
    try:
        wrapped(
            input_ids=micro.input_ids, attention_mask=micro.attention_mask, use_cache=False, logits_to_keep=1
        )
    finally:
        hook.remove()
    return caught[-1][micro.row, micro.position]


def policy_logprobs(
    wrapped: Any, model: Any, micro: MicroBatch, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [N] of the trained tokens at the sampling temperature, and entropies [N]."""
    hidden = last_hidden(wrapped, model, micro)
    head = output_head(model)
    return chunked_logprobs(
        hidden,
        head.weight,
        micro.targets,
        temperature=temperature,
        bias=head.bias,
        softcap=head.softcap,
        scale=head.scale,
    )


@torch.no_grad()
def check_output_head(model: Any, micro: MicroBatch) -> None:
    """Compare our logits at one position with the model's own.

    Raises:
        TrainingError: the model does something between hidden states and logits that is not known here.
    """
    head = output_head(model)
    hidden = last_hidden(model, model, micro)[:1]
    row, position = int(micro.row[0]), int(micro.position[0])
    logits = model(input_ids=micro.input_ids, attention_mask=micro.attention_mask, use_cache=False).logits
    theirs = logits[row, position].float()
    ours = torch.nn.functional.linear(hidden, head.weight, head.bias)[0].float() * head.scale
    if head.softcap is not None:
        ours = head.softcap * torch.tanh(ours / head.softcap)
    difference = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0)
    if difference > HEAD_TOLERANCE:
        raise TrainingError(
            f"the output head of {type(model).__name__} is not a plain linear layer with the scale and cap "
            f"of its config: logits differ by {float(difference):.3f} of their size"
        )


class Reference:
    """The policy that the KL term pulls towards: the model as it was when the stage began.

    A LoRA policy is its own reference with the adapter switched off, or, when the stage started from a
    trained adapter, with the frozen copy of it named "reference"; a full policy needs a frozen copy.
    """

    ADAPTER = "reference"

    def __init__(self, frozen: Any | None = None):
        self.frozen = frozen

    def logprobs(self, wrapped: Any, model: Any, micro: MicroBatch, *, temperature: float) -> torch.Tensor:
        """Log-probs [N] of the trained tokens under the reference; no gradient."""
        with torch.no_grad():
            if self.frozen is not None:
                return policy_logprobs(self.frozen, self.frozen, micro, temperature=temperature)[0]
            with self._adapter(model):
                return policy_logprobs(wrapped, model, micro, temperature=temperature)[0]

    @contextmanager
    def _adapter(self, model: Any) -> Iterator[None]:
        if self.ADAPTER not in model.peft_config:
            with model.disable_adapter():
                yield
            return
        trained = model.active_adapter
        model.set_adapter(self.ADAPTER, inference_mode=True)
        try:
            yield
        finally:
            model.set_adapter(trained)
