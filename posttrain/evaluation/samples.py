"""From the rows of an evaluation to its metrics: the samples of each problem, and what they say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from posttrain.evaluation.metrics import (
    Estimate,
    Values,
    estimate,
    majority_at_k_values,
    mean_values,
    pass_at_k_values,
)

GREEDY_ROLE = "greedy"
"""Role of the one completion of a problem at temperature 0; every other role is a sample."""


@dataclass
class Problem:
    """What is known about one problem: a list entry per sample, and the greedy completion's outcome.

    `correct[i]` is None where sample i is unscored; `votes[i]` is its final answer in a canonical form,
    None without one. `greedy` is None when it is unscored or was not asked for.
    """

    correct: list[bool | None] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    votes: list[str | None] = field(default_factory=list)
    greedy: bool | None = None


@dataclass(frozen=True)
class Evaluation:
    """The metrics of one evaluation and what they rest on; `unscored` counts samples without an outcome."""

    metrics: dict[str, Estimate]
    problems: int
    samples: int
    unscored: int


def group_by_problem(rows: Iterable[Mapping[str, Any]]) -> dict[str, Problem]:
    """Problems by example id, in order of first appearance.

    A row has `example_id`, `role`, `correct` (bool or None), `completion_ids` or its `length` in tokens,
    and `vote` where a majority is asked for.
    """
    problems: dict[str, Problem] = {}
    for row in rows:
        problem = problems.setdefault(row["example_id"], Problem())
        if row["role"] == GREEDY_ROLE:
            problem.greedy = row["correct"]
            continue
        problem.correct.append(row["correct"])
        problem.lengths.append(row["length"] if "length" in row else len(row["completion_ids"]))
        problem.votes.append(row.get("vote"))
    return problems


def problem_values(metric: str, problems: Sequence[Problem]) -> Values:
    """One value per problem for `pass@K`, `maj@K`, `greedy` or `mean_length` (tokens); NaN: left out.

    Lengths are those of all samples, scored or not.
    """
    kind, _, k = metric.partition("@")
    if kind == "pass":
        return pass_at_k_values([problem.correct for problem in problems], int(k))
    if kind == "maj":
        return majority_at_k_values([p.votes for p in problems], [p.correct for p in problems], int(k))
    if metric == "greedy":
        outcomes = [problem.greedy for problem in problems]
        return np.array([np.nan if outcome is None else float(outcome) for outcome in outcomes])
    if metric == "mean_length":
        return mean_values([problem.lengths for problem in problems])
    raise ValueError(f"unknown metric {metric!r}")


def evaluate_problems(
    problems: Sequence[Problem], metrics: Sequence[str], confidence: float = 0.95, seed: int = 0
) -> Evaluation:
    """Every metric with its interval over the problems."""
    return Evaluation(
        metrics={name: estimate(problem_values(name, problems), confidence, seed) for name in metrics},
        problems=len(problems),
        samples=sum(len(problem.correct) for problem in problems),
        unscored=sum(outcome is None for problem in problems for outcome in problem.correct),
    )
