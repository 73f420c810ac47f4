"""SOAR's outer loop as pure functions: grounded rewards, advantages of sets, promotion.

Symbols of the paper (arXiv:2601.18778): g sets of questions in an outer step, r students on each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from posttrain.training.advantages import Floats, leave_one_out


def grounded_rewards(accuracies: Sequence[Sequence[float]], baseline: float) -> Floats:
    """R[k, j]: accuracy of student j of set k on the step's hard problems, minus the baseline's on the
    same."""
    return np.asarray(accuracies, dtype=np.float64) - baseline


def set_rewards(rewards: Floats) -> Floats:
    """R_k, the mean over the r students of each set [g, r] -> [g]."""
    return rewards.mean(axis=1)


def set_advantages(rewards: Floats) -> Floats:
    """A_k = R_k - mean of the other sets' rewards = g/(g-1) · (R_k - mean) [g].

    They sum to zero, so that rejected proposals may be ignored: the gradient of the log-probability that a
    proposal is accepted is common to all of them (the paper's proposition 1).
    """
    return leave_one_out(rewards, [0] * len(rewards))


def learnability(hits: Sequence[int], samples: int) -> Floats:
    """The intrinsic reward of each question: 0 if no answer agrees with the teacher's, else 1 - their
    share."""
    share = np.asarray(hits, dtype=np.float64) / samples
    return np.where(share > 0, 1 - share, 0.0)


def median_student(rewards: Floats) -> int:
    """Which student has the median reward; the lower median of an even number, the first of equal ones."""
    return int(np.argsort(rewards, kind="stable")[(len(rewards) - 1) // 2])


@dataclass
class Promotions:
    """The moving average of the step reward R̂, and what has come of it.

    A promotion takes the best set and of its students the median one: the set is chosen for its reward, and a
    lucky student must not become the baseline.
    """

    threshold: float
    window: int
    clear: bool = True
    recent: list[float] = field(default_factory=list)
    count: int = 0
    latest: float = 0.0
    """R̄ of the last step, over as many rewards as there were."""

    def add(self, rewards: Floats) -> tuple[int, int] | None:
        """Take the rewards R[k, j] of a step. Returns the set and the student to be promoted, or None.

        Never before the window is full; among equal sets the first.
        """
        means = set_rewards(rewards)
        self.recent = [*self.recent, float(means.mean())][-self.window :]
        self.latest = float(np.mean(self.recent))
        if len(self.recent) < self.window or not self.latest > self.threshold:
            return None
        best = int(np.argmax(means))
        self.count += 1
        if self.clear:
            self.recent = []
        return best, median_student(rewards[best])
