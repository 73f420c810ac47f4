"""Metric `meta` of an evaluation."""

from __future__ import annotations

import pytest

from posttrain.data.self_predictions import Prediction, write_prediction
from posttrain.evaluation.self_predictions import questions, self_assessment
from posttrain.recipe.meta_schema import MetaEvaluation, MetaFormat
from posttrain.recipe.stage_schema import EvaluateStage
from posttrain.rollout.types import Completion, Example, RolloutRequest, Sampling, make_rollouts

CONFIG = MetaEvaluation(samples=2, max_tokens=9, question=MetaFormat(system=None, template="? {problem}"))


def completion(text, length, finish_reason="stop"):
    return Completion((0,) * length, (0.0,) * length, finish_reason, text)


def test_predictions_meet_the_solutions_of_their_problem():
    problems = [Example(name, f"problem {name}", "1") for name in "abc"]
    requests = [RolloutRequest((1,), e, e.id, Sampling(32, n=2, seed=i)) for i, e in enumerate(problems)]
    asked = questions(requests, CONFIG, lambda example: tuple(map(ord, example.prompt)))
    assert [bytes(request.prompt_ids).decode() for request in asked] == [f"? problem {n}" for n in "abc"]
    assert {(r.sampling.n, r.sampling.max_tokens, r.role) for r in asked} == {(2, 9, "meta")}
    assert len({request.sampling.seed for request in [*asked, *requests]}) == 6

    solved = make_rollouts(
        requests,
        [
            [completion("carry", 4), completion("carry", 6)],
            [completion("x", 5), completion("carry", 32, "length")],
            [completion("x", 5), completion("x", 5)],
        ],
        0,
    ).rollouts
    outcomes = [True, True, False, True, None, None]  # cut: wrong whatever the reward says; c was not scored

    def said(rate, length):
        return [completion(write_prediction(Prediction(("carry",), rate, length), CONFIG.question), 9)] * 2

    told = make_rollouts(asked, [said(8, 5), said(2, 9), said(0, 1)], 0).rollouts
    found = self_assessment(list(zip(solved, outcomes, strict=True)), told, CONFIG)
    assert found["problems"] == 2
    assert found["rate_mae"] == pytest.approx((0 + 0.25) / 2)
    assert found["rate_spearman"] == pytest.approx(1)
    assert found["length_mae"] == 0  # of the one with a correct solution: 5 against the mean of 4 and 6
    assert found["in_range"] == 1
    assert found["notion_precision"] == 0.5
    assert found["bins"] == [
        {"level": 2, "problems": 1, "truth": 0.0},
        {"level": 8, "problems": 1, "truth": 1.0},
    ]


def test_the_metric_is_known():
    assert EvaluateStage(metrics=["pass@1", "meta"]).meta.samples == 8
