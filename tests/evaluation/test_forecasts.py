"""Calibration of forecasts: worked examples, and forecasts that are right or wrong in known ways."""

from __future__ import annotations

import math

import numpy as np
import pytest

from posttrain.evaluation.forecasts import (
    ForecastTrace,
    brier_score,
    calibration_error,
    forecast_quality,
    ranking_quality,
    sampling_floor,
    total_variation,
)
from posttrain.zip_rc.grid import OUTCOMES, VALUES, Grid

GRID = Grid(0, OUTCOMES, (0, 4, 8, 16))


def test_worked_examples():
    predicted, came = [0.05, 0.15, 0.85, 0.95], [0, 1, 1, 1]
    assert brier_score(predicted, came) == pytest.approx((0.0025 + 0.7225 + 0.0225 + 0.0025) / 4)
    assert calibration_error(predicted, came) == pytest.approx((0.05 + 0.85 + 0.15 + 0.05) / 4)
    assert calibration_error(predicted, came, bins=2) == pytest.approx((2 * 0.4 + 2 * 0.1) / 4)
    assert calibration_error([1.0, 1.0], [1, 0]) == pytest.approx(0.5)
    assert ranking_quality([0.1, 0.4, 0.4, 0.9], [0, 0, 1, 1]) == pytest.approx(3.5 / 4)
    assert math.isnan(ranking_quality([0.1, 0.2], [1, 1]))
    assert total_variation([[0.5, 0.5]], [[0.2, 0.8]]) == pytest.approx(0.3)


def test_sampling_floor():
    assert sampling_floor(np.full(56, 1 / 56), 64) == pytest.approx(0.37, abs=0.01)
    assert sampling_floor(np.full(8, 1 / 8), 64) == pytest.approx(0.13, abs=0.005)
    assert sampling_floor([1.0, 0.0], 5) == 0.0
    assert sampling_floor([0.5, 0.5], 1) == pytest.approx(0.5)
    p = np.array([0.6, 0.3, 0.07, 0.03])
    drawn = np.random.default_rng(0).multinomial(10, p, size=20_000) / 10
    assert sampling_floor(p, 10) == pytest.approx(np.abs(drawn - p).sum(-1).mean() / 2, abs=0.003)


def traces(rng, problems=30, samples=40, shift=0.0):
    """Lengths 5 or 9, right with a chance of the problem's; forecasts are exact, or off by `shift`."""
    made = []
    for problem in range(problems):
        chance = (problem % 10 + 0.5) / 10
        for _ in range(samples):
            tokens, correct = int(rng.choice([5, 9])), bool(rng.random() < chance)
            joint = np.zeros((tokens, 2, 3))
            for place in range(tokens):
                # Before the fifth token both lengths may come.
                lengths = np.zeros(3)
                for total in (5, 9) if place < 4 else (tokens,):
                    lengths[GRID.length_bin(total - 1 - place)] += 1
                foreseen = np.clip(chance + shift, 0, 1)
                joint[place] = np.outer([1 - foreseen, foreseen], lengths / lengths.sum())
            made.append(ForecastTrace(f"p{problem}", joint, correct))
    return made


def test_exact_forecasts_are_at_the_sampling_floor():
    quality = forecast_quality(GRID, traces(np.random.default_rng(0)))
    joint = quality["joint"]
    assert (joint["problems"], joint["rollouts_per_problem"]) == (30, 40)
    assert joint["tv"] == pytest.approx(joint["tv_floor"], abs=0.02)
    positions = quality["positions"]
    assert [position["tokens"] for position in positions] == list(range(9))
    assert positions[0]["rollouts"] == quality["rollouts"] == 1200
    assert 500 < positions[5]["rollouts"] < 700  # half of them are over after five tokens
    assert positions[0]["auc"] == pytest.approx(0.83, abs=0.03)
    assert positions[0]["brier"] < 0.8 * positions[0]["brier_of_constant"] <= 0.2
    assert positions[8]["length_mae"] == pytest.approx(2.0)  # nothing is left, and the bin stands for 2
    for position in positions:
        assert position["ece"] < 0.05
        assert position["tv"] < position["tv_floor"] + 0.02
    assert quality["end"]["ece"] == pytest.approx(positions[0]["ece"])


def test_forecasts_that_are_off_are_found_out():
    quality = forecast_quality(GRID, traces(np.random.default_rng(0), shift=0.3))
    assert quality["positions"][0]["ece"] > 0.2
    assert quality["joint"]["tv"] > quality["joint"]["tv_floor"] + 0.1
    assert quality["positions"][0]["tv"] > quality["positions"][0]["tv_floor"] + 0.1


def test_on_a_grid_of_values_the_model_s_own_value_of_the_answer_counts():
    grid = Grid(0, VALUES, (0, 4))
    start, end = np.zeros((7, 1)), np.zeros((7, 1))
    start[5], end[4] = 1.0, 1.0
    trace = ForecastTrace("a", np.stack([start, start, end]), correct=True)
    assert forecast_quality(grid, [trace])["joint"]["tv"] == 1.0  # 5/6 foreseen, 4/6 came
    assert forecast_quality(grid, [])["rollouts"] == 0
