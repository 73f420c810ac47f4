"""What tells a run that learns from one that only looks like it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from posttrain.errors import TrainingError
from posttrain.rollout.types import Completion
from posttrain.rollout.weights import whole
from posttrain.training.advantages import zero_variance
from posttrain.training.batch import TrainRow
from posttrain.training.collect import SOLUTION, Collected
from posttrain.training.losses import Stats, mean_stats
from posttrain.training.tally import Tally

MISMATCH = "sampling/logprob_difference"
METRIC_NAMES = {
    "entropy": "entropy",
    "kl": "kl",
    "ratio": "ratio/mean",
    "clipped_low": "ratio/clipped_low",
    "clipped_high": "ratio/clipped_high",
    "importance": "sampling/importance_ratio",
    "mismatch": MISMATCH,
}


def update_metrics(tally: Tally, stats: Stats) -> float:
    """Add what a loss has found out to a tally; the mean absolute difference to the engine's log-probs."""
    values = mean_stats(stats) if stats else {}
    tokens = values.pop("tokens", 0.0)
    for key, name in METRIC_NAMES.items():
        if key in values:
            tally.mean(name, values[key], tokens)
    for key, value in values.items():
        channel, slash, kind = key.rpartition("/")
        if slash and kind != "tokens":
            tally.mean(f"ratio/{channel}/{kind}", value, values[f"{channel}/tokens"])
    return values.get("mismatch", 0.0)


def check_sync(difference: float, tolerance: float, step: int, version: int) -> None:
    """Compare the engine's log-probs with the trainer's for the same tokens and weights.

    `difference` is the mean absolute one over the trained tokens of a batch, in nats.

    Raises:
        TrainingError: the engine does not sample from the policy that is trained.
    """
    if difference > tolerance:
        raise TrainingError(
            f"at step {step}, after sync {version}, the engine's log-probs differ from the trainer's by "
            f"{difference:.2g} nats on average (tolerance {tolerance:.2g}): the engine does not have the "
            f"policy's weights"
        )


def refuse_bad_loss(accelerator: Any, loss: torch.Tensor, step: int) -> None:
    """DeepSpeed steps inside its last backward pass, so a bad update can be refused, not skipped.

    `loss` is this rank's of the whole update; all ranks call this.

    Raises:
        TrainingError: the loss is not finite on some rank.
    """
    finite = torch.isfinite(loss).to(loss.dtype)
    if accelerator.reduce(finite, "sum") < accelerator.num_processes:
        raise TrainingError(
            f"the loss of step {step} is not finite ({float(loss)} on this rank): "
            "the weights were not updated, and with DeepSpeed such a step cannot be skipped"
        )


class WeightsWatch:
    """Makes sure that there is something to train and that the first real update changes it."""

    def __init__(self, model: Any):
        """Raises TrainingError when no parameter is trainable."""
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise TrainingError("no parameter of the model is trainable")
        self.before: torch.Tensor | None = None

    def begin(self, model: Any) -> None:
        """Called when the weights are where they will be trained; from here on they are to change."""
        self.before = self._fingerprint(model)

    def after_step(self, model: Any, learning_rate: float, step: int) -> None:
        """Called after optimiser steps that had a gradient, until one had a learning rate.

        Raises:
            TrainingError: the weights are what they were.
        """
        if self.before is None or learning_rate == 0.0:
            return
        if torch.equal(self.before, self._fingerprint(model)):
            raise TrainingError(
                f"the weights are unchanged after step {step}, which had a gradient and a learning rate of "
                f"{learning_rate:g}: the update is too small for the weights' precision"
            )
        self.before = None

    @staticmethod
    def _fingerprint(model: Any) -> torch.Tensor:
        """Sum and sum of squares of every trainable tensor, in float64; a collective where they are split."""
        sums = []
        for parameter in model.parameters():
            if parameter.requires_grad:
                values = whole(parameter).double()
                sums.append(torch.stack([values.sum(), values.square().sum()]).cpu())
        return torch.stack(sums)


def finite_gradients(model: Any) -> bool:
    """Whether the norm of this rank's part of the gradient is a finite number."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    return bool(torch.isfinite(torch.nn.utils.get_total_norm(local))) if local else True


def rollout_metrics(tally: Tally, collected: Collected, rows: Sequence[TrainRow]) -> None:
    """Add what a batch's rollouts say about the run's health to a tally.

    `completions/truncated`, `groups/zero_variance` and `rewards/unscored` are shares in [0, 1]; unscored
    counts every sample that got no score, those drawn again included.
    """
    rollouts = [*collected.batch, *collected.dropped]
    scored = [rollout for rollout in rollouts if rollout.reward is not None]
    solutions = [rollout for rollout in scored if rollout.request.role == SOLUTION]
    for rollout in rollouts:
        length = len(rollout.completion.token_ids)
        tally.total("tokens/sampled", rollout.completion.sampled_tokens)
        if rollout.request.role == SOLUTION:  # a forced answer is short, and cut on purpose
            tally.mean("completions/mean_length", length)
            tally.maximum("completions/max_length", length)
            tally.mean("completions/truncated", rollout.truncated)
    redrawn = sum("/drawn-" in name for name in collected.reasons)
    asked = [r for r in rollouts if r.reward is not None or r.reward_errors or r.request.role == SOLUTION]
    tally.mean("rewards/unscored", (len(asked) - len(scored) + redrawn) / max(len(asked) + redrawn, 1),
               len(asked) + redrawn)  # fmt: skip
    for rollout in solutions:
        tally.mean("reward", rollout.reward)
        for name, value in rollout.rewards.items():
            if value is not None:
                tally.mean(f"rewards/{name}/mean", value)
    _group_metrics(tally, solutions)
    tally.total("tokens/trained", sum(len(row.positions) for row in rows))
    tally.total("tokens/supervised", sum(len(row.positions) for row in rows if row.nll_weights))
    tally.total(
        "tokens/with_advantage",
        sum(
            int(np.any(np.stack([*row.advantages.values()]), axis=0).sum()) for row in rows if row.advantages
        ),
    )
    _tool_metrics(tally, [rollout.completion for rollout in rollouts if rollout.completion.turns])
    for name, count in collected.counts.items():
        tally.total(name, count)
    for phase, seconds in collected.seconds.items():
        tally.total(f"seconds/{phase}", seconds)


def _tool_metrics(tally: Tally, completions: Sequence[Completion]) -> None:
    """Of completions that were sampled with tools."""
    for completion in completions:
        tally.mean("tools/calls", len(completion.tool_calls))
        tally.mean("tools/use", bool(completion.tool_calls))
        tally.total("tools/seconds", sum(call.seconds for call in completion.tool_calls))
        for call in completion.tool_calls:
            tally.mean("tools/failed", call.error is not None)
            if call.error is not None:
                tally.total(f"tools/errors/{call.error}", 1)


def _group_metrics(tally: Tally, solutions: Sequence[Any]) -> None:
    groups: dict[str, list[float]] = {}
    for rollout in solutions:
        groups.setdefault(rollout.request.group, []).append(rollout.reward)
    for group, rewards in groups.items():
        tally.mean("reward_std", float(np.std(rewards)))
        flat = zero_variance(np.array(rewards), [group] * len(rewards))
        tally.mean("groups/zero_variance", float(bool(flat)))
