"""The difficulty head alone: a softmax over nine levels, trained with the real reward, advantages and gate.

The papers' curve, too confident at first, then below the truth, then along it, comes from the reward: what
all problems share learns first how many of them are never solved.
"""

from __future__ import annotations

import numpy as np
import pytest

from posttrain.data.self_predictions import Prediction
from posttrain.recipe.meta_schema import AlignmentConfig
from posttrain.training.advantages import group_advantages
from posttrain.training.self_alignment import Forecast, difficulty_reward, is_gated, spearman

LEVELS, GROUP, SOLUTIONS = 8, 8, 16
CONFIG = AlignmentConfig()


def train(zeros, steps, seed=1, rate=0.1, problems=20):
    """Mean prediction, error and rank correlation after every 20 steps, and the last predictions."""
    rng = np.random.default_rng(seed)
    truth = np.concatenate([np.zeros(zeros), np.ones(2), rng.uniform(0.15, 0.85, problems - zeros - 2)])
    shared, own = np.zeros(LEVELS + 1), np.zeros((problems, LEVELS + 1))
    shared[7:] = 1.5
    history = []
    for step in range(steps + 1):
        logits = shared + own
        policy = np.exp(logits - logits.max(1, keepdims=True))
        policy /= policy.sum(1, keepdims=True)
        mean = policy @ np.arange(LEVELS + 1) / LEVELS
        if step % 20 == 0:
            history.append((mean.mean(), np.abs(mean - truth).mean(), spearman(mean, truth)))
        seen = rng.binomial(SOLUTIONS, truth) / SOLUTIONS
        drawn = [rng.choice(LEVELS + 1, GROUP, p=row) for row in policy]
        rewards = [
            [difficulty_reward(int(d), p, LEVELS, CONFIG) for d in row]
            for row, p in zip(drawn, seen, strict=True)
        ]
        advantages = group_advantages(
            np.ravel(rewards), np.repeat(np.arange(problems), GROUP).tolist(), eps=1e-6
        ).reshape(problems, GROUP)
        gradient = -policy * advantages.sum(1, keepdims=True)
        for problem, (row, values) in enumerate(zip(drawn, advantages, strict=True)):
            np.add.at(gradient[problem], row, values)
        own += rate * gradient / GROUP
        shared += rate * gradient.sum(0) / GROUP
    forecasts = [Forecast.of([Prediction((), int(d)) for d in row], LEVELS) for row in drawn]
    return truth, np.array(history), forecasts


@pytest.fixture(scope="module")
def half_unsolvable():
    return train(zeros=10, steps=400)


def test_predictions_drop_below_the_truth_and_then_align(half_unsolvable):
    truth, history, _ = half_unsolvable
    mean, error, correlation = history.T
    assert mean[0] > truth.mean() + 0.3
    assert mean[:10].min() < truth.mean() - 0.05
    assert abs(mean[-1] - truth.mean()) < 0.03
    assert error[-1] < 0.05 < error[0]
    assert correlation[-1] > 0.9


def test_the_gate_is_right_once_predictions_are(half_unsolvable):
    truth, _, forecasts = half_unsolvable
    gated = np.array([is_gated(forecast) for forecast in forecasts])
    extreme = np.isin(truth, (0.0, 1.0))
    assert gated.sum() >= 0.6 * extreme.sum()
    assert (gated & extreme).sum() / gated.sum() >= 0.9


def test_without_many_unsolvable_problems_nothing_undershoots():
    truth, history, _ = train(zeros=4, steps=400, seed=0, rate=0.05)
    assert history[:, 0].min() > truth.mean() - 0.1
    assert history[-1, 1] < 0.06


def test_it_pays_to_name_the_likeliest_value():
    """The reward is no proper score: half right at 0 and half at 1 make 0 a better answer than one half."""
    expected = [
        np.mean([difficulty_reward(level, p, LEVELS, CONFIG) for p in (0.0, 1.0)]) for level in range(9)
    ]
    assert expected[0] == pytest.approx(0.505)
    assert expected[4] == pytest.approx(0.1)
    best = []
    for p in (0.02, 0.1, 0.5, 0.9, 0.97):
        seen = np.random.default_rng(0).binomial(16, p, 4000) / 16
        means = [np.mean([difficulty_reward(level, x, 8, CONFIG) for x in seen]) for level in range(9)]
        best.append(int(np.argmax(means)))
    assert best == [0, 1, 4, 7, 8]
