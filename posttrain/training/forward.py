"""Log-probs of a micro-batch's trained tokens under a causal language model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from posttrain.errors import TrainingError
from posttrain.rollout.attention import attention_of
from posttrain.training.batch import MicroBatch, Packing, PaddedPacking, PaddingFreePacking, TrainRow
from posttrain.training.logprobs import ChunkedHead, HeadTask, Scoring, output_head
from posttrain.training.tree import TreePacking, enable_tree, unsupported

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Mean difference of log-probs, in nats, that rounding to float32 explains on any model."""


def prepare_model(model: Any) -> None:
    """Put a `ChunkedHead` in the place of a model's output head, and take trees where its attention can.

    Names and values of the state dict stay as they are, tied weights stay tied, and so does what the model
    computes. Does nothing the second time.

    Args:
        model: `PreTrainedModel` or `PeftModel`, not yet wrapped by a launcher.

    Raises:
        TrainingError: the output head is not a linear layer, or an adapter is attached to it.
    """
    output_head(model)
    base = _base(model)
    head = base.get_output_embeddings()
    if type(head) is torch.nn.Linear:
        base.set_output_embeddings(ChunkedHead(head))
    for name, module in list(head.named_modules()):  # what peft's modules_to_save has put there
        if name and type(module) is torch.nn.Linear:
            head.set_submodule(name, ChunkedHead(module))
    if not _heads(base):
        raise TrainingError(
            f"the output head of {type(base).__name__} is a {type(head).__name__}, not a linear layer"
        )
    if unsupported(base) is None:
        enable_tree(base)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _heads(model: Any) -> list[ChunkedHead]:
    return [module for module in model.modules() if isinstance(module, ChunkedHead)]


def choose_packing(model: Any) -> Packing:
    """The best packing a model takes; a line in the log says why when that is not the tree.

    Args:
        model: `PreTrainedModel` or `PeftModel` after `prepare_model`.
    """
    base = _base(model)
    reason = unsupported(base)
    if reason is None:
        return TreePacking()
    packing: Packing = PaddedPacking()
    if (attention_of(base) or "").startswith("flash_attention"):
        packing = PaddingFreePacking()
    _warn(base, packing, reason)
    return packing


def _warn(model: Any, packing: Packing, reason: str) -> None:
    name = type(model).__name__
    logger.warning("%s is trained on %s rows, not on the rollout tree: %s", name, packing.name, reason)


def policy_logprobs(
    wrapped: Any, model: Any, micro: MicroBatch, *, temperature: float, train_entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [N] of the trained tokens at the sampling temperature, and entropies [N].

    Args:
        wrapped: what the launcher made of `model` (DDP, FSDP, DeepSpeed); its forward is the one called.
        model: the policy itself, after `prepare_model`.
        micro: the micro-batch; without a trained token it still runs, so that collectives match.
        temperature: of the distribution.
        train_entropy: whether the entropies have a gradient; costs time in the backward pass.
    """
    settings = output_head(model)
    scoring = Scoring(
        micro.places,
        micro.place_targets,
        temperature,
        settings.softcap,
        settings.scale,
        settings.reserved,
        train_entropy,
    )
    scores = head_outputs(wrapped, model, micro.inputs, scoring)
    logprobs, entropy = scores.index_select(0, micro.prediction).unbind(-1)
    return logprobs, entropy if train_entropy else entropy.detach()


def head_outputs(wrapped: Any, model: Any, inputs: dict[str, Any], task: HeadTask) -> torch.Tensor:
    """What the head of `model`, after `prepare_model`, gives for a task: [U, any].

    As the head gave it: some models change what comes out of it. `wrapped` is what the launcher made of the
    model.
    """
    caught: list[torch.Tensor] = []
    heads = _heads(model)
    # Hooks come last, so that the output caught is the one that a launcher's own hooks have returned.
    hooks = [head.register_forward_hook(lambda module, args, output: caught.append(output)) for head in heads]
    for head in heads:
        head.task = task
    try:
        output = wrapped(**inputs, use_cache=False)
    finally:
        for head, hook in zip(heads, hooks, strict=True):
            head.task = None
            hook.remove()
    return _Tied.apply(caught[-1], output.logits)[0]


class _Tied(torch.autograd.Function):
    """The first tensor, with the second in the graph behind it: its gradient is zero.

    FSDP and DeepSpeed prepare the backward pass when the gradient of the model's output arrives.
    """

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        ctx.shape = output.shape
        return scores.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient, gradient.new_zeros(ctx.shape)


@torch.no_grad()
def verify_packing(wrapped: Any, model: Any, packing: Packing, device: torch.device) -> Packing:
    """Check what `policy_logprobs` relies on, on a few sequences made up for it: once per stage is enough.

    The log-probs of padded rows must be those of the model's own logits, and the packing's those of padded
    rows. All ranks call it together.

    Returns:
        The packing, or padded rows, with a line in the log, when this model gives other log-probs with it.

    Raises:
        TrainingError: the model does something between hidden states and logits that is not known here.
    """
    base = _base(model)
    config = base.config.get_text_config()
    rows = _probe(config.vocab_size, output_head(model).reserved)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        padded = PaddedPacking().collate(rows, device)
        expected, rounding = _check_head(wrapped, model, padded)
        if packing.name == PaddedPacking.name:
            return packing
        micro = packing.collate(rows, device)
        actual, _ = policy_logprobs(wrapped, model, micro, temperature=1.0)
    finally:
        for module in training:
            module.training = True
    difference = float((actual - expected).abs().mean())
    tree = micro.inputs.get("tree")
    if not difference <= rounding:
        reason = f"its log-probs there differ by {difference:.2g} nats from those of padded rows"
    elif tree is not None and _has_windows(config) and tree.windows == {None}:
        reason = "it does not tell the attention function its sliding windows"
    else:
        return packing
    fallback = PaddedPacking()
    _warn(base, fallback, reason)
    return fallback


def _probe(vocab_size: int, reserved: slice | None) -> list[TrainRow]:
    """Two trees of made-up sequences of tokens that are not reserved, one of them with forks of forks."""
    used = np.delete(np.arange(vocab_size), reserved or [])
    tokens = used[np.random.default_rng(0).integers(len(used), size=(6, 24))].tolist()
    stem = tokens[0]
    sequences = [stem, stem[:8] + tokens[1], stem[:8] + tokens[1][:5] + tokens[2][:9], tokens[3], stem[:16]]
    sequences += [stem[:16] + tokens[4][:7], tokens[3][:4] + tokens[5]]
    return [TrainRow(tuple(ids), np.arange(1, len(ids))) for ids in sequences]


def _check_head(wrapped: Any, model: Any, padded: MicroBatch) -> tuple[torch.Tensor, float]:
    """Log-probs of padded rows, checked against the model's own logits, and the difference rounding may make.

    Raises:
        TrainingError: they differ.
    """
    settings = output_head(model)
    scoring = Scoring(
        padded.places,
        padded.place_targets,
        softcap=settings.softcap,
        scale=settings.scale,
        reserved=settings.reserved,
    )
    ours = head_outputs(wrapped, model, padded.inputs, scoring)[:, 0]
    logits = wrapped(**padded.inputs, use_cache=False).logits.flatten(0, 1)[padded.places].float()
    largest = float(logits.abs().max())
    if settings.reserved is not None:
        logits[:, settings.reserved] = -torch.inf
    theirs = torch.log_softmax(logits, -1).gather(1, padded.place_targets[:, None])[:, 0]
    assert scoring.dtype is not None
    rounding = max(TOLERANCE, 6 * torch.finfo(scoring.dtype).eps)
    difference = float((ours - theirs).abs().mean())
    if not difference <= rounding * max(1.0, largest):
        raise TrainingError(
            f"the output head of {type(_base(model)).__name__} is not a linear layer with the scale and cap "
            f"of its config: log-probs differ by {difference:.3f} nats"
        )
    return ours.index_select(0, padded.prediction), rounding


def _has_windows(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) is not None and (
        kinds is None or "sliding_attention" in kinds
    )


class Reference:
    """The policy that the KL term pulls towards: the model as it was when the stage began.

    A LoRA policy is its own reference with the adapter switched off, or, when the stage started from a
    trained adapter, with the frozen copy of it named "reference"; a full policy needs a frozen copy.
    """

    ADAPTER = "reference"

    def __init__(self, frozen: Any | None = None):
        self.frozen = frozen
        if frozen is not None:
            prepare_model(frozen)

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
