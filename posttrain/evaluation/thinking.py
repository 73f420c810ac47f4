"""Curves of thinking that is cut short: accuracy against tokens, regret, and votes after every episode.

Values are of every sampled trace, then means over the traces of a problem, then over problems.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from posttrain.data.answers import extract_answer
from posttrain.evaluation.metrics import Estimate, Values, estimate
from posttrain.evaluation.regret import VOTES, Floats, accuracy_at, episode_regret, majority, token_regret
from posttrain.recipe.mrt_schema import THINKING_METRICS
from posttrain.recipe.schema import EvaluateStage
from posttrain.rollout.probes import MetaProver, Point
from posttrain.rollout.types import Rollout

CURVE_POINTS = 33
"""Budgets at which the curves for drawing are given."""
MIN_TRACES = 0.1
"""Votes are shown up to the episode that this share of the traces comes to."""


@dataclass(frozen=True)
class Trace:
    """One trace: tokens, success and votes of 1, 2, 4, … answers after 0, 1, … episodes.

    Tokens are those of the thinking kept and the mean answer; the last point is after all of the thinking.
    Votes are (episodes + 1, votes); NaN where there are too few answers.
    """

    problem: str
    tokens: list[float]
    success: list[float]
    votes: list[list[float]]


def wanted(stage: EvaluateStage) -> bool:
    """Whether a stage asks for any of these metrics."""
    return not set(THINKING_METRICS).isdisjoint(stage.metrics)


def trace_points(
    rollouts: Sequence[Rollout], prover: MetaProver, is_right: Callable[[Rollout], bool | None]
) -> list[Trace]:
    """The points of every rollout; one none of whose answers could be scored is left out."""
    everywhere = prover.ask_everywhere(rollouts)
    return [_trace(rollout, points, is_right) for rollout, points in zip(rollouts, everywhere, strict=True)]


def _trace(
    rollout: Rollout,
    points: Iterable[Point],
    is_right: Callable[[Rollout], bool | None],
) -> Trace:
    trace = Trace(rollout.request.example.id, [], [], [])
    for cut, answers in points:
        outcomes = [(answer, right) for answer in answers if (right := is_right(answer)) is not None]
        if not outcomes:
            continue
        lengths = [len(answer.completion.token_ids) for answer, _ in outcomes]
        correct = [right for _, right in outcomes]
        voices = [extract_answer(answer.completion.text) for answer, _ in outcomes]
        weights = [2.0 ** float(np.mean(answer.completion.logprobs)) for answer, _ in outcomes]
        trace.tokens.append(cut.at + sum(lengths) / len(lengths))
        trace.success.append(sum(correct) / len(correct))
        trace.votes.append(
            [majority(voices, weights, correct, k) if k <= len(correct) else math.nan for k in VOTES]
        )
    return trace


def thinking_metrics(stage: EvaluateStage, traces: Sequence[Trace]) -> dict[str, Estimate]:
    """`regret@C` and `accuracy@C` at the stage's budgets, and `episode_regret`, as far as asked for."""
    measures: dict[str, Callable[[Trace], float]] = {}
    for budget in stage.thinking.budgets:
        if "regret" in stage.metrics:
            measures[f"regret@{budget}"] = partial(_regret, budget)
        if "budget_curve" in stage.metrics:
            measures[f"accuracy@{budget}"] = partial(_accuracy, budget)
    if "episode_votes" in stage.metrics and stage.thinking.probes.branches >= max(VOTES):
        measures["episode_regret"] = lambda trace: episode_regret(trace.votes)
    return {
        name: estimate(_by_problem(traces, measure), stage.confidence) for name, measure in measures.items()
    }


def _regret(budget: float, trace: Trace) -> float:
    return token_regret(trace.tokens, trace.success, budget)


def _accuracy(budget: float, trace: Trace) -> float:
    return float(accuracy_at(trace.tokens, trace.success, budget))


def thinking_curves(stage: EvaluateStage, traces: Sequence[Trace]) -> dict[str, Any]:
    """What the report draws: `tokens`, `accuracy` and `regret`, and the `votes` after each episode."""
    longest = max(stage.thinking.budgets)
    budgets = np.unique(np.linspace(0, longest, CURVE_POINTS).round())[1:]
    kept = [trace for trace in traces if trace.tokens]
    if not kept:
        return {}
    accuracy = np.mean([accuracy_at(t.tokens, t.success, budgets) for t in kept], axis=0)
    regret = [float(np.mean([token_regret(t.tokens, t.success, b) for t in kept])) for b in budgets]
    return {
        "tokens": budgets.tolist(),
        "accuracy": accuracy.tolist(),
        "regret": regret,
        "episodes_per_group": stage.thinking.probes.episodes.group_size,
        "votes": [[None if math.isnan(value) else value for value in row] for row in _mean_votes(kept)],
    }


def _mean_votes(traces: Sequence[Trace]) -> list[list[float]]:
    """Means over traces after 0, 1, … episodes. A trace that ended earlier stays where it was."""
    lengths = sorted((len(trace.votes) for trace in traces), reverse=True)
    last = lengths[int(MIN_TRACES * (len(lengths) - 1))]
    rows: list[Floats] = [
        np.mean([trace.votes[min(place, len(trace.votes) - 1)] for trace in traces], axis=0)
        for place in range(last)
    ]
    return [row.tolist() for row in rows]


def _by_problem(traces: Sequence[Trace], measure: Callable[[Trace], float]) -> Values:
    """Mean of a measure over the traces of each problem, NaN where none has it."""
    values: dict[str, list[float]] = {}
    for trace in traces:
        found = measure(trace) if trace.tokens else math.nan
        values.setdefault(trace.problem, []).append(found)
    means: Mapping[str, float] = {
        problem: float(np.mean(known)) if (known := [v for v in found if not math.isnan(v)]) else math.nan
        for problem, found in values.items()
    }
    return np.array([*means.values()], dtype=np.float64)
