"""How well tokens and episodes of thinking are spent: pure functions.

A trace has points (tokens, J): if it had to answer after so many tokens of thinking and answer, it would be
right with probability J. Measures of Qu et al. 2025, "Optimizing test-time compute via meta reinforcement
fine-tuning" (arXiv:2503.07572), figures 3 and 9 and appendix E. Two different things are called regret
there; `token_regret` is the main one.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

VOTES = (1, 2, 4, 8)
"""Answers that vote together after an episode."""
_VOTE_PLACES = (1.0, 2.0, 4.0, 6.0)


def accuracy_at(tokens: ArrayLike, values: ArrayLike, budgets: ArrayLike) -> Floats:
    """J at budgets of tokens: linear between the points and from (0, 0) to the first, flat after the last."""
    places, heights = _with_origin(tokens, values)
    return np.interp(np.asarray(budgets, dtype=np.float64), places, heights)


def token_regret(tokens: ArrayLike, values: ArrayLike, budget: float) -> float:
    """1 minus the mean of J over budgets from 0 to `budget`, in [0, 1].

    The comparison is with an answer that is right from the first token on.
    """
    places, heights = _with_origin(tokens, values)
    inside = places < budget
    places = np.append(places[inside], budget)
    heights = np.append(heights[inside], accuracy_at(tokens, values, budget))
    return 1.0 - float(np.trapezoid(heights, places)) / budget


def majority(
    answers: Sequence[Hashable | None], weights: Sequence[float], correct: Sequence[bool], k: int
) -> float:
    """Expected accuracy of the answer with the most weight among k of the answers, over all subsets.

    No answer (None) cannot win. A tie of a right answer with others counts half; with no answer at all the
    vote is wrong.
    """
    subsets = list(itertools.combinations(range(len(answers)), k))
    return sum(_vote(subset, answers, weights, correct) for subset in subsets) / len(subsets)


def episode_regret(votes: ArrayLike) -> float:
    """What thinking on loses against voting, as a share of the best of both; NaN where all is 0.

    Args:
        votes: (contexts, 4) accuracy of the vote of 1, 2, 4 and 8 answers after each context. An answer more
            is charged as an episode; 5 episodes lie between two contexts.
    """
    table = np.asarray(votes, dtype=np.float64)
    lost = whole = 0.0
    for (one, two, four, eight), following in itertools.pairwise(table):
        voting = np.array([one, two, four, (four + eight) / 2])
        thinking = np.interp(_VOTE_PLACES, [_VOTE_PLACES[0], _VOTE_PLACES[-1]], [one, following[0]])
        best = np.maximum(voting, thinking)
        lost += float(np.trapezoid(best - thinking, _VOTE_PLACES))
        whole += float(np.trapezoid(best, _VOTE_PLACES))
    return lost / whole if whole else float("nan")


def _with_origin(tokens: ArrayLike, values: ArrayLike) -> tuple[Floats, Floats]:
    places, heights = np.asarray(tokens, dtype=np.float64), np.asarray(values, dtype=np.float64)
    return np.concatenate([[0.0], places]), np.concatenate([[0.0], heights])


def _vote(
    subset: Sequence[int],
    answers: Sequence[Hashable | None],
    weights: Sequence[float],
    correct: Sequence[bool],
) -> float:
    given: defaultdict[Hashable, float] = defaultdict(float)
    right: dict[Hashable, bool] = {}
    for index in subset:
        if answers[index] is not None:
            given[answers[index]] += weights[index]
            right[answers[index]] = correct[index]
    if not given:
        return 0.0
    most = max(given.values())
    winners = [right[answer] for answer, weight in given.items() if weight >= most * (1 - 1e-12)]
    return float(all(winners)) if len(winners) == 1 else 0.5 * any(winners)
