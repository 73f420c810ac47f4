"""The reproduction of SOAR: its verdicts, its page, and that it runs from end to end."""

from __future__ import annotations

import json
import math

import reproduce
from reproductions import common, soar
from reproductions.pages.soar import page


def base(**changes):
    good = {
        "G1 worked, 6 operations": 0.95,
        "G2 exam, 1 operations": 0.2,
        "G2 exam, 2 operations": 0.04,
        "G2 exam, 3 operations": 0.008,
        "base pass@1": 0.0005,
        "base pass@1 interval": [0.0, 0.001],
        "G4 readable": 0.94,
        "G4 useful": 0.15,
        "G5 oracle lift": 0.1,
        "G6 hard only": 0.0005,
        "seconds": 1.0,
    }
    return {**good, **changes}


def row(rate, **more):
    return {
        "pass@1": rate,
        "pass@1 interval": [rate, rate],
        "student_completions": 100,
        "seconds": 1.0,
        **more,
    }


def table(promoted, direct, kept):
    taught = {"promotion questions": row(kept)} if kept else {}
    curves = {
        key: [0.0, 0.1] for key in ("reward", "reward/moving_average", "promotion", "baseline/accuracy")
    }
    teacher = {"entropy": 2.0, "kinds": [{"Q1": 3}, {"Q1": 1, "Z0": 2}], "curves": curves}
    return {
        "soar": [row(rate, **teacher, **{"wrong among useful": 0.3}) for rate in promoted],
        "intrinsic": [row(0.0, **{**teacher, "entropy": 1.0}) for _ in promoted],
        "hard only": [{**row(rate), "completions": 100} for rate in direct],
        "fresh": [{"questions": {}, "base teacher": row(0.01)} | taught for _ in promoted],
    }


def failed(*arguments):
    return [item["name"] for item in soar.report(*arguments)["claims"] if not item["holds"]]


def test_verdicts():
    assert failed(base(), table([0.3, 0.2], [0.001, 0.0], 0.1)) == []
    assert len(failed(base(), table([0.3, 0.04], [0.001, 0.009], 0.1))) == 2  # too low, and not five times
    assert len(failed(base(), table([0.3, 0.2], [0.001, 0.02], 0.1))) == 1
    assert len(failed(base(), table([0.3], [0.0], None))) == 1  # never promoted: no questions to train on
    lost = base(**{"G5 oracle lift": 0.01, "G2 exam, 1 operations": 0.6})
    assert [name[:2] for name in failed(lost, table([0.3], [0.0], 0.1))] == ["G2", "G5"]


def test_entropy_by_hand():
    assert soar.entropy(["a", "a", "b", "b"]) == math.log(2)
    assert soar.entropy([]) == 0.0


def test_the_page_has_everything():
    text = page(soar.report(base(), table([0.3], [0.02], 0.1)))
    assert text.count("<polyline") == 3
    assert text.count("does not hold") == 1
    assert "fresh student: promotion questions" in text


def test_soar_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RUNS", tmp_path)
    reproduce.main(["soar", "--fast"])
    result = json.loads((tmp_path / "soar-fast.json").read_text())
    assert set(result["arms"]) == {"base", "soar", "intrinsic", "hard only", "fresh"}
    assert {item["name"][:2] for item in result["claims"]} >= {"G1", "G2", "G3", "G4", "G5", "G6"}
    assert (tmp_path / "soar-fast.html").read_text().startswith("<!doctype html>")
    written = (tmp_path / "reproduce-soar-base-fast" / "measured.json").stat().st_mtime_ns
    reproduce.main(["soar", "--fast"])  # what is there is kept
    assert (tmp_path / "reproduce-soar-base-fast" / "measured.json").stat().st_mtime_ns == written
