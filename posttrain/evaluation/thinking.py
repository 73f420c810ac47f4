"""Curves of thinking that is cut short: accuracy against tokens, regret, and votes after every episode.

Also what comes of thinking that is made to go on.

Values are of every sampled trace, then means over the traces of a problem, then over problems.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from posttrain.data.answers import extract_answer
from posttrain.evaluation.continuation import Judge, forced_on, search_on
from posttrain.evaluation.metrics import Estimate, Values, estimate, majority_at_k_values
from posttrain.evaluation.regret import VOTES, Floats, accuracy_at, episode_regret, majority, token_regret
from posttrain.recipe.mrt_schema import THINKING_METRICS
from posttrain.recipe.schema import EvaluateStage
from posttrain.rollout.probes import MetaProver, Point
from posttrain.rollout.types import Rollout

CURVE_POINTS = 33
"""Budgets at which the curves for drawing are given."""
CUT_SHORT = frozenset({"regret", "budget_curve", "episode_votes", "continuation"})
"""Metrics that need answers after every episode; `continuation` compares with the last."""
MIN_TRACES = 0.1
"""Votes are shown up to the episode that this share of the traces comes to."""


@dataclass(frozen=True)
class Trace:
    """One trace: tokens, success and votes of 1, 2, 4, … answers after 0, 1, … episodes.

    Tokens are those of the thinking kept and the mean answer; the last point is after all of the thinking.
    Votes are (episodes + 1, votes); NaN where there are too few answers. `continued` is the success of forced
    answers after the stage's continuations, `chain` the ends (tokens, right) of the search without an end,
    and `vote` the trace's own answer.
    """

    problem: str
    tokens: list[float]
    success: list[float]
    votes: list[list[float]]
    continued: Sequence[float] = ()
    chain: Sequence[tuple[int, bool]] = ()
    vote: str | None = None


def wanted(stage: EvaluateStage) -> bool:
    """Whether a stage asks for any of these metrics."""
    return not set(THINKING_METRICS).isdisjoint(stage.metrics)


def trace_points(
    stage: EvaluateStage, rollouts: Sequence[Rollout], prover: MetaProver, is_right: Judge
) -> list[Trace]:
    """The points of every rollout, and what comes of it when it is made to go on, as far as asked for.

    A trace none of whose answers could be scored has none.
    """
    if CUT_SHORT.isdisjoint(stage.metrics):
        traces = [Trace(rollout.request.example.id, [], [], []) for rollout in rollouts]
    else:
        everywhere = prover.ask_everywhere(rollouts)
        traces = [
            _trace(rollout, points, is_right) for rollout, points in zip(rollouts, everywhere, strict=True)
        ]
    config = stage.thinking
    if "continuation" in stage.metrics:
        found = forced_on(rollouts, prover, config.continuation, is_right)
        traces = [replace(trace, continued=values) for trace, values in zip(traces, found, strict=True)]
    if "linearized" in stage.metrics:
        chains = search_on(rollouts, prover, config.linear, max(config.budgets), prover.score, is_right)
        traces = [
            replace(trace, chain=chain, vote=extract_answer(rollout.completion.text))
            for trace, chain, rollout in zip(traces, chains, rollouts, strict=True)
        ]
    return traces


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
    """The metrics that a stage asks for.

    regret          `regret@C`, for every budget C
    budget_curve    `accuracy@C`
    episode_votes   `episode_regret`
    continuation    `continued@+S%`, for every share S; `continued@+0%` is where the thinking ended by itself
    linearized      `linear@C`, of the search without an end, and `parallel@C`, of the majority among as many
                    whole samples as fit
    """
    measures: dict[str, Callable[[Trace], float]] = {}
    for budget in stage.thinking.budgets:
        if "regret" in stage.metrics:
            measures[f"regret@{budget}"] = partial(_regret, budget)
        if "budget_curve" in stage.metrics:
            measures[f"accuracy@{budget}"] = partial(_accuracy, budget)
        if "linearized" in stage.metrics:
            measures[f"linear@{budget}"] = partial(_linear, budget)
    if "episode_votes" in stage.metrics and stage.thinking.probes.branches >= max(VOTES):
        measures["episode_regret"] = lambda trace: episode_regret(trace.votes) if trace.votes else math.nan
    if "continuation" in stage.metrics:
        measures["continued@+0%"] = lambda trace: trace.success[-1] if trace.success else math.nan
        for place, share in enumerate(stage.thinking.continuation.shares):
            measures[f"continued@+{100 * share:g}%"] = partial(_continued, place)
    values = {name: _by_problem(traces, measure) for name, measure in measures.items()}
    if "linearized" in stage.metrics:
        values |= {f"parallel@{budget}": _parallel(budget, traces) for budget in stage.thinking.budgets}
    return {name: estimate(found, stage.confidence) for name, found in values.items()}


def _continued(place: int, trace: Trace) -> float:
    return trace.continued[place]


def _linear(budget: float, trace: Trace) -> float:
    """The newest answer within a budget; before the first it is wrong."""
    if not trace.chain:
        return math.nan
    within = [right for tokens, right in trace.chain if tokens <= budget]
    return float(within[-1]) if within else 0.0


def _parallel(budget: float, traces: Sequence[Trace]) -> Values:
    """maj@k of each problem with the k whole samples that fit into a budget; wrong where none does."""
    problems: dict[str, list[Trace]] = {}
    for trace in traces:
        problems.setdefault(trace.problem, []).extend([trace] if trace.chain else [])
    values = []
    for own in problems.values():
        length = sum(trace.chain[0][0] for trace in own) / len(own) if own else math.inf
        k = min(int(budget // length), len(own))
        votes, right = [trace.vote for trace in own], [trace.chain[0][1] for trace in own]
        values.append(majority_at_k_values([votes], [right], k)[0] if k else 0.0 if own else math.nan)
    return np.array(values, dtype=np.float64)


def _regret(budget: float, trace: Trace) -> float:
    return token_regret(trace.tokens, trace.success, budget) if trace.tokens else math.nan


def _accuracy(budget: float, trace: Trace) -> float:
    return float(accuracy_at(trace.tokens, trace.success, budget)) if trace.tokens else math.nan


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
        values.setdefault(trace.problem, []).append(measure(trace))
    means: Mapping[str, float] = {
        problem: float(np.mean(known)) if (known := [v for v in found if not math.isnan(v)]) else math.nan
        for problem, found in values.items()
    }
    return np.array([*means.values()], dtype=np.float64)
