"""The controller with exact forecasts: what the paper promises, where nothing has to be learnt."""

from __future__ import annotations

import numpy as np
import pytest
from reproductions import zip_rc_pareto as simulation

CONFIG = simulation.CONFIG.model_copy(
    update={"alphas": [0.1, 1.0], "betas": [0.03, 0.1], "thresholds": [0.4], "early_stops": []}
)


@pytest.fixture(scope="module")
def found():
    table = simulation.table(seed=0, problems=48, config=CONFIG, predictor=5_000)
    points = {
        (point["family"], point["setting"]): {name: np.array(point[name]) for name in simulation.COLUMNS}
        for point in table["points"]
    }
    return table, points


def means(point):
    return tuple(float(point[name].mean()) for name in simulation.COLUMNS)


def test_forecasts_are_calibrated():
    forecasts = simulation.Forecasts(8, 5_000)
    drawn = simulation.simulate(8, 2_000, np.random.default_rng(1))
    root = forecasts(np.array([0]), np.array([1.0]), np.array([False]))[0]
    rewards, lengths = root.sum(axis=1), root.sum(axis=0)
    assert root.sum() == pytest.approx(1.0)
    shares = np.bincount(simulation.GRID.reward_bin(drawn.final), minlength=7) / 2_000
    assert np.abs(rewards - shares).sum() / 2 < 0.05
    shares = np.bincount(simulation.GRID.length_bin(drawn.ticks * simulation.TOKENS), minlength=8) / 2_000
    assert np.abs(lengths - shares).sum() / 2 < 0.05
    joint = simulation.finished_joint(0.4)
    assert joint.sum(axis=1) @ simulation.GRID.rewards == pytest.approx(0.4)


def test_utility_beats_fixed_numbers_at_their_compute(found):
    _, points = found
    utility = points["utility, α = 1", "β = 0.1"]
    accuracy, compute, _ = means(utility)
    assert compute < 4
    assert accuracy >= means(points["best of N", "N = 4"])[0] + 0.02
    assert accuracy >= 1.12 * means(points["majority vote", "N = 4"])[0]


def test_best_of_eight_for_less(found):
    _, points = found
    accuracy, compute, latency = means(points["utility, α = 1", "β = 0.03"])
    best = means(points["best of N", "N = 8"])
    assert accuracy >= best[0] - 0.03  # a single problem is 0.021
    assert compute <= 0.7 * best[1]
    assert latency < best[2]


def test_a_smaller_share_of_compute_is_faster(found):
    _, points = found
    fast, frugal = points["utility, α = 0.1", "β = 0.03"], points["utility, α = 1", "β = 0.03"]
    assert means(fast)[2] < means(frugal)[2]
    assert means(frugal)[1] < means(fast)[1]


def test_compute_grows_with_difficulty(found):
    table, points = found
    compute = points["utility, α = 1", "β = 0.1"]["compute"]
    difficulty = np.array(table["difficulty"])
    by_steps = [compute[difficulty == steps].mean() for steps in simulation.STEPS]
    assert by_steps[0] < by_steps[1] < max(by_steps[2:])
    assert simulation.effort_ratio(table) > 1.2


def test_claims_from_tables(found):
    table, _ = found
    claims = simulation.pareto_claims([table, table])
    # None of these few prices is high enough for the compute of two samples.
    assert [claim["holds"] for claim in claims if "over majority" in claim["name"]] == [False, True, True]
    assert len(simulation.pareto_arms([table])) == len(table["points"])


def test_the_fast_mode():
    result = simulation.measure([0], fast=True)
    assert {claim["name"].split(",")[0] for claim in result["claims"]} >= {
        "compute at the accuracy of best of 8"
    }
    assert len(result["claims"]) == 8
    assert all(len(arm["accuracy"]) == 3 for arm in result["arms"].values())


def test_settings_are_chosen_on_the_other_half():
    """The setting that is best on one half is worth what it is on the other."""
    first, second = simulation._halves({"problems": list(range(8))})[0]
    right, wrong = np.zeros(8), np.zeros(8)
    right[first], wrong[second] = 1.0, 1.0
    flat = np.full(8, 2.0).tolist()

    def point(family, setting, accuracy):
        return {
            "family": family,
            "setting": setting,
            "accuracy": accuracy.tolist(),
            "compute": flat,
            "latency": flat,
        }

    found = {
        "problems": list(range(8)),
        "difficulty": [0.0] * 8,
        "samples": 2,
        "points": [
            point("majority vote", "N = 2", np.full(8, 0.5)),
            point("best of N", "N = 2", np.full(8, 1.0)),
            point("utility, α = 1", "β = 1", right),
            point("utility, α = 1", "β = 2", wrong),
        ],
    }  # fmt: skip
    assert simulation.at_votes(found, 2) == (-1.0, 1.0)
    ratio, differences, latency = simulation.at_best_of(found)
    assert (ratio, latency) == (1.0, 1.0)
    assert differences.tolist() == [-1.0] * 8
    worse = simulation.not_worse("accuracy", [differences, differences])
    assert (worse["measured"], worse["interval"], worse["holds"]) == (-1.0, [-1.0, -1.0], False)


def test_not_worse_is_a_loss_of_two_points_at_most():
    """Chance alone, or too few problems to tell, is no proof."""
    few = np.array([0.0, -0.5, 0.5, 0.1])
    assert not simulation.not_worse("accuracy", [few])["holds"]
    many = np.tile([0.0, 0.0, 0.0, -0.1, 0.1], 100)
    assert simulation.not_worse("accuracy", [many, many])["holds"]
    assert not simulation.not_worse("accuracy", [many - 0.03])["holds"]
    assert not simulation.better("accuracy", [many])["holds"]
    assert simulation.better("accuracy", [many + 0.03])["holds"]


def test_a_gain_that_was_paid_for_is_no_claim():
    """All settings take four times the vote's compute, and none is as accurate as best of two."""

    def point(family, setting, accuracy, compute):
        columns = {"accuracy": accuracy, "compute": compute, "latency": 1.0}
        return {
            "family": family,
            "setting": setting,
            **{name: [value] * 8 for name, value in columns.items()},
        }

    found = {
        "problems": list(range(8)),
        "difficulty": [0.0] * 8,
        "samples": 2,
        "points": [
            point("majority vote", "N = 2", 0.5, 2.0),
            point("best of N", "N = 2", 0.9, 20.0),
            point("utility, α = 1", "β = 1", 0.8, 8.0),
        ],
    }
    assert simulation.at_votes(found, 2) == pytest.approx((0.6, 4.0))
    cheaper, reached, _, beside, gain, _ = simulation.pareto_claims([found])
    assert (gain["measured"], gain["holds"]) == (0.6, False)
    assert "4.00 of the vote's compute" in gain["why"]
    assert (cheaper["measured"], cheaper["holds"], reached["holds"]) == (0.4, False, False)
    assert cheaper["why"] == "that accuracy is not reached"
    assert (beside["measured"], beside["holds"]) == (0.4, True)
