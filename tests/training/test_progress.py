"""Progress and its advantages: the worked numbers, the properties, and the baseline identity."""

from __future__ import annotations

import itertools
from typing import ClassVar

import numpy as np
import pytest

from posttrain.training.advantages import BatchStats, group_advantages
from posttrain.training.progress import (
    baseline_advantages,
    bonus_advantages,
    implicit_advantages,
    progress,
    progress_to_go,
    spread_over_tokens,
    telescoping_error,
)


def array(*values):
    return np.array(values, dtype=np.float64)


def test_progress_telescopes():
    values = [0.1, 0.1, 0.4, 0.4, 0.9]
    steps = progress(values)
    np.testing.assert_allclose(steps, [0, 0.3, 0, 0.5], atol=1e-12)
    assert steps.sum() == pytest.approx(0.8)
    assert telescoping_error(values, steps) < 1e-12
    random = np.random.default_rng(0).random(200)
    assert telescoping_error(random, progress(random)) < 1e-6
    assert (np.abs(progress(random)) <= 1).all()


def test_implicit_group():
    continued, terminated = implicit_advantages(array(1, 1), array(0, 1))
    np.testing.assert_allclose(continued, [0.5, 0.5], atol=1e-3)
    np.testing.assert_allclose(terminated, [-1.5, 0.5], atol=1e-3)
    continued, terminated = implicit_advantages(array(1, 1, 1, 0), array(0, 0, 1, 0))
    np.testing.assert_allclose(np.abs([*continued, *terminated]), 0.9352, atol=5e-5)
    assert np.sign([*continued, *terminated]).tolist() == [1, 1, 1, -1, -1, -1, 1, -1]


def test_before_the_division_the_two_halves_differ_by_the_progress():
    continued, terminated = array(1, 1, 1, 0), array(0, 0, 1, 0)
    centred = group_advantages(np.concatenate([continued, terminated]), [0] * 8, "none")
    gain = continued.mean() - terminated.mean()
    assert centred[:4].mean() == pytest.approx(gain / 2)
    assert centred[4:].mean() == pytest.approx(-gain / 2)


def test_equal_rewards_teach_the_implicit_group_nothing():
    continued, terminated = implicit_advantages(array(1, 1), array(1, 1))
    assert not np.any([continued, terminated])


def test_termination_baseline():
    np.testing.assert_allclose(baseline_advantages(array(1, 1), array(0, 1)), [0.5, 0.5])
    np.testing.assert_allclose(baseline_advantages(array(0, 0), array(1, 1)), [-1, -1])


def test_explicit():
    outcomes, after = array(1, 1, 0, 0), array(0.75, 0.25, 0.5, 0)
    before = np.full(4, 0.25)
    np.testing.assert_allclose(outcomes + after - before, [1.5, 1.0, 0.25, -0.25])
    advantages = bonus_advantages(outcomes, before, after, [0] * 4, 1.0)
    np.testing.assert_allclose(advantages, [1.1256, 0.4824, -0.4824, -1.1256], atol=5e-5)
    # Within one prefix the value before is a constant: it changes nothing.
    np.testing.assert_allclose(bonus_advantages(outcomes, 0 * before, after, [0] * 4, 1.0), advantages)
    plain = bonus_advantages(outcomes, before, after, [0] * 4, 0.0)
    np.testing.assert_allclose(plain, [0.866, 0.866, -0.866, -0.866], atol=2e-4)


def test_online():
    steps = progress([0.25, 0.25, 0.75, 1.0])
    np.testing.assert_allclose(steps, [0, 0.5, 0.25])
    np.testing.assert_allclose(progress_to_go(steps), [0.75, 0.75, 0.25])


def test_each_episode_has_its_progress_on_its_own_tokens():
    advantages = spread_over_tokens(array(0, 0.5), [(1, 3), (3, 4)], 6, BatchStats(mean=0.25, std=0.5 - 1e-4))
    np.testing.assert_allclose(advantages, [0, -0.5, -0.5, 0.5, 0, 0])


class TwoSteps:
    """A world small enough to sum over: two actions a step, two steps, and a chance of success at the end.

    Success depends on both actions. The answer forced at the prefix succeeds with a chance of its own.
    """

    SUCCESS: ClassVar = {(0, 0): 0.1, (0, 1): 0.5, (1, 0): 0.3, (1, 1): 0.9}
    FORCED = 0.4

    def __init__(self):
        self.logits = np.random.default_rng(1).normal(size=(2, 2, 2))  # step, earlier action, action

    def paths(self):
        """Every path with its probability and the gradient of its log-probability."""
        for first, second in itertools.product((0, 1), repeat=2):
            gradient, probability = np.zeros_like(self.logits), 1.0
            for step, earlier, action in ((0, 0, first), (1, first, second)):
                chances = np.exp(self.logits[step, earlier])
                chances /= chances.sum()
                probability *= chances[action]
                gradient[step, earlier] = np.eye(2)[action] - chances
            yield (first, second), probability, gradient

    def expected_gradient(self, weight):
        """Exact expectation of weight(rewards of two rollouts, rewards of two forced answers) · ∇ log p."""
        total = np.zeros_like(self.logits)
        for pair in itertools.product(list(self.paths()), repeat=2):
            for rewards in itertools.product((0.0, 1.0), repeat=2):
                for forced in itertools.product((0.0, 1.0), repeat=2):
                    chance = 1.0
                    for (path, probability, _), reward in zip(pair, rewards, strict=True):
                        success = self.SUCCESS[path]
                        chance *= probability * (success if reward else 1 - success)
                    for reward in forced:
                        chance *= self.FORCED if reward else 1 - self.FORCED
                    weights = weight(array(*rewards), array(*forced))
                    total += chance * sum(w * g for w, (_, _, g) in zip(weights, pair, strict=True)) / 2
        return total


def unscaled_implicit(continued, terminated):
    together = np.concatenate([continued, terminated])
    return (together - together.mean())[: len(continued)]


def test_two_modes_only_subtract_a_baseline():
    """The forced answer does not depend on the actions, so the expected gradient is plain REINFORCE's.

    In the implicit group a rollout's own reward is part of the mean, which scales the gradient by
    1 - 1/m; apart from that, and from the division by the deviation, the same holds.
    """
    world = TwoSteps()
    reinforce = world.expected_gradient(lambda continued, terminated: continued)
    assert np.abs(reinforce).max() > 0.01
    np.testing.assert_allclose(world.expected_gradient(baseline_advantages), reinforce, atol=1e-12)
    np.testing.assert_allclose(
        world.expected_gradient(unscaled_implicit), (1 - 1 / 4) * reinforce, atol=1e-12
    )
