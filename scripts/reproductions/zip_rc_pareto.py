"""ZIP-RC's controller with an exact predictor: samples whose forecasts are known, nothing is trained.

A problem takes 2, 4, 8 or 12 steps of 8 tokens. Each step may go wrong for good, unseen, with a chance that
grows with the number of steps; each shows a noisy hint whether all is well, and a sample's value is the
probability of that given the hints (Bayes). Now and then a sample loops for some steps. Forecasts are
frequencies over many simulated samples with the same steps done, value and loop. What is tested is the
decisions alone.

`pareto_claims` turns tables of metric `pareto`, from here or from a trained model, into claims.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from reproductions.common import claim

from posttrain.evaluation.metrics import bootstrap_interval
from posttrain.evaluation.pareto import BEST_OF, MAJORITY, Tape, measure_pareto
from posttrain.recipe.pareto_schema import ParetoConfig
from posttrain.zip_rc.grid import VALUES, Grid
from posttrain.zip_rc.utility import Floats

SEEDS = (0, 1, 2)
SAMPLES, TOKENS, WRONG_ANSWERS = 8, 8, 4
STEPS = {2: 0.03, 4: 0.06, 8: 0.10, 12: 0.14}
"""Chance of an error at a step, by number of steps."""
LOOP, LOOP_TICKS, HINT, TICKS = 0.04, 6.0, 0.6, 60
GRID = Grid(first_id=0, reward_values=VALUES, length_edges=(0, 8, 16, 32, 48, 64, 96, 128, 256))
VALUE_EDGES = np.array([0.05, 0.15, 0.3, 0.45, 0.6, 0.75, 0.85, 0.95])
COLUMNS = ("accuracy", "compute", "latency")
BY_PROBLEM = "95 %, bootstrap over the problems of all seeds"
"""What kind an interval is where differences are by problem."""
ACCURACY_MARGIN = 0.02
"""What is not worse is not worse by more than this, up to chance."""
COMPUTE_MARGIN = 0.02
"""A setting that keeps to a budget on the problems it is chosen on may cost so much more on the others."""
CONFIG = ParetoConfig(interval=TOKENS, betas=[0.003, 0.01, 0.03, 0.1, 0.2])


@dataclass(frozen=True)
class Simulated:
    """Samples of problems with the same number of steps, M of them, tick by tick.

    `done`, `value` and `loop` (M, T) are what can be seen before tick t; `ticks` (M,) is how many there were;
    `final` (M,) is the value at the end; `right` (M,) whether the answer is.
    """

    done: NDArray[np.int64]
    value: Floats
    loop: NDArray[np.bool_]
    ticks: NDArray[np.int64]
    final: Floats
    right: NDArray[np.bool_]


def simulate(steps: int, count: int, rng: np.random.Generator) -> Simulated:
    """Draw `count` samples of a problem."""
    error = STEPS[steps]
    right, value = np.ones(count, bool), np.ones(count)
    done, loop, ticks = np.zeros(count, int), np.zeros(count, int), np.full(count, TICKS)
    seen: list[tuple[Any, ...]] = []
    for tick in range(TICKS):
        active = ticks == TICKS
        if not active.any():
            break
        seen.append((done.copy(), value.copy(), loop > 0))
        starts = active & (loop == 0) & (rng.random(count) < LOOP)
        loop[starts] = 1 + rng.geometric(1 / LOOP_TICKS, starts.sum())
        looping = active & (loop > 0)
        loop[looping] -= 1
        stepping = active & ~looping
        right &= ~(stepping & (rng.random(count) < error))
        done[stepping] += 1
        hint = rng.normal(np.where(right, HINT, -HINT), 1.0)
        prior = value * (1 - error)
        odds = prior * np.exp(2 * HINT * hint)
        value = np.where(stepping, odds / (odds + 1 - prior), value)
        ticks[stepping & (done >= steps)] = tick + 1
    columns = [np.stack(column, axis=1) for column in zip(*seen, strict=True)]
    return Simulated(columns[0], columns[1], columns[2], ticks, value, right)


class Forecasts:
    """Joint forecasts (steps + 1, value bins, loop, R, L) of what can be seen, from `count` samples."""

    def __init__(self, steps: int, count: int) -> None:
        drawn = simulate(steps, count, np.random.default_rng(77 + steps))
        counts = np.zeros((steps + 1, len(VALUE_EDGES) + 1, 2, GRID.reward_bins, GRID.length_bins))
        rewards = GRID.reward_bin(drawn.final)
        for tick in range(drawn.done.shape[1]):
            active = drawn.ticks > tick
            lengths = GRID.length_bin((drawn.ticks[active] - tick) * TOKENS)
            seen = self._seen(drawn.done[active, tick], drawn.value[active, tick], drawn.loop[active, tick])
            np.add.at(counts, (*seen, rewards[active], lengths), 1)
        mass = counts.sum((-1, -2), keepdims=True)
        whole = counts.sum(1, keepdims=True)
        whole = whole / np.maximum(whole.sum((-1, -2), keepdims=True), 1)
        self.joints = np.where(mass > 20, counts / np.maximum(mass, 1), whole)

    def __call__(self, done: Any, value: Any, loop: Any) -> Floats:
        """Forecasts (C, R, L)."""
        return self.joints[self._seen(done, value, loop)]

    def _seen(self, done: Any, value: Any, loop: Any) -> tuple[Any, ...]:
        return done, np.searchsorted(VALUE_EDGES, value, side="right"), np.asarray(loop, int)


def finished_joint(value: float) -> Floats:
    """A forecast (R, L) with exactly this expected reward and nothing left, on the two bins around it."""
    joint = np.zeros((GRID.reward_bins, GRID.length_bins))
    above = int(np.clip(np.searchsorted(GRID.rewards, value), 1, GRID.reward_bins - 1))
    low, high = GRID.rewards[above - 1 : above + 1]
    joint[above - 1, 0], joint[above, 0] = (high - value) / (high - low), (value - low) / (high - low)
    return joint


def problem(steps: int, forecasts: Forecasts, rng: np.random.Generator) -> list[Tape]:
    """The samples of a problem, with forecasts after 1, 8, 16, … tokens."""
    drawn = simulate(steps, SAMPLES, rng)
    answers = np.where(drawn.right, 0, 1 + rng.integers(0, WRONG_ANSWERS, SAMPLES))
    tapes = []
    for index, ticks in enumerate(drawn.ticks):
        seen = (column[index, :ticks] for column in (drawn.done, drawn.value, drawn.loop))
        readings = np.concatenate([forecasts(*seen), finished_joint(float(drawn.final[index]))[None]])
        positions = np.array([1, *(TOKENS * tick for tick in range(1, ticks + 1))])
        tapes.append(Tape(positions, readings, "stop", int(answers[index]), bool(drawn.right[index])))
    return tapes


def table(seed: int, problems: int, config: ParetoConfig = CONFIG, predictor: int = 20_000) -> dict[str, Any]:
    """Metric `pareto` of simulated problems, as many of each number of steps; by problem."""
    forecasts = {steps: Forecasts(steps, predictor) for steps in STEPS}
    rng = np.random.default_rng(seed)
    kinds = [list(STEPS)[place % len(STEPS)] for place in range(problems)]
    tapes = {str(place): problem(steps, forecasts[steps], rng) for place, steps in enumerate(kinds)}
    levels = {str(place): float(steps) for place, steps in enumerate(kinds)}
    return measure_pareto(tapes, GRID, config, SAMPLES, levels).table()


def measure(seeds: Sequence[int], fast: bool) -> dict[str, Any]:
    """See `reproductions.common`."""
    config = CONFIG.model_copy(update={"betas": [0.03], "alphas": [1.0]}) if fast else CONFIG
    tables = [table(seed, 16 if fast else 240, config, 2_000 if fast else 20_000) for seed in seeds]
    return {"arms": pareto_arms(tables), "claims": pareto_claims(tables)}


def pareto_arms(tables: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy, compute and latency of every setting: means over problems and seeds, and range over seeds."""
    arms = {}
    for place, point in enumerate(tables[0]["points"]):
        arm = arms[f"{point['family']}, {point['setting']}"] = {}
        for name in ("accuracy", "compute", "latency"):
            values = [float(np.mean(found["points"][place][name])) for found in tables]
            arm[name] = [round(x, 4) for x in (statistics.mean(values), min(values), max(values))]
    return arms


def pareto_claims(tables: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The issue's claims from tables of metric `pareto` (`Pareto.table`), one for each seed.

    Settings of the utility are chosen on one half of the problems and measured on the other, both ways round.
    """
    size = tables[0]["samples"]
    chosen = [at_best_of(found) for found in tables]
    ratios, differences, latencies = zip(*chosen, strict=True)
    reached = not_worse(f"accuracy there, minus that of best of {size}", differences)
    fixed = [
        _points(found, BEST_OF)[-1]["accuracy"] - _points(found, MAJORITY)[-1]["accuracy"] for found in tables
    ]
    claims = [
        claim(
            f"compute at the accuracy of best of {size}, share of its",
            "<= 0.7",
            ratios,
            statistics.mean(ratios) <= 0.7 and reached["holds"],
            why=None if reached["holds"] else "that accuracy is not reached",
        ),
        reached,
        claim(
            f"latency there, share of that of best of {size}",
            "<= 1",
            latencies,
            statistics.mean(latencies) <= 1,
        ),
        better(f"accuracy of best of {size} by value, minus that of a majority vote of {size}", fixed),
    ]
    for votes in (2, 4, 8):
        if votes <= size:
            gains, shares = zip(*(at_votes(found, votes) for found in tables), strict=True)
            share = statistics.mean(shares)
            affordable = share <= 1 + COMPUTE_MARGIN
            claims.append(
                claim(
                    f"accuracy over majority vote with N = {votes} at no more compute, relative",
                    ">= 0.12",
                    gains,
                    statistics.mean(gains) >= 0.12 and affordable,
                    why=None if affordable else f"no setting is so cheap: {share:.2f} of the vote's compute",
                )
            )
    growth = [effort_ratio(found) for found in tables]
    name = "compute of the utility, hardest third of problems over easiest"
    return [*claims, claim(name, "> 1 in every seed", growth, min(growth) > 1)]


def not_worse(name: str, differences: Sequence[Floats]) -> dict[str, Any]:
    """The claim that differences in accuracy, by problem and one array for each seed, are no loss to speak
    of.
    """
    return _over_problems(name, f"interval above {-ACCURACY_MARGIN}", differences, -ACCURACY_MARGIN)


def better(name: str, differences: Sequence[Floats]) -> dict[str, Any]:
    """The claim that differences in accuracy, by problem and one array for each seed, are above 0."""
    return _over_problems(name, "interval above 0", differences, 0.0)


def _over_problems(name: str, goal: str, differences: Sequence[Floats], above: float) -> dict[str, Any]:
    low, high = bootstrap_interval(np.concatenate(differences), 0.95, seed=0)
    means = [float(found.mean()) for found in differences]
    made = claim(name, goal, means, low > above, interval=(low, high))
    return {**made, "interval_kind": BY_PROBLEM}


def at_best_of(found: dict[str, Any]) -> tuple[float, Floats, float]:
    """The cheapest setting as accurate as best of all samples: share of its compute, differences in accuracy
    by problem, share of its latency.
    """
    best = _points(found, BEST_OF)[-1]
    parts, differences = [], []
    for choose, test in _halves(found):
        target = best["accuracy"][choose].mean()
        settings = _points(found, "utility")
        able = [point for point in settings if point["accuracy"][choose].mean() >= target]
        if able:
            picked = min(able, key=lambda point: point["compute"][choose].mean())
        else:
            picked = max(settings, key=lambda point: point["accuracy"][choose].mean())
        differences.append((picked["accuracy"] - best["accuracy"])[test])
        parts.append([(picked[name][test].sum(), best[name][test].sum()) for name in ("compute", "latency")])
    compute, latency = np.sum(parts, axis=0)
    return float(compute[0] / compute[1]), np.concatenate(differences), float(latency[0] / latency[1])


def at_votes(found: dict[str, Any], votes: int) -> tuple[float, float]:
    """Relative gain in accuracy of the best setting that takes no more compute than a majority vote of N, and
    what it took as a share of the vote's. If all take more, it is the cheapest's.
    """
    majority = next(point for point in _points(found, MAJORITY) if point["setting"] == f"N = {votes}")
    ours, theirs = np.zeros(2), np.zeros(2)
    for choose, test in _halves(found):
        limit = majority["compute"][choose].mean()
        settings = _points(found, "utility")
        able = [point for point in settings if point["compute"][choose].mean() <= limit]
        if able:
            picked = max(able, key=lambda point: point["accuracy"][choose].mean())
        else:
            picked = min(settings, key=lambda point: point["compute"][choose].mean())
        ours += [picked[name][test].sum() for name in ("accuracy", "compute")]
        theirs += [majority[name][test].sum() for name in ("accuracy", "compute")]
    accuracy, compute = ours / theirs
    return float(accuracy - 1), float(compute)


def effort_ratio(found: dict[str, Any]) -> float:
    """Compute on the hardest third of the problems over that on the easiest: the last share of compute, its
    middle price.
    """
    settings = _points(found, "utility")
    last = [point for point in settings if point["family"] == settings[-1]["family"]]
    compute, difficulty = last[len(last) // 2]["compute"], np.array(found["difficulty"])
    easy, hard = np.quantile(difficulty, [1 / 3, 2 / 3])
    return float(compute[difficulty >= hard].mean() / compute[difficulty <= easy].mean())


def _points(found: dict[str, Any], family: str) -> list[dict[str, Any]]:
    """The settings of the families that begin so, their columns as arrays."""
    return [
        {**point, **{name: np.array(point[name], float) for name in COLUMNS}}
        for point in found["points"]
        if point["family"].startswith(family)
    ]


def _halves(found: dict[str, Any]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    order = np.random.default_rng(0).permutation(len(found["problems"]))
    first, second = order[::2], order[1::2]
    return [(first, second), (second, first)]
