"""From traces that were cut short to metrics and curves."""

from __future__ import annotations

import math

import pytest

from posttrain.evaluation.regret import token_regret
from posttrain.evaluation.thinking import Trace, thinking_curves, thinking_metrics, wanted
from posttrain.recipe.schema import EvaluateStage

EVERY = ["regret", "budget_curve", "episode_votes"]


def make_stage(metrics=EVERY, branches=8):
    return EvaluateStage(
        metrics=metrics, thinking={"budgets": [10, 40], "probes": {"branches": branches, "max_tokens": 4}}
    )


def flat(problem, tokens, success):
    return Trace(problem, tokens, success, [[value] * 4 for value in success])


TRACES = [
    flat("a", [5, 10], [0.0, 1.0]),
    flat("a", [5, 20, 30], [0.0, 0.0, 1.0]),
    flat("b", [2], [0.5]),
    Trace("c", [], [], []),
]


def test_metrics_are_means_over_traces_and_then_over_problems():
    metrics = thinking_metrics(make_stage(), TRACES)
    first = (token_regret([5, 10], [0, 1], 40) + token_regret([5, 20, 30], [0, 0, 1], 40)) / 2
    expected = (first + token_regret([2], [0.5], 40)) / 2
    assert metrics["regret@40"].value == pytest.approx(expected)
    assert (metrics["regret@40"].n, metrics["regret@40"].left_out) == (2, 1)
    assert metrics["accuracy@10"].value == pytest.approx((0.5 + 0.5) / 2)
    assert metrics["episode_regret"].value == 0.0  # equal votes never beat thinking on


def test_only_what_was_asked_for():
    assert set(thinking_metrics(make_stage(["regret"]), TRACES)) == {"regret@10", "regret@40"}
    assert set(thinking_metrics(make_stage(["pass@1", "episode_votes"], branches=4), TRACES)) == set()
    assert wanted(make_stage(["pass@1", "regret"]))
    assert not wanted(make_stage(["pass@1", "greedy"]))


def test_curves():
    curves = thinking_curves(make_stage(), TRACES)
    assert curves["tokens"][-1] == 40
    assert curves["accuracy"][-1] == pytest.approx((1 + 1 + 0.5) / 3)
    assert curves["regret"] == sorted(curves["regret"], reverse=True)
    assert curves["votes"][0] == [pytest.approx(0.5 / 3)] * 4
    assert curves["votes"][1] == [pytest.approx((1 + 0 + 0.5) / 3)] * 4
    assert thinking_curves(make_stage(), [TRACES[-1]]) == {}


def test_votes_of_more_answers_than_there_are_stay_empty():
    few = Trace("a", [1.0, 2.0], [1.0, 1.0], [[1.0, 1.0, math.nan, math.nan]] * 2)
    assert thinking_curves(make_stage(branches=2), [few])["votes"] == [[1.0, 1.0, None, None]] * 2
