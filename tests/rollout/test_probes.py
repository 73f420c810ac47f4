"""Forced answers on the search task, where the chance of success after any beginning is known."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import make_tokenizer
from searching import BestAnswers, probes, searches

from posttrain.data.search import chance_of_success
from posttrain.recipe.schema import RewardOptions, RewardSpec
from posttrain.rewards.scorer import Scorer
from posttrain.rollout.probes import PROBE, Cut, MetaProver, success


@pytest.fixture(scope="module")
def asked():
    """The points of 20 traces, with 40 answers at each, and the prover that asked."""
    tokenizer = make_tokenizer()
    rollouts = searches(tokenizer, 20)
    with Scorer([RewardSpec(name="exact_match")], RewardOptions(workers=1)) as scorer:
        prover = MetaProver(BestAnswers(tokenizer), tokenizer, scorer.score, probes(40))
        return rollouts, prover.ask_everywhere(rollouts), prover


def test_estimates_are_the_known_chances(asked):
    rollouts, everywhere, _ = asked
    errors, known = [], []
    for rollout, points in zip(rollouts, everywhere, strict=True):
        for cut, answers in points:
            kept = rollout.completion.text[: cut.at - 1 + len("<think>")]  # the tag is one token
            chance = chance_of_success(rollout.request.example.prompt, kept)
            known.append(chance)
            errors.append(success(answers) - chance)
    assert len(known) > 150
    assert max(map(abs, errors)) < 0.35  # 40 answers: deviation at most 0.08
    assert abs(np.mean(errors)) < 0.02
    assert np.corrcoef(known, np.array(known) + errors)[0, 1] > 0.95


def test_points_lie_after_whole_episodes_and_the_last_after_the_tag(asked):
    rollouts, everywhere, _ = asked
    for rollout, points in zip(rollouts, everywhere, strict=True):
        texts = [rollout.completion.text[: cut.at - 1 + len("<think>")] for cut, _ in points[:-1]]
        assert texts[0] == "<think>"
        assert all(text.endswith(";") for text in texts[1:])
        assert [cut.forced for cut, _ in points] == [True] * (len(points) - 1) + [False]
        assert {answer.request.role for _, answers in points for answer in answers} == {PROBE}


def test_tokens_and_reuse_are_counted(asked):
    _, everywhere, prover = asked
    points = sum(map(len, everywhere))
    assert prover.tokens == 40 * points
    assert len(prover.prompts) == points
    assert 0.5 < prover.reuse() < 1


def test_without_room_there_is_no_answer(asked):
    rollouts, _, prover = asked
    prover.engine.max_model_len = 10
    try:
        assert prover.ask([Cut(rollouts[0], 8)]) == [[]]
        assert np.isnan(success([]))
    finally:
        prover.engine.max_model_len = 256
