"""Accuracy against compute and latency: ways to spend several samples of a problem, played on recorded ones.

Every problem has n samples that were generated to their ends, with the forecasts on the way. A sample's
tokens do not depend on when it was paused, so that what a policy would have made of them can be read off
without generating again, and all policies are compared on the same samples.

Compute is tokens over all samples, latency tokens one after another; both in units of the problem's mean
sample.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.data.answers import extract_answer
from posttrain.errors import DataError
from posttrain.evaluation.metrics import Estimate, Values, estimate, majority_at_k_values
from posttrain.recipe.pareto_schema import ParetoConfig
from posttrain.rollout.types import Example, FinishReason, Rollout
from posttrain.zip_rc.controller import (
    Chunk,
    Controller,
    EarlyStopPolicy,
    Policy,
    ThresholdPolicy,
    UtilityPolicy,
    weighted_vote,
)
from posttrain.zip_rc.grid import Grid, expected_reward
from posttrain.zip_rc.utility import Floats

MAJORITY = "majority vote"
BEST_OF = "best of N"
THRESHOLD = "threshold pruning"
EARLY_STOP = "early stop"
MAX_SUBSETS = 256
"""Subsets of the samples over which a fixed number of them is averaged; of more, so many are drawn."""


def utility_family(alpha: float) -> str:
    """Name of the sweep of prices at one share of compute."""
    return f"utility, α = {alpha:g}"


@dataclass(frozen=True)
class Tape:
    """A sample that was generated to its end, as a controller meets it.

    Attributes:
        positions: tokens of the sample at each reading (C,), ascending; the last is its length.
        readings: forecasts (C, R, L) at the last of these tokens.
        ended: whether it stopped or ran into its cap.
        answer: for the vote; None gives none.
        correct: None where it could not be scored.
    """

    positions: NDArray[np.int64]
    readings: Floats
    ended: FinishReason
    answer: Hashable | None
    correct: bool | None

    @property
    def tokens(self) -> int:
        """Its length."""
        return int(self.positions[-1])

    def chunk(self, begun: int, tokens: int) -> Chunk:
        """What it is extended by, `tokens` at most, when it has `begun` tokens."""
        end = min(begun + tokens, self.tokens)
        joint = self.readings[np.searchsorted(self.positions, end)]
        if end < self.tokens:
            return Chunk(end - begun, joint)
        return Chunk(end - begun, joint, self.ended, self.answer)


def reading_positions(tokens: int, interval: int) -> NDArray[np.int64]:
    """Tokens after which a controller may read a sample of `tokens`: 1, the interval's multiples, the end."""
    return np.unique([1, *range(interval, tokens, interval), tokens])


@dataclass(frozen=True)
class Outcome:
    """What a policy made of a problem: tokens of all samples, tokens one after another."""

    correct: float
    tokens: float
    latency: float


def replay(policy: Policy, tapes: Sequence[Tape], grid: Grid, interval: int) -> Outcome:
    """Play a policy on the samples of a problem."""
    cap = max(tape.tokens for tape in tapes)
    controller = Controller(grid, policy, samples=len(tapes), cap=cap, interval=interval)
    while chosen := controller.next():
        controller.record(
            {
                index: tapes[index].chunk(controller.samples[index].tokens, tokens)
                for index, tokens in chosen.items()
            }
        )
    return Outcome(float(bool(tapes[controller.best()].correct)), controller.tokens, controller.latency)


def best_of(tapes: Sequence[Tape], grid: Grid, size: int, rng: np.random.Generator) -> Outcome:
    """Weighted best-of-N by value among `size` samples, all run to their ends; the mean over subsets."""
    values = expected_reward(grid, np.stack([tape.readings[-1] for tape in tapes]))
    outcomes = []
    for subset in _subsets(len(tapes), size, rng):
        able = [i for i in subset if tapes[i].ended == "stop"] or list(subset)
        best = able[weighted_vote([values[i] for i in able], [tapes[i].answer for i in able])]
        lengths = [tapes[i].tokens for i in subset]
        outcomes.append((float(bool(tapes[best].correct)), sum(lengths), max(lengths)))
    return Outcome(*np.mean(outcomes, axis=0).tolist())


def _subsets(count: int, size: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    every = list(itertools.islice(itertools.combinations(range(count), size), MAX_SUBSETS + 1))
    if len(every) <= MAX_SUBSETS:
        return every
    return [tuple(rng.choice(count, size, replace=False).tolist()) for _ in range(MAX_SUBSETS)]


@dataclass(frozen=True)
class Point:
    """One setting of a way to spend samples: a value per problem, compute and latency in mean samples."""

    family: str
    setting: str
    accuracy: Values
    compute: Values
    latency: Values

    def means(self, confidence: float) -> dict[str, Any]:
        """For the summary and the report."""
        accuracy: Estimate = estimate(self.accuracy, confidence)
        return {
            "family": self.family,
            "setting": self.setting,
            "accuracy": accuracy.to_dict(),
            "compute": float(self.compute.mean()),
            "latency": float(self.latency.mean()),
        }


@dataclass(frozen=True)
class Pareto:
    """All settings on the same problems. `difficulty` ascends with how hard a problem is; `measure` says by
    what.
    """

    problems: list[str]
    difficulty: Values
    measure: str
    samples: int
    left_out: int
    points: list[Point]

    def summary(self, confidence: float) -> dict[str, Any]:
        """Means over problems, and compute by difficulty: for the run's summary. Empty without problems."""
        if not self.problems:
            return {}
        return {
            "samples": self.samples,
            "problems": len(self.problems),
            "left_out": self.left_out,
            "points": [point.means(confidence) for point in self.points],
            "effort": effort(self),
        }

    def table(self) -> dict[str, Any]:
        """Everything by problem, for files that are read again."""
        return {
            "problems": self.problems,
            "difficulty": self.difficulty.tolist(),
            "samples": self.samples,
            "points": [
                {
                    "family": point.family,
                    "setting": point.setting,
                    "accuracy": point.accuracy.tolist(),
                    "compute": point.compute.tolist(),
                    "latency": point.latency.tolist(),
                }
                for point in self.points
            ],
        }


def effort(pareto: Pareto) -> dict[str, Any]:
    """Mean compute of the middle price of each utility, by difficulty; few different difficulties, or
    quintiles.
    """
    edges = np.unique(pareto.difficulty)
    if len(edges) > 9:
        edges = np.unique(np.quantile(pareto.difficulty, [0.0, 0.2, 0.4, 0.6, 0.8]))
    bins = np.searchsorted(edges, pareto.difficulty, side="right") - 1
    present = [place for place in range(len(edges)) if (bins == place).any()]
    families: dict[str, list[Point]] = {}
    for point in pareto.points:
        if point.family.startswith("utility"):
            families.setdefault(point.family, []).append(point)
    middle = [points[len(points) // 2] for points in families.values()]
    return {
        "measure": pareto.measure,
        "difficulty": [float(pareto.difficulty[bins == place].mean()) for place in present],
        "problems": [int((bins == place).sum()) for place in present],
        "compute": {
            f"{point.family}, {point.setting}": [
                float(point.compute[bins == place].mean()) for place in present
            ]
            for point in middle
        },
    }


def measure_pareto(
    problems: Mapping[str, Sequence[Tape]],
    grid: Grid,
    config: ParetoConfig,
    samples: int,
    difficulty: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Pareto:
    """Play everything on every problem that has `samples` scored samples; the others are left out.

    Args:
        problems: their samples, by id.
        grid: of the model.
        config: of the metric.
        samples: of each problem.
        difficulty: by id; None takes the share of a problem's samples that are wrong.
        seed: for the subsets, where there are too many to look at all.
    """
    scored = {
        name: tapes
        for name, tapes in problems.items()
        if len(tapes) == samples and all(tape.correct is not None for tape in tapes)
    }
    tapes = list(scored.values())
    means = np.array([np.mean([tape.tokens for tape in group]) for group in tapes])
    rng = np.random.default_rng(seed)

    def point(family: str, setting: str, play: Callable[[Sequence[Tape]], Outcome]) -> Point:
        outcomes = [play(group) for group in tapes]
        columns = np.array([(o.correct, o.tokens, o.latency) for o in outcomes]).reshape(-1, 3)
        return Point(family, setting, columns[:, 0], columns[:, 1] / means, columns[:, 2] / means)

    points: list[Point] = []
    for size in _sizes(samples):
        fixed = point(BEST_OF, f"N = {size}", partial(best_of, grid=grid, size=size, rng=rng))
        votes = majority_at_k_values(
            [[tape.answer for tape in group] for group in tapes],
            [[tape.correct for tape in group] for group in tapes],
            size,
        )
        points += [Point(MAJORITY, fixed.setting, votes, fixed.compute, fixed.latency), fixed]
    for family, setting, policy in policies(config):
        points.append(point(family, setting, partial(replay, policy, grid=grid, interval=config.interval)))
    order = list(dict.fromkeys(point.family for point in points))
    points.sort(key=lambda point: order.index(point.family))
    wrong = {name: float(np.mean([not tape.correct for tape in group])) for name, group in scored.items()}
    levels = wrong if difficulty is None else difficulty
    return Pareto(
        problems=list(scored),
        difficulty=np.array([levels[name] for name in scored], dtype=np.float64),
        measure="share of its samples that are wrong" if difficulty is None else str(config.difficulty),
        samples=samples,
        left_out=len(problems) - len(scored),
        points=points,
    )


def policies(config: ParetoConfig) -> Iterable[tuple[str, str, Policy]]:
    """Family, setting and policy of everything that decides on the way."""
    for least in config.thresholds:
        yield THRESHOLD, f"at {least:g}", ThresholdPolicy(least)
    for enough in config.early_stops:
        yield EARLY_STOP, f"at {enough:g}", EarlyStopPolicy(enough)
    for alpha in config.alphas:
        for beta in config.betas:
            yield utility_family(alpha), f"β = {beta:g}", UtilityPolicy(alpha, beta)


def _sizes(samples: int) -> list[int]:
    """1, 2, 4, … and all of them."""
    return sorted({samples, *(2**power for power in range(samples.bit_length()) if 2**power <= samples)})


def tapes_by_problem(
    grid: Grid, rollouts: Iterable[tuple[Rollout, bool | None]], interval: int
) -> dict[str, list[Tape]]:
    """The samples of every problem, by example id, from rollouts with forecasts and their outcomes."""
    tapes: dict[str, list[Tape]] = {}
    for rollout, correct in rollouts:
        completion = rollout.completion
        if completion.scored is None:
            raise ValueError(f"rollout {rollout.id} has no forecasts")
        positions = reading_positions(len(completion.token_ids), interval)
        readings = grid.joint(completion.scored[positions - 1])
        answer = extract_answer(completion.text)
        tape = Tape(positions, readings, completion.finish_reason, answer, correct)
        tapes.setdefault(rollout.request.example.id, []).append(tape)
    return tapes


def difficulties(examples: Iterable[Example], column: str | None) -> dict[str, float] | None:
    """How hard each example is, by id, from a column; None without one.

    Raises:
        DataError: an example lacks it, or has no number in it.
    """
    if column is None:
        return None
    levels: dict[str, float] = {}
    for example in examples:
        try:
            level = float(example.columns[column])
        except (KeyError, TypeError, ValueError):
            level = math.nan
        if not math.isfinite(level):
            raise DataError(f"pareto.difficulty: example {example.id!r} has no number in column {column!r}")
        levels[example.id] = level
    return levels
