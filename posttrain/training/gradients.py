"""Gradients that methods ask to have compared, seen on their way to the parameters.

Hooks on the tensors that modules compute with see a gradient before a launcher averages, accumulates or
splits it. That is the same in one process, under DDP, and for adapters whose weights FSDP or ZeRO-3 splits,
and needs neither a second model nor a second backward pass of the step's own loss. The price is two buffers
of the size of the trainable parameters on every rank, for as long as the step's update takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from posttrain.errors import TrainingError
from posttrain.methods.base import (
    CHANNELS,
    Channel,
    Compared,
    Comparison,
    LossTerm,
    Method,
    StepContext,
)
from posttrain.rollout.types import RolloutBatch
from posttrain.training.batch import MicroBatch, TrainRow, rollout_row
from posttrain.training.distributed import splits_weights

COMPARED = "compared"
"""Name of the channel that the rows of a comparison have."""


def cut(
    rows: Sequence[TrainRow],
    terms: Sequence[LossTerm],
    comparison: GradientComparison | None,
    micro_batches: Callable[[Sequence[TrainRow]], list[list[TrainRow]]],
) -> list[list[TrainRow]]:
    """The micro-batches of an update; with a comparison each has rows of one part of the loss only.

    `micro_batches` cuts rows, into as many on every rank: it is called for the same parts on all of them.
    """
    if comparison is None:
        return micro_batches(rows)
    comparison.micro_batches = micro_batches(comparison.rows)
    parts: dict[str, list[TrainRow]] = {CHANNELS: [], **{term.name: [] for term in terms}}
    for row in rows:
        parts[next(iter(row.nll_weights), CHANNELS)].append(row)
    made = [(part, micro) for part, own in parts.items() for micro in micro_batches(own)]
    comparison.parts = [part for part, _ in made]
    return [micro for _, micro in made]


def asked(
    methods: Sequence[Method], batch: RolloutBatch, contexts: Sequence[StepContext]
) -> GradientComparison | None:
    """The comparison that a method asks for in this step.

    Raises:
        TrainingError: two methods ask for one.
    """
    found: GradientComparison | None = None
    for method, context in zip(methods, contexts, strict=False):
        comparison = method.compare(batch, context)
        if comparison is not None and found is not None:
            raise TrainingError(f"{found.method.name} and {method.name} both compare gradients in one step")
        if comparison is not None:
            found = GradientComparison(comparison, method, context, batch)
    return found


def require_affordable(policy: Any, methods: Sequence[Method]) -> None:
    """Refuse methods with which every rank would hold the gradient of weights that were split to fit.

    Raises:
        TrainingError: a method compares gradients, and all weights of the policy are split and trained.
    """
    wanted = any(method.compares for method in methods)
    if wanted and splits_weights() and all(parameter.requires_grad for parameter in policy.parameters()):
        raise TrainingError(
            "comparing gradients needs those of all trainable weights on every rank: with FSDP or ZeRO-3 "
            "train an adapter (model.lora), or use DDP or ZeRO-2"
        )


class GradientComparison:
    """One comparison, for the length of an update.

    `rows` are what the comparison's own gradient comes from; the trainer makes `micro_batches` of them, and
    says by `parts` which part of the loss each micro-batch of its own belongs to.
    """

    def __init__(self, asked: Comparison, method: Method, context: StepContext, batch: RolloutBatch):
        self.method = method
        self._context = context
        self._combination = asked.combination
        self._count = float(len(asked.advantages))
        told = Channel(COMPARED, {key: value for key, value in asked.advantages.items() if value})
        self.rows = [row for rollout in batch if (row := rollout_row(rollout, [told])) is not None]
        self.micro_batches: list[list[TrainRow]] = []
        self.parts: list[str] = []
        self._part: str | None = None
        self._scale = 1.0
        self._direction: dict[str, torch.Tensor] = {}
        self._combined: dict[str, torch.Tensor] = {}
        self._products: dict[str, torch.Tensor] = {}
        self._seen: dict[int, torch.Tensor] = {}
        self._handles: list[Any] = []

    @contextmanager
    def watching(self, policy: Any) -> Iterator[None]:
        """See the gradients of all trainable parameters while inside."""
        for name, module in policy.named_modules():
            # Not on the parameters themselves: with FSDP modules compute with other tensors than those.
            self._handles.append(module.register_forward_pre_hook(partial(self._attach, name)))
        try:
            yield
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self._seen.clear()

    def _attach(self, name: str, module: torch.nn.Module, inputs: Any) -> None:
        for key, weight in module.named_parameters(name, recurse=False):
            if weight.requires_grad and id(weight) not in self._seen:
                self._seen[id(weight)] = weight
                self._direction[key] = torch.zeros_like(weight, requires_grad=False)
                self._combined[key] = torch.zeros_like(weight, requires_grad=False)
                self._handles.append(weight.register_hook(partial(self._arrived, key)))

    def _arrived(self, key: str, gradient: torch.Tensor) -> torch.Tensor | None:
        if self._part is None:
            self._direction[key] += gradient
            return torch.zeros_like(gradient)  # it is measured, and not followed
        if self._part in self._combination:
            gradient = gradient.detach()
            self._combined[key].add_(gradient, alpha=self._scale * self._combination[self._part])
            product = torch.dot(self._direction[key].flatten(), gradient.flatten())
            self._products[self._part] = self._products.get(self._part, 0.0) + self._scale * product.double()
        return None

    def surrogate(self, micro: MicroBatch, logprobs: torch.Tensor, accelerator: Any) -> torch.Tensor:
        """Σ advantage · log-probability of one of `micro_batches`, over the rollouts of all ranks."""
        member, advantages = micro.select("advantages", COMPARED)
        count = torch.tensor(self._count, device=logprobs.device)
        total = accelerator.reduce(count, "sum").clamp(min=1.0)
        return logprobs.sum() * 0.0 + (advantages * logprobs[member]).sum() / total

    def begin(self, accelerator: Any) -> None:
        """All of the comparison's gradient has been seen: make it that of all ranks."""
        self._direction = accelerator.reduce(self._direction, "sum")
        self._scale = 1.0 / accelerator.num_processes  # which the trainer multiplies its losses by

    def step_into(self, index: int) -> None:
        """The trainer's micro-batch with this index comes next."""
        self._part = self.parts[index]

    def tell(self, accelerator: Any, learning_rate: float) -> None:
        """Put together what the ranks have seen and give it to the method that asked."""
        zero = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        names = sorted(self._combination)
        products = torch.stack([zero + self._products.get(name, zero) for name in names])
        summed = accelerator.reduce(products, "sum").tolist()
        combined = accelerator.reduce(self._combined, "sum")
        result = Compared(
            norm=_norm(self._direction),
            products=dict(zip(names, summed, strict=True)),
            combined_norm=_norm(combined),
            learning_rate=learning_rate,
        )
        self.method.compared(result, self._context)


def _norm(gradient: Mapping[str, torch.Tensor]) -> float:
    return float(sum(float(part.double().square().sum()) for part in gradient.values()) ** 0.5)
