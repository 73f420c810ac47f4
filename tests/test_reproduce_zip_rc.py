"""The reproduction of ZIP-RC: its verdicts, and that it runs from end to end."""

from __future__ import annotations

import json

import pytest
import reproduce
from reproductions import common, zip_rc

from posttrain.errors import TrainingError


def measured(ece, gap, kl, after, auc, brier=0.1, right=0.9):
    position = {
        "rollouts": 100,
        "ece": ece,
        "brier": brier,
        "brier_of_constant": 0.2,
        "length_mae": 4.0,
        "length_mae_of_constant": 8.0,
        "auc": 0.6,
    }
    forecasts = {
        "positions": [position, {**position, "rollouts": 50, "ece": ece / 2}],
        "end": {"auc": auc},
        "joint": {"tv": 0.3 + gap, "tv_floor": 0.3},
    }
    return {
        "differences": [after - 0.5 + noise for noise in (-0.1, 0.0, 0.1) * 20],
        "kl": kl,
        "labels": {"value_if_right": right, "value_if_wrong": 0.5},
        "forecasts": forecasts,
    }


def test_verdicts():
    good = [measured(0.03, 0.04, 0.004, after, 0.95) for after in (0.49, 0.52, 0.5)]
    lite = [measured(0.1, 0.2, 0.0, 0.5, 0.7, brier=0.14) for _ in range(3)]
    claims = zip_rc.calibration_claims({"full": good, "lite": lite})
    assert all(item["holds"] for item in claims)
    assert claims[2]["measured"] == pytest.approx(0.03 * (100 + 25) / 150)
    assert claims[3]["measured"] == pytest.approx(0.5)
    bad = [measured(0.2, 0.2, 0.2, after, 0.5, brier=0.19, right=0.7) for after in (0.38, 0.4, 0.39)]
    claims = zip_rc.calibration_claims({"full": bad, "lite": lite})
    failed = [item["name"] for item in claims if not item["holds"]]
    assert len(failed) == 9  # all but the length, and that lite's policy is the same


def test_the_base_rate_foretold_to_everyone_is_calibrated_and_knows_nothing():
    constant = measured(0.01, 0.0, 0.0, 0.5, 0.5, brier=0.2)
    error, skill, last, gain = zip_rc.reward_claims([constant["forecasts"]])
    assert (error["measured"], skill["measured"]) == (0.0083, 0.0)
    assert "base rate" in error["why"]
    assert not any(item["holds"] for item in (error, skill, last, gain))
    one_sided = {**constant, "labels": {"value_if_right": 0.9, "value_if_wrong": None}}
    assert not zip_rc.calibration_claims({"full": [one_sided]})[0]["holds"]
    learns_late = {**measured(0.01, 0.0, 0.0, 0.5, 0.65)["forecasts"]}
    assert [item["holds"] for item in zip_rc.reward_claims([learns_late])] == [True, True, False, False]


def test_a_seed_whose_values_tell_nothing_apart_ends_it_with_a_sentence(monkeypatch):
    def fail(seeds, fast):
        raise TrainingError("01-zip_rc: it cannot tell them apart")

    monkeypatch.setattr(zip_rc, "measure", fail)
    with pytest.raises(SystemExit, match=r"^zip_rc: 01-zip_rc: it cannot tell them apart$"):
        reproduce.main(["zip_rc"])


def test_a_policy_that_lost_a_little_everywhere_is_not_unchanged():
    """Three seeds alone could not tell: their t interval would have 0 in it."""
    claim = zip_rc.unchanged("pass@1", [measured(0, 0, 0, after, 0) for after in (0.44, 0.47, 0.49)])
    assert claim["measured"] == pytest.approx(-0.0333, abs=1e-4)
    assert not claim["holds"]
    assert common.paired_interval((0.44, 0.47, 0.49), (0.5,) * 3)[1] > 0


def test_differences_are_by_problem():
    def rows(*outcomes):
        return [{"example_id": name, "role": role, "correct": right} for name, role, right in outcomes]

    before = rows(("a", "solution", True), ("a", "solution", False), ("b", "solution", False))
    after = rows(("b", "solution", True), ("a", "solution", False), ("a", "greedy", True))
    assert zip_rc.differences(before, after) == [-0.5, 1.0]


@pytest.mark.slow
def test_it_runs_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RUNS", tmp_path)
    reproduce.main(["zip_rc", "--fast"])
    result = json.loads((tmp_path / "zip_rc-fast.json").read_text())
    (forecasts,) = result["arms"]["full"]["forecasts"]
    assert forecasts["joint"]["tv_floor"] > 0
    (labels,) = result["arms"]["full"]["labels"]
    assert {*labels} == {"value_if_right", "value_if_wrong"}
    (kl,) = result["arms"]["full"]["kl"]
    assert 0 <= kl < 0.1  # two steps hardly move it
    assert "Written to" in capsys.readouterr().out
