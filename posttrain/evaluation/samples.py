"""From the rows of an evaluation to one value per problem and metric."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from posttrain.data.answers import extract_answer
from posttrain.evaluation.metrics import Values, majority_at_k_values, mean_values, pass_at_k_values

GREEDY_ROLE = "greedy"
"""Role of the one completion of a problem at temperature 0; every other role is a sample."""


@dataclass
class Problem:
    """What is known about one problem: a list entry per sample, and the greedy completion's outcome.

    `correct[i]` is None where sample i is unscored; `votes[i]` is its final answer, None
    without one. `greedy` is None when it is unscored or was not asked for.
    """

    correct: list[bool | None] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    votes: list[str | None] = field(default_factory=list)
    greedy: bool | None = None


def group_by_problem(rows: Iterable[Mapping[str, Any]]) -> dict[str, Problem]:
    """Problems by example id, in order of first appearance.

    A row has `example_id`, `role`, `correct` (bool or None), `length` in tokens, and the `completion`, whose
    answer is its vote.
    """
    problems: dict[str, Problem] = {}
    for row in rows:
        problem = problems.setdefault(row["example_id"], Problem())
        if row["role"] == GREEDY_ROLE:
            problem.greedy = row["correct"]
            continue
        problem.correct.append(row["correct"])
        problem.lengths.append(row["length"])
        problem.votes.append(extract_answer(row["completion"]))
    return problems


def is_of_samples(metric: str) -> bool:
    """Whether a metric is one of the samples alone, which `problem_values` knows."""
    return metric in ("greedy", "mean_length") or metric.startswith(("pass@", "maj@"))


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
