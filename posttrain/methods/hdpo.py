"""HDPO: use tools only where they pay ("Act wisely", Alibaba and HUST, arXiv:2604.08545).

Accuracy and economy are never added up as rewards. Accuracy is an ordinary channel over all completions of a
group; economy is a second one over the *correct* ones alone, normalised among themselves:

    for each group g:
        Q = the correct completions of g
        r_i = 1 / (1 + cost_i)                                       for i in Q
        A_i = (r_i - mean of r over Q) / (standard deviation + 1e-6)  if |Q| >= 2
        A_i = 0                                                       for all others
    loss = L(accuracy advantages) + weight * L(A), each clipped by itself

A wrong completion learns nothing about economy, so giving up early is not rewarded; and while a prompt has
fewer than two correct completions the channel is silent, so correctness comes first without a schedule. The
weight is an exchange rate: two ways of answering that are tried equally often, one with a call and one
without, change places at a difference in accuracy of about weight · 2p·sqrt(p(1-p)).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from posttrain.errors import TrainingError
from posttrain.methods.base import CHANNELS, Channel, Compared, Comparison, Method, StepContext
from posttrain.recipe.hdpo_schema import HdpoConfig
from posttrain.rollout.types import Completion, Rollout, RolloutBatch
from posttrain.training.advantages import Floats, group_advantages, token_factor

SOLUTION = "solution"
EFFICIENCY = "efficiency"
EPSILON = 1e-6
"""Added to the channel's standard deviations, as in the authors' code."""

Cost = Literal["calls", "seconds", "tokens"]
Shape = Literal["reciprocal", "linear"]


def costs(completions: Sequence[Completion], cost: Cost) -> Floats:
    """What each completion spent: calls, seconds of tools, or tokens."""
    match cost:
        case "calls":
            spent: list[float] = [len(completion.tool_calls) for completion in completions]
        case "seconds":
            spent = [sum(call.seconds for call in completion.tool_calls) for completion in completions]
        case "tokens":
            spent = [len(completion.token_ids) for completion in completions]
    return np.array(spent, dtype=np.float64)


def economy(cost: Floats, correct: NDArray[np.bool_], shape: Shape = "reciprocal") -> Floats:
    """The efficiency reward of every completion: 1 / (1 + cost), or -cost; 0 for wrong ones."""
    values = 1.0 / (1.0 + cost) if shape == "reciprocal" else -cost
    return np.where(correct, values, 0.0)


def efficiency_advantages(
    rewards: Floats,
    qualifies: NDArray[np.bool_],
    groups: Sequence[Hashable],
    *,
    divide_by_std: bool = True,
) -> Floats:
    """Advantages among the qualifying completions of each group; 0 for all others.

    They are 0, too, where fewer than two of a group qualify (there is nothing to compare with) and where
    those that do have equal rewards. Adding wrong completions to a group changes nothing.
    """
    advantages = np.zeros(len(rewards))
    members = np.flatnonzero(qualifies)
    advantages[members] = group_advantages(
        rewards[members],
        [groups[index] for index in members],
        "group" if divide_by_std else "none",
        EPSILON,
    )
    return advantages


class Hdpo(Method):
    """The efficiency channel; accuracy is the trainer's own "outcome" channel."""

    name = "hdpo"
    Config = HdpoConfig
    config: HdpoConfig

    def __init__(self, config: HdpoConfig):
        super().__init__(config)
        self._advantages: dict[str, float] = {}
        self._weight = 0.0
        """Of the efficiency channel of the step, as it would be without `combine`."""

    def channels(self, batch: RolloutBatch, context: StepContext) -> list[Channel]:
        """Raises:
        TrainingError: a rollout lacks the reward that says what is correct.
        """
        config = self.config
        rollouts = batch.with_role(SOLUTION).rollouts
        correct = np.array([self._is_correct(rollout) for rollout in rollouts], dtype=bool)
        spent = costs([rollout.completion for rollout in rollouts], config.cost)
        groups = [rollout.request.group for rollout in rollouts]
        advantages = efficiency_advantages(
            economy(spent / config.unit, correct, config.shape),
            correct if config.conditional else np.ones(len(correct), dtype=bool),
            groups,
            divide_by_std=config.divide_by_std,
        )
        rewards = np.array([rollout.reward for rollout in rollouts], dtype=np.float64)
        scale: Literal["group", "none"] = "group" if config.divide_by_std else "none"
        accuracy = group_advantages(rewards, groups, scale, EPSILON)
        self._log(context, rollouts, correct, advantages, accuracy)
        if config.weight == 0:
            return []
        if config.combine == "advantage":
            share = _share_of_tokens(rollouts, advantages) if config.normalizer == "qualifying" else 1.0
            weight = config.weight / (share or 1.0)
            self._advantages, self._weight = _by_id(rollouts, advantages), weight
            return [Channel("outcome", _by_id(rollouts, accuracy + weight * advantages))]
        kept = np.ones(len(rollouts), dtype=bool) if config.normalizer == "all" else _active(advantages)
        chosen = [rollout for rollout, keep in zip(rollouts, kept, strict=True) if keep]
        self._advantages, self._weight = _by_id(chosen, advantages[kept]), config.weight
        return [Channel(EFFICIENCY, self._advantages, config.weight)]

    @property
    def compares(self) -> bool:
        """Whether the channels' gradients are compared now and then."""
        return self.config.weight != 0 and self.config.compare_gradients is not None

    def compare(self, batch: RolloutBatch, context: StepContext) -> Comparison | None:
        """The gradient of the efficiency channel's loss at ratio 1, where that is asked for."""
        every, own = self.config.compare_gradients, self._advantages
        if not self.compares or every is None or context.step % every:
            return None
        lengths = {r.id: r.completion.sampled_tokens for r in batch if r.id in own}
        counted = context.gather((len(lengths), sum(lengths.values())))
        sequences, tokens = (float(sum(values)) for values in zip(*counted, strict=True))
        # The comparison is a mean over completions: this gives their tokens the factors of the loss.
        factors = {
            key: sequences
            * token_factor(context.loss.kind, length, sequences, tokens, context.sampling.max_tokens)
            for key, length in lengths.items()
        }
        return Comparison({key: value * factors[key] for key, value in own.items()}, {CHANNELS: 1.0})

    def compared(self, result: Compared, context: StepContext) -> None:
        """Log the norms of both channels' gradients, weights included, their ratio and their cosine."""
        weight = self._weight
        efficiency = weight * result.norm
        # The gradient of all channels is that of accuracy minus weight · the comparison's.
        product = result.products[CHANNELS] + weight * result.norm**2
        square = result.combined_norm**2 + 2 * weight * result.products[CHANNELS] + efficiency**2
        accuracy = max(square, 0.0) ** 0.5
        context.log("gradient/efficiency", efficiency)
        context.log("gradient/accuracy", accuracy)
        if accuracy > 0 and result.norm > 0:
            context.log("gradient/ratio", efficiency / accuracy)
            context.log("gradient/cosine", -product / (accuracy * result.norm))

    def _is_correct(self, rollout: Rollout) -> bool:
        name = self.config.reward or next(iter(rollout.rewards), None)
        if name is None or rollout.rewards.get(name) is None:
            known = ", ".join(rollout.rewards) or "none"
            raise TrainingError(
                f"hdpo: rollout {rollout.id!r} has no value of reward {name!r}, which says what is correct; "
                f"it has {known}"
            )
        return float(rollout.rewards[name] or 0.0) >= self.config.threshold

    def _log(
        self,
        context: StepContext,
        rollouts: Sequence[Rollout],
        correct: NDArray[np.bool_],
        advantages: Floats,
        accuracy: Floats,
    ) -> None:
        """Whether the channel has something to say, and what the policy does."""
        sizes: dict[str, list[bool]] = {}
        signals: dict[str, list[bool]] = {}
        for rollout, right, active in zip(rollouts, correct, _active(advantages), strict=True):
            sizes.setdefault(rollout.request.group, []).append(bool(right))
            signals.setdefault(rollout.request.group, []).append(bool(active))
            calls = [call.arguments for call in rollout.completion.tool_calls]
            context.log("redundant_calls", len(calls) >= 2 and max(Counter(calls).values()) >= 2)
            family = rollout.request.example.columns.get("family")
            if family is not None:
                context.log(f"tool_use/{family}", bool(calls))
                context.log(f"calls/{family}", len(calls))
                context.log(f"correct/{family}", bool(right))
        for group in sizes:
            context.log("qualifying_groups", sum(sizes[group]) >= 2)
            context.log("active_groups", any(signals[group]))
        context.log("token_share", _share_of_tokens(rollouts, advantages))
        context.log("conflicts", float(np.mean((accuracy > 0) & (advantages < 0))) if len(rollouts) else 0.0)


def _by_id(rollouts: Sequence[Rollout], values: Floats) -> dict[str, float]:
    return {rollout.id: float(value) for rollout, value in zip(rollouts, values, strict=True)}


def _share_of_tokens(rollouts: Sequence[Rollout], advantages: Floats) -> float:
    """Share of the policy's tokens (of this process) that are in completions with an advantage."""
    tokens = np.array([rollout.completion.sampled_tokens for rollout in rollouts], dtype=np.float64)
    return float(tokens[_active(advantages)].sum() / max(tokens.sum(), 1.0))


def _active(advantages: Floats) -> NDArray[np.bool_]:
    """Which advantages are not 0, rounding aside."""
    return np.abs(advantages) > 1e-9


METHOD = Hdpo
