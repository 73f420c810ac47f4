"""How well a model foresees the reward and the remaining length of its own rollouts, by position.

Shapes: N rollouts, T tokens of one, R reward and L length bins. Positions are numbers of tokens, at each of
which the rollouts count that are still being written: a share of the whole length would tell how long that
is. Whoever reads a total variation must see its sampling floor beside it: that of a perfect forecast,
compared with so few rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from posttrain.rollout.types import Rollout
from posttrain.zip_rc.grid import Grid, expected_length, expected_reward

Array = NDArray[np.float64]

POSITIONS = 10
"""Positions at which forecasts are looked at, up to the length that a tenth of the rollouts reach."""


@dataclass(frozen=True)
class ForecastTrace:
    """A finished rollout: what was foreseen at each of its tokens, and what came.

    Attributes:
        problem: rollouts of one problem share it.
        joint: [T, R, L].
        correct: whether the answer was right.
    """

    problem: str
    joint: Array
    correct: bool

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.joint)


def forecast_traces(grid: Grid, rollouts: Sequence[tuple[Rollout, bool | None]]) -> list[ForecastTrace]:
    """Those of rollouts with scores and an outcome; cut off and unscored ones are left out."""
    return [
        ForecastTrace(rollout.request.group, grid.joint(rollout.completion.scored), outcome)
        for rollout, outcome in rollouts
        if outcome is not None and rollout.completion.scored is not None and not rollout.truncated
    ]


def brier_score(predicted: ArrayLike, outcome: ArrayLike) -> float:
    """Mean squared difference of probabilities (N,) from what came, 0 or 1."""
    return float(np.mean((np.asarray(predicted, float) - np.asarray(outcome, float)) ** 2))


def calibration_error(predicted: ArrayLike, outcome: ArrayLike, bins: int = 10) -> float:
    """Expected calibration error (Naeini et al., 2015): |mean prediction - mean outcome| in equal bins of the
    prediction, weighted by how many are in each.
    """
    p, y = np.asarray(predicted, float), np.asarray(outcome, float)
    members = np.minimum((p * bins).astype(int), bins - 1)
    gaps = [abs(p[members == b].mean() - y[members == b].mean()) * (members == b).sum() for b in set(members)]
    return float(sum(gaps) / len(p))


def ranking_quality(predicted: ArrayLike, outcome: ArrayLike) -> float:
    """Area under the ROC curve: how often a right one is above a wrong one, ties counting half.

    NaN if there are not both.
    """
    p, y = np.asarray(predicted, float), np.asarray(outcome, bool)
    right, wrong = p[y], np.sort(p[~y])
    if len(right) == 0 or len(wrong) == 0:
        return math.nan
    below, not_above = np.searchsorted(wrong, right, "left"), np.searchsorted(wrong, right, "right")
    return float((below + not_above).mean() / (2 * len(wrong)))


def total_variation(p: ArrayLike, q: ArrayLike) -> float:
    """½ Σ |p - q| of two distributions of any shape."""
    return float(np.abs(np.asarray(p) - np.asarray(q)).sum() / 2)


def sampling_floor(distribution: ArrayLike, samples: int) -> float:
    """Expected total variation between a distribution and the frequencies of so many samples of it.

    Exact: ½ Σ E|X/n - p| for binomial X, by De Moivre's formula for the mean absolute deviation,
    2 (m + 1) C(n, m + 1) p^(m + 1) (1 - p)^(n - m) with m = floor(np). For large n it is about
    ½ Σ √(2 p (1 - p) / (π n)).
    """
    total = 0.0
    for p in np.asarray(distribution, float).ravel():
        if 0.0 < p < 1.0:
            m = math.floor(samples * p)
            choose = math.lgamma(samples + 1) - math.lgamma(m + 2) - math.lgamma(samples - m)
            powers = (m + 1) * math.log(p) + (samples - m) * math.log1p(-p)
            total += math.exp(math.log(2 * (m + 1)) + choose + powers) / samples
    return total / 2


def forecast_quality(grid: Grid, traces: Sequence[ForecastTrace]) -> dict[str, Any]:
    """What an evaluation says about forecasts.

    `positions` are after 0, … tokens, each with `ece`, `brier` (beside that of the base rate) and `auc` of
    the expected reward against the outcome, `length_mae` in tokens beside that of the best constant, and,
    over all rollouts that are still being written, the total variation of the mean forecast from what came.
    `end` has the first four for the last position of every rollout. `joint` is for the forecast before the
    first token: its total variation from the outcomes of the same problem, and the floor of that.
    """
    if not traces:
        return {"rollouts": 0}
    cells = [_final_reward_bin(grid, trace) for trace in traces]
    last = np.quantile([trace.tokens - 1 for trace in traces], 0.9)
    places = sorted(set(np.linspace(0, last, POSITIONS).round().astype(int).tolist()))
    ends = np.stack([trace.joint[-1] for trace in traces])
    return {
        "rollouts": len(traces),
        "correct": float(np.mean([trace.correct for trace in traces])),
        "positions": [_at(grid, traces, cells, place) for place in places],
        "end": _reward_quality(grid, ends, [trace.correct for trace in traces]),
        "joint": _joint_at_start(grid, traces, cells),
    }


def _final_reward_bin(grid: Grid, trace: ForecastTrace) -> int:
    """The reward that came: right or wrong on a grid of two levels, else the model's own value of its answer
    at the last position, which is what such a head is trained on.
    """
    if grid.reward_bins == 2:
        return int(grid.reward_bin(float(trace.correct)))
    return int(grid.reward_bin(expected_reward(grid, trace.joint[-1])))


def _at(
    grid: Grid, traces: Sequence[ForecastTrace], rewards: Sequence[int], place: int
) -> dict[str, float | None]:
    """Quality of the forecasts after so many tokens."""
    running = [number for number, trace in enumerate(traces) if trace.tokens > place]
    joint = np.stack([traces[number].joint[place] for number in running])
    left = np.array([traces[number].tokens - 1 - place for number in running], dtype=float)
    came = np.zeros((grid.reward_bins, grid.length_bins))
    reward_bins = np.array([rewards[number] for number in running])
    np.add.at(came, (reward_bins, grid.length_bin(left)), 1 / len(running))
    return {
        "tokens": place,
        "rollouts": len(running),
        **_reward_quality(grid, joint, [traces[number].correct for number in running]),
        "length_mae": float(np.abs(expected_length(grid, joint) - left).mean()),
        "length_mae_of_constant": float(np.abs(np.median(left) - left).mean()),
        "tv": total_variation(joint.mean(0), came),
        "tv_floor": sampling_floor(joint.mean(0), len(running)),
    }


def _reward_quality(grid: Grid, joint: Array, correct: Sequence[bool]) -> dict[str, float | None]:
    value = expected_reward(grid, joint)
    quality, share = ranking_quality(value, correct), float(np.mean(correct))
    return {
        "ece": calibration_error(value, correct),
        "brier": brier_score(value, correct),
        "brier_of_constant": share * (1 - share),
        "auc": None if math.isnan(quality) else quality,
    }


def _joint_at_start(grid: Grid, traces: Sequence[ForecastTrace], rewards: Sequence[int]) -> dict[str, float]:
    """Mean over problems of the total variation between the forecast before the first token and what came."""
    problems: dict[str, list[int]] = {}
    for number, trace in enumerate(traces):
        problems.setdefault(trace.problem, []).append(number)
    variations, floors, rollouts = [], [], []
    for numbers in problems.values():
        came = np.zeros((grid.reward_bins, grid.length_bins))
        for number in numbers:
            came[rewards[number], grid.length_bin(traces[number].tokens - 1)] += 1 / len(numbers)
        foreseen = traces[numbers[0]].joint[0]
        variations.append(total_variation(foreseen, came))
        floors.append(sampling_floor(foreseen, len(numbers)))
        rollouts.append(len(numbers))
    return {
        "problems": len(problems),
        "rollouts_per_problem": float(np.mean(rollouts)),
        "tv": float(np.mean(variations)),
        "tv_floor": float(np.mean(floors)),
    }
