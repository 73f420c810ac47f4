"""Policies played on recorded samples, on numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain.errors import DataError
from posttrain.evaluation.pareto import (
    BEST_OF,
    MAJORITY,
    Tape,
    best_of,
    difficulties,
    measure_pareto,
    reading_positions,
    replay,
    tapes_by_problem,
)
from posttrain.recipe.pareto_schema import ParetoConfig
from posttrain.rollout.types import Completion, Example, Rollout, RolloutRequest, Sampling
from posttrain.zip_rc.controller import EarlyStopPolicy, ThresholdPolicy
from posttrain.zip_rc.grid import Grid

GRID = Grid(first_id=0, reward_values=(0.0, 1.0), length_edges=(0, 8, 16, 32))
CONFIG = ParetoConfig(
    interval=8, alphas=[0.1, 1.0], betas=[0.01, 0.1, 0.9], thresholds=[0.4], early_stops=[0.8]
)


def tape(values, tokens, correct, answer=None, ended="stop"):
    """A sample whose forecasts have these expected rewards, one for every reading."""
    positions = reading_positions(tokens, 8)
    readings = np.zeros((len(positions), 2, 3))
    readings[:, 1, 1], readings[:, 0, 1] = values, 1 - np.array(values)
    return Tape(positions, readings, ended, answer if answer is not None else correct, correct)


def test_readings_are_where_a_controller_decides():
    assert reading_positions(20, 8).tolist() == [1, 8, 16, 20]
    assert reading_positions(16, 8).tolist() == [1, 8, 16]
    assert reading_positions(1, 8).tolist() == [1]
    assert reading_positions(3, 1).tolist() == [1, 2, 3]


def test_everything_runs_to_its_end():
    tapes = [tape([0.5, 0.5, 0.6], 16, True), tape([0.5, 0.5, 0.5, 0.5], 20, False)]
    outcome = replay(EarlyStopPolicy(2.0), tapes, GRID, 8)
    assert (outcome.correct, outcome.tokens) == (1.0, 36)
    assert outcome.latency == 1 + 8 + 8 + 4


def test_what_is_pruned_is_charged_until_then():
    tapes = [tape([0.5, 0.3, 0.9], 16, True), tape([0.5, 0.5, 0.5, 0.5], 20, False)]
    outcome = replay(ThresholdPolicy(0.4), tapes, GRID, 8)
    assert (outcome.correct, outcome.tokens, outcome.latency) == (0.0, 8 + 20, 1 + 8 + 8 + 4)


def test_best_of_all_subsets():
    tapes = [tape([0.5, 0.9], 8, True), tape([0.5, 0.8], 6, False), tape([0.5, 0.1], 4, False)]
    rng = np.random.default_rng(0)
    pairs = best_of(tapes, GRID, 2, rng)  # right unless the first is missing
    assert pairs.correct == pytest.approx(2 / 3)
    assert (pairs.tokens, pairs.latency) == (pytest.approx(12), pytest.approx((8 + 8 + 6) / 3))
    assert best_of(tapes, GRID, 3, rng).correct == 1.0  # 0.9 for one answer, 0.9 for the other: the first
    cut = [tape([0.5, 0.9], 8, False, ended="length"), tape([0.5, 0.1], 4, True)]
    assert best_of(cut, GRID, 2, rng).correct == 1.0


@pytest.fixture(scope="module")
def pareto():
    easy = [tape([0.9, 0.9, 0.9], 16, True) for _ in range(2)]
    hard = [tape([0.3, 0.2, 0.1], 16, False), tape([0.3, 0.5, 0.8], 16, True)]
    unscored = [tape([0.5, 0.5], 8, None), tape([0.5, 0.5], 8, True)]
    return measure_pareto({"easy": easy, "hard": hard, "odd": unscored, "few": easy[:1]}, GRID, CONFIG, 2)


def test_families_and_problems(pareto):
    assert pareto.problems == ["easy", "hard"]
    assert pareto.difficulty.tolist() == [0.0, 0.5]
    assert pareto.left_out == 2
    families = list(dict.fromkeys(point.family for point in pareto.points))
    assert families == [
        MAJORITY, BEST_OF, "threshold pruning", "early stop", "utility, α = 0.1", "utility, α = 1",
    ]  # fmt: skip
    points = {(point.family, point.setting): point for point in pareto.points}
    assert points[MAJORITY, "N = 2"].accuracy.tolist() == [1.0, 0.5]
    assert points[BEST_OF, "N = 2"].accuracy.tolist() == [1.0, 1.0]
    assert points[BEST_OF, "N = 2"].compute.tolist() == [2.0, 2.0]
    assert points[BEST_OF, "N = 1"].latency.tolist() == [1.0, 1.0]
    # Dear samples: one alone, until it turns out to be worse than one that has not begun.
    assert points["utility, α = 1", "β = 0.9"].compute.tolist() == [1.0, 1.5]
    # Cheap ones: a second only where the first leaves something to gain.
    cheap = points["utility, α = 1", "β = 0.1"].compute
    assert cheap[0] < cheap[1]


def test_summary_and_table(pareto):
    summary, table = pareto.summary(0.95), pareto.table()
    assert (summary["samples"], summary["problems"], summary["left_out"]) == (2, 2, 2)
    first = summary["points"][0]
    assert (first["family"], first["setting"], first["compute"]) == (MAJORITY, "N = 1", 1.0)
    assert first["accuracy"]["value"] == pytest.approx(0.75)
    assert summary["effort"]["difficulty"] == [0.0, 0.5]
    assert summary["effort"]["measure"] == "share of its samples that are wrong"
    assert list(summary["effort"]["compute"]) == ["utility, α = 0.1, β = 0.1", "utility, α = 1, β = 0.1"]
    assert len(table["points"]) == len(summary["points"])
    assert table["points"][1]["accuracy"] == [1.0, 0.5]
    assert measure_pareto({}, GRID, CONFIG, 2).summary(0.95) == {}


def test_difficulty_may_be_given():
    tapes = [tape([0.5, 0.5], 8, True), tape([0.5, 0.5], 8, False)]
    problems = {str(place): tapes for place in range(12)}
    levels = {name: float(name) for name in problems}
    config = CONFIG.model_copy(update={"difficulty": "steps"})
    pareto = measure_pareto(problems, GRID, config, 2, levels)
    effort = pareto.summary(0.95)["effort"]
    assert effort["measure"] == "steps"
    assert len(effort["difficulty"]) == 5  # quintiles of twelve levels
    assert sum(effort["problems"]) == 12


def test_tapes_of_rollouts():
    logits = np.arange(12 * 6, dtype=np.float32).reshape(12, 6) % 7
    request = RolloutRequest((1,), Example("a", "?"), "group", Sampling(max_tokens=12))
    done = Completion(tuple(range(12)), (0.0,) * 12, "stop", "<answer> 4 </answer>", scored=logits)
    short = Completion((1,), (0.0,), "length", "", scored=logits[:1])
    rollouts = [(Rollout(request, done, 0, 0), True), (Rollout(request, short, 1, 0), None)]
    [(name, [first, second])] = tapes_by_problem(GRID, rollouts, 8).items()
    assert name == "a"
    assert first.positions.tolist() == [1, 8, 12]
    assert first.readings == pytest.approx(GRID.joint(logits[[0, 7, 11]]))
    assert (first.ended, first.answer, first.correct) == ("stop", "4", True)
    assert (second.tokens, second.ended, second.answer, second.correct) == (1, "length", None, None)


def test_difficulty_is_a_number():
    examples = [Example("a", "?", columns={"steps": "2"}), Example("b", "?", columns={"steps": "many"})]
    assert difficulties(examples, None) is None
    assert difficulties(examples[:1], "steps") == {"a": 2.0}
    with pytest.raises(DataError, match="example 'b' has no number in column 'steps'"):
        difficulties(examples, "steps")
