"""Before and after: two evaluations of the same problems, metric by metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from posttrain.evaluation.metrics import Estimate, paired_difference
from posttrain.evaluation.samples import Problem, problem_values


@dataclass(frozen=True)
class Comparison:
    """Mean change of one metric over shared problems, and in how many of them it rose and fell."""

    difference: Estimate
    rose: int
    fell: int


def compare(
    before: Mapping[str, Problem],
    after: Mapping[str, Problem],
    metrics: Sequence[str],
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Comparison]:
    """The paired change of each metric.

    Empty unless both evaluations have exactly the same problems: a difference over the few that two sets
    happen to share would not be the difference of the two columns of a table.
    """
    if before.keys() != after.keys():
        return {}
    comparisons = {}
    for metric in metrics:
        first = problem_values(metric, list(before.values()))
        second = problem_values(metric, [after[name] for name in before])
        change = second - first
        if np.isnan(change).all():
            continue
        difference = paired_difference(first, second, confidence, seed)
        comparisons[metric] = Comparison(difference, int((change > 0).sum()), int((change < 0).sum()))
    return comparisons
