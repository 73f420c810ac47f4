"""Advantages from rewards: pure functions on float64 arrays with one entry per rollout.

`rewards` are finite (unscored rollouts have been dropped or drawn again) and `groups` holds one hashable key
per rollout; groups may have any size and their members need not be adjacent. A group without variance, a
group of one included, says nothing about which completion is better: its advantages are exactly 0.
Standard deviations are the unbiased ones, as in TRL.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from posttrain.recipe.schema import LossKind

Floats = NDArray[np.float64]
Scale = Literal["group", "batch", "none"]

EPSILON = 1e-4
"""Added to standard deviations before dividing; TRL's value."""
NO_SPREAD = 1e-8
"""Rewards of a group that differ by less are equal: sums of the same terms differ by rounding."""


@dataclass(frozen=True)
class BatchStats:
    """Mean and unbiased standard deviation over the rollouts of a batch, of all ranks together."""

    mean: float
    std: float

    @classmethod
    def from_moments(cls, moments: Floats) -> BatchStats:
        """From (count, sum, sum of squares) as `batch_moments` gives them, summed over ranks."""
        count, total, squares = (float(moment) for moment in moments)
        if count < 2:
            return cls(total / max(count, 1.0), 0.0)
        variance = (squares - total**2 / count) / (count - 1)
        return cls(total / count, max(variance, 0.0) ** 0.5)


def default_scale(kind: LossKind) -> Scale:
    """What the loss's paper divides advantages by.

    Dr. GRPO (Liu et al. 2025) and RLOO (Ahmadian et al. 2024) do not divide, REINFORCE++ (Hu et
    al. 2025) divides by the standard deviation of the batch, the others by that of the group.
    """
    if kind in ("dr_grpo", "rloo"):
        return "none"
    return "batch" if kind == "reinforce_pp" else "group"


def compute_advantages(
    kind: LossKind,
    scale: Scale | None,
    rewards: Floats,
    groups: Sequence[Hashable],
    batch_stats: BatchStats | None = None,
) -> Floats:
    """The advantages that a loss wants; `scale` None is its paper's (`default_scale`).

    `batch_stats` are needed with scale `batch` when the batch is spread over ranks (see `batch_moments`);
    None takes them from `rewards`.
    """
    scale = scale or default_scale(kind)
    if kind == "rloo":
        return _scaled(leave_one_out(rewards, groups), scale, rewards, groups, EPSILON, batch_stats)
    if kind == "reinforce_pp" and scale == "batch":
        return reinforce_pp_baseline(rewards, groups, batch_stats=batch_stats)
    return group_advantages(rewards, groups, scale, batch_stats=batch_stats)


def group_advantages(
    rewards: Floats,
    groups: Sequence[Hashable],
    scale: Scale = "group",
    eps: float = EPSILON,
    batch_stats: BatchStats | None = None,
) -> Floats:
    """(r - mean of the group) / (standard deviation + eps): GRPO (Shao et al. 2024, section 4.1.2).

    `batch` divides by the standard deviation of all rewards instead (Liu et al. 2025, "Tricks or traps?"),
    `none` does not divide (Dr. GRPO).
    """
    return _scaled(_centred(rewards, groups), scale, rewards, groups, eps, batch_stats)


def decoupled_rewards(values: Floats, weights: Floats, groups: Sequence[Hashable]) -> Floats:
    """Σ weightₖ (rₖ - mean of the group) / (standard deviation + eps), each reward by itself.

    The first half of GDPO (Liu et al. 2026, "Group reward-decoupled normalization policy optimization"); the
    second is `reinforce_pp_baseline` of the result, whose group means are 0.

    Args:
        values: [rollouts, rewards]; NaN where a reward does not apply, which its statistics leave out.
        weights: [rewards].
        groups: a key per rollout.
    """
    total = np.zeros(len(values))
    for column, weight in zip(values.T, weights, strict=True):
        applies = np.flatnonzero(~np.isnan(column))
        total[applies] += weight * group_advantages(column[applies], [groups[i] for i in applies])
    return total


def leave_one_out(rewards: Floats, groups: Sequence[Hashable]) -> Floats:
    """r minus the mean of the other rewards of its group: RLOO (Ahmadian et al. 2024)."""
    index, sizes = _group_index(groups)
    size = sizes[index]
    return _centred(rewards, groups) * size / np.maximum(size - 1, 1)


def reinforce_pp_baseline(
    rewards: Floats,
    groups: Sequence[Hashable],
    eps: float = EPSILON,
    batch_stats: BatchStats | None = None,
) -> Floats:
    """r minus its group's mean, then normalised over the batch: REINFORCE++-baseline (Hu et al. 2025).

    `batch_stats` are of the group-centred rewards. The group mean is a baseline only, so an easy and a hard
    prompt with the same spread weigh the same, and a nearly solved one is not blown up by its small spread.
    """
    centred = _centred(rewards, groups)
    stats = batch_stats or BatchStats.from_moments(_moments(centred))
    normalised = (centred - stats.mean) / (stats.std + eps)
    return np.where(_has_spread(rewards, groups), normalised, 0.0)


def batch_moments(kind: LossKind, rewards: Floats, groups: Sequence[Hashable]) -> Floats:
    """(count, sum, sum of squares) of what scale `batch` normalises by: sum over ranks, then `BatchStats`.

    That is the rewards, or for reinforce_pp the rewards minus their group's mean.
    """
    return _moments(_centred(rewards, groups) if kind == "reinforce_pp" else rewards)


def zero_variance(rewards: Floats, groups: Sequence[Hashable]) -> set[Hashable]:
    """Keys of the groups whose rewards are all the same, groups of one included."""
    return {group for group, spread in zip(groups, _has_spread(rewards, groups), strict=True) if not spread}


def _group_index(groups: Sequence[Hashable]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Group number of every rollout, and the size of every group."""
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)
    return index, np.bincount(index, minlength=len(numbers))


def _has_spread(rewards: Floats, groups: Sequence[Hashable]) -> NDArray[np.bool_]:
    index, sizes = _group_index(groups)
    low, high = np.full(len(sizes), np.inf), np.full(len(sizes), -np.inf)
    np.minimum.at(low, index, rewards)
    np.maximum.at(high, index, rewards)
    return (high - low > NO_SPREAD)[index]


def _centred(rewards: Floats, groups: Sequence[Hashable]) -> Floats:
    index, sizes = _group_index(groups)
    mean = np.bincount(index, rewards, len(sizes)) / np.maximum(sizes, 1)
    return np.where(_has_spread(rewards, groups), rewards - mean[index], 0.0)


def _moments(values: Floats) -> Floats:
    return np.array([len(values), values.sum(), np.square(values).sum()], dtype=np.float64)


def _scaled(
    advantages: Floats,
    scale: Scale,
    rewards: Floats,
    groups: Sequence[Hashable],
    eps: float,
    batch_stats: BatchStats | None,
) -> Floats:
    if scale == "none":
        return advantages
    if scale == "batch":
        stats = batch_stats or BatchStats.from_moments(_moments(rewards))
        return advantages / (stats.std + eps)
    index, sizes = _group_index(groups)
    squares = np.bincount(index, np.square(_centred(rewards, groups)), len(sizes))
    std = np.sqrt(squares / np.maximum(sizes - 1, 1))
    return advantages / (std[index] + eps)


def token_factor(kind: LossKind, length: Any, sequences: float, tokens: float, max_tokens: int) -> Any:
    """The factor of a token in the sum that is the loss.

    grpo, gspo     1 / (tokens of its completion × completions): mean of the completions' means
    dr_grpo        1 / (completions × max_tokens): no length bias (Liu et al. 2025, "Dr. GRPO")
    rloo           1 / completions: a completion is one action, its log-prob a sum (Ahmadian et al. 2024)
    dapo, bnpo, cispo, reinforce_pp
                   1 / tokens: mean over the tokens of the batch (Yu et al. 2025, "DAPO", section 3.3).
                   TRL's bnpo takes the mean within each micro-batch and so depends on the cut; ours does not.

    Args:
        kind: of the loss.
        length: tokens of the token's completion, a number or an array of them.
        sequences: completions that are trained.
        tokens: their tokens.
        max_tokens: the cap on a completion.
    """
    if kind in ("grpo", "gspo"):
        return 1.0 / (length * sequences)
    count = {"dr_grpo": sequences * max_tokens, "rloo": sequences}.get(kind, tokens)
    return 1.0 / max(count, 1.0)
