"""The tabular simulation: a teacher that sees only gains takes a student off zero where direct RL stays
there."""

from __future__ import annotations

import numpy as np
import pytest
from reproductions import soar_table
from reproductions.soar_table import (
    START,
    TOPICS,
    Questions,
    entropy,
    fresh,
    hard_only,
    propose,
    soar,
    solve_rate,
)

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def grounded():
    return [soar(seed, soar_table.OUTER_STEPS) for seed in SEEDS]


def test_the_base_student_is_at_the_floor_and_direct_rl_leaves_it_there():
    assert solve_rate(np.full(TOPICS, START)) == pytest.approx(0.002, abs=1e-4)
    assert max(hard_only(seed, 200) for seed in SEEDS) < 0.01


def test_the_promoted_student_solves_hard_problems(grounded):
    assert all(solve_rate(run.theta) > 0.5 for run in grounded)
    assert all(run.promoted_at for run in grounded)


def test_promotion_questions_teach_a_fresh_student_more_than_an_untrained_teacher(grounded):
    ours = [fresh(soar_table.promotion_questions(run), 0, 32) for run in grounded]
    theirs = fresh(propose(np.zeros(soar_table.CELLS), 20, 64, np.random.default_rng(0))[1], 0, 32)
    assert np.mean(ours) > 2 * theirs


def test_the_grounded_teacher_stays_diverse_and_the_intrinsic_one_does_not(grounded):
    intrinsic = [soar(seed, soar_table.OUTER_STEPS, intrinsic=True) for seed in SEEDS]
    assert min(entropy(run.logits) for run in grounded) > 2
    assert np.mean([entropy(run.logits) for run in intrinsic]) < 1


def test_wrong_answers_teach_nothing():
    topic = np.full((1, 16), soar_table.HARD_TOPIC)
    wrong = Questions(topic, np.ones_like(topic), np.zeros_like(topic, dtype=bool))
    assert fresh(wrong, 0, 20) == pytest.approx(float(solve_rate(np.full(TOPICS, START))))
