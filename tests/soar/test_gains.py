"""SOAR's outer loop by hand: the worked examples of the method."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain.evaluation.metrics import pass_at_k
from posttrain.soar.gains import (
    Promotions,
    grounded_rewards,
    learnability,
    median_student,
    set_advantages,
    set_rewards,
)
from posttrain.training.advantages import leave_one_out

EXTRA = np.array([[2, 1, 0, 1], [0, 0, -1, 1], [3, 1, 2, 2], [0, -1, 0, 0]])
"""Questions of 64 that each of four students on each of four sets solves beyond the baseline."""


def gains(baseline=0.125):
    return grounded_rewards((EXTRA / 64 + baseline).tolist(), baseline)


def test_rewards_and_advantages_of_sets():
    rewards = set_rewards(gains())
    assert rewards.tolist() == [0.015625, 0.0, 0.03125, -0.00390625]
    assert rewards.mean() == 0.0107421875
    advantages = set_advantages(rewards)
    assert advantages == pytest.approx([0.00651042, -0.01432292, 0.02734375, -0.01953125], abs=1e-8)
    assert advantages.sum() == pytest.approx(0, abs=1e-12)
    assert advantages == pytest.approx(4 / 3 * (rewards - rewards.mean()))


def test_another_baseline_changes_no_advantage():
    rewards = set_rewards(gains())
    assert set_advantages(rewards + 0.25) == pytest.approx(set_advantages(rewards))


def test_all_sets_as_one_group_have_the_same_direction():
    sets, size = 4, 64
    rewards = np.repeat(set_rewards(gains()), size)
    together = leave_one_out(rewards, [0] * len(rewards))
    factor = size * (sets - 1) / (sets * size - 1)
    assert factor == pytest.approx(0.752941, abs=1e-6)
    assert together == pytest.approx(factor * np.repeat(set_advantages(set_rewards(gains())), size))


def test_the_median_student_of_the_best_set_is_promoted():
    promotions = Promotions(0.01, 3, recent=[0.008, 0.012])
    assert promotions.add(gains()) == (2, 2)
    assert promotions.latest == pytest.approx(0.010247, abs=1e-6)
    assert (promotions.recent, promotions.count) == ([], 1)


def test_the_lower_median_and_the_first_of_equals():
    assert median_student(np.array([0.3, 0.1, 0.2, 0.4])) == 2
    assert median_student(np.array([0.1, 0.1, 0.1])) == 1
    assert median_student(np.array([0.5])) == 0


def test_no_promotion_before_the_window_is_full_or_at_the_threshold():
    promotions = Promotions(0.01, 3, clear=False)
    high = np.full((2, 2), 0.5)
    assert promotions.add(high) is None
    assert promotions.add(high) is None
    assert promotions.add(high) == (0, 0)
    assert promotions.add(high) == (0, 0)  # the window was kept
    level = Promotions(0.5, 1)
    assert level.add(high) is None


def test_the_threshold_in_questions():
    # Three steps of 16 students and 64 questions: 30 extra ones are not enough, 31 are.
    for extra, promoted in ((30, False), (31, True)):
        promotions = Promotions(0.01, 3)
        found = None
        for step in range(3):
            won = np.zeros(16)
            won[: extra // 3 + (step < extra % 3)] = 1 / 64
            found = promotions.add(won.reshape(4, 4))
        assert (found is not None) == promoted


def test_learnability():
    assert learnability([0, 1, 8, 16, 31, 32], 32).tolist() == [0, 0.96875, 0.75, 0.5, 0.03125, 0]


def test_rejection_does_not_change_the_gradient():
    # Proposition 1: the gradients of ln π0(z) and of ln π(z | accepted) agree if advantages sum to zero.
    logits = np.array([0.3, -0.2, 0.9])
    plain = np.exp(logits) / np.exp(logits).sum()
    accepted = np.array([1, 1, 0])
    truncated = plain * accepted / (plain * accepted).sum()
    drawn, rewards = [0, 1, 1], np.array([0.7, 0.1, 0.4])

    def gradient(chances, advantages):
        return sum(a * (np.eye(3)[z] - chances) for a, z in zip(advantages, drawn, strict=True))

    advantages = set_advantages(rewards)
    assert gradient(plain, advantages) == pytest.approx(gradient(truncated, advantages), abs=1e-12)
    assert not np.allclose(gradient(plain, rewards), gradient(truncated, rewards))


def test_pass_at_k_of_three_right_in_32():
    found = [pass_at_k(32, 3, k) for k in (1, 4, 8, 16, 32)]
    assert found == pytest.approx([0.09375, 0.339516, 0.591935, 0.887097, 1.0], abs=1e-6)


def test_student_advantages_of_one_right_answer():
    advantages = leave_one_out(np.array([120.0] + [10.0] * 31), [0] * 32)
    assert advantages[0] == 110
    assert advantages[1] == pytest.approx(-110 / 31)
