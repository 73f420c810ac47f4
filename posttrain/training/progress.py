"""Progress of a thinking trace and the advantages made of it: pure functions.

J is the probability that an answer forced now is right; J₀ before any thinking, Jⱼ after episode j. The
definitions are those of Qu et al. 2025, "Optimizing test-time compute via meta reinforcement fine-tuning"
(arXiv:2503.07572).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from posttrain.training.advantages import EPSILON, BatchStats, Floats, group_advantages


def progress(values: Sequence[float]) -> Floats:
    """Jⱼ - Jⱼ₋₁ of every episode, in [-1, 1] (definition 6.1); their sum is the last J minus the first."""
    return np.diff(np.asarray(values, dtype=np.float64))


def progress_to_go(steps: Floats) -> Floats:
    """The progress that an episode and all after it make: the last J minus the one before the episode."""
    return np.cumsum(steps[::-1])[::-1]


def telescoping_error(values: Sequence[float], steps: Floats) -> float:
    """How far the sum of the progress is from the last J minus the first; only rounding makes it differ."""
    return abs(float(steps.sum()) - (values[-1] - values[0]))


def implicit_advantages(continued: Floats, terminated: Floats) -> tuple[Floats, Floats]:
    """Rewards of rollouts that went on from a prefix and of answers forced there, normalised together.

    Before the division by the standard deviation, and with as many of both, the mean over those that went on
    is (Jc - Jt) / 2, half of what thinking on gained, and over the others the negative.
    """
    together = np.concatenate([continued, terminated])
    advantages = group_advantages(together, [0] * len(together))
    return advantages[: len(continued)], advantages[len(continued) :]


def baseline_advantages(continued: Floats, terminated: Floats) -> Floats:
    """Reward minus the mean reward of the answers forced at the prefix.

    The mean does not depend on what the continuation does: it is a baseline, so the expected gradient is
    that of REINFORCE from the same prefixes.
    """
    return continued - terminated.mean()


def bonus_advantages(
    rewards: Floats,
    before: Floats,
    after: Floats,
    groups: Sequence[Hashable],
    alpha: float,
    eps: float = EPSILON,
) -> Floats:
    """Reward plus alpha times the progress of the next episode, normalised within groups.

    A group has one prefix, so `before` shifts all of it and drops out; it is kept because it is the bonus.
    """
    return group_advantages(rewards + alpha * (after - before), groups)


def spread_over_tokens(
    steps: Floats, spans: Sequence[tuple[int, int]], length: int, stats: BatchStats
) -> Floats:
    """Each episode's progress on its own tokens, minus the mean and over the deviation of the batch's.

    The tokens outside of the spans, those of the answer, get 0. Centred, because progress is mostly positive
    and would otherwise pay for every further episode.

    Args:
        steps: of each episode.
        spans: its tokens.
        length: tokens of the completion.
        stats: of the progress of all episodes in the batch.
    """
    advantages = np.zeros(length)
    for value, (start, end) in zip(steps, spans, strict=True):
        advantages[start:end] = (value - stats.mean) / (stats.std + EPSILON)
    return advantages
