"""Regret and votes after episodes: the worked numbers and the properties."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain.evaluation.metrics import pass_at_k
from posttrain.evaluation.regret import accuracy_at, episode_regret, majority, token_regret

TOKENS, VALUES = [1000, 2000, 3000], [0.25, 0.5, 1.0]


@pytest.mark.parametrize(
    ("budget", "expected"), [(4096, 0.427246), (2500, 0.675), (1000, 0.875), (8192, 0.213623)]
)
def test_token_regret(budget, expected):
    assert token_regret(TOKENS, VALUES, budget) == pytest.approx(expected, abs=1e-6)


def test_token_regret_at_the_ends():
    assert token_regret([1e-9], [1.0], 4096) == pytest.approx(0.0, abs=1e-6)
    assert token_regret(TOKENS, [0.0, 0.0, 0.0], 4096) == 1.0
    assert token_regret([5000], [1.0], 4096) == pytest.approx(1 - 0.5 * 4096 / 5000)


def test_token_regret_falls_when_any_value_rises():
    rng = np.random.default_rng(0)
    for _ in range(50):
        tokens = np.sort(rng.uniform(1, 5000, 6))
        values = rng.random(6)
        before = token_regret(tokens, values, 4096)
        assert 0 <= before <= 1
        place = rng.integers(6)
        values[place] += (1 - values[place]) * rng.random()
        assert token_regret(tokens, values, 4096) <= before + 1e-12


def test_accuracy_at_budgets():
    found = accuracy_at(TOKENS, VALUES, [0, 500, 1000, 1500, 3000, 9000])
    np.testing.assert_allclose(found, [0, 0.125, 0.25, 0.375, 1.0, 1.0])


def test_regret_is_one_minus_the_mean_of_the_curve():
    budgets = np.linspace(0, 4096, 200_001)
    mean = accuracy_at(TOKENS, VALUES, budgets).mean()
    assert token_regret(TOKENS, VALUES, 4096) == pytest.approx(1 - mean, abs=1e-4)


def test_episode_regret():
    assert episode_regret([[0.4, 0.5, 0.6, 0.8], [0.5, 0, 0, 0]]) == pytest.approx(0.6 / 2.85)
    assert episode_regret([[0.4, 0.42, 0.45, 0.47], [0.9, 0, 0, 0]]) == pytest.approx(0.0)
    assert np.isnan(episode_regret([[0, 0, 0, 0], [0, 0, 0, 0]]))


def test_majority_over_all_subsets():
    answers, correct = ["a", "a", "b", None], [True, True, False, False]
    assert majority(answers, [1] * 4, correct, 1) == 0.5
    # Of the six pairs: aa right; ab twice a tie; a with nothing twice right; b with nothing wrong.
    assert majority(answers, [1] * 4, correct, 2) == pytest.approx((1 + 2 * 0.5 + 2) / 6)
    assert majority(answers, [1] * 4, correct, 4) == 1.0
    assert majority(answers, [0.4, 0.4, 1.0, 1.0], correct, 4) == 0.0
    assert majority([None, None], [1, 1], [False, False], 2) == 0.0


def test_pass_at_k():
    assert pass_at_k(8, 2, 1) == pytest.approx(0.25)
    assert pass_at_k(8, 2, 4) == pytest.approx(0.785714, abs=1e-6)
    assert pass_at_k(32, 1, 8) == pytest.approx(0.25)
