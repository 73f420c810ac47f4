"""The reproduction of MEL: its world and arithmetic by hand, and that it runs from end to end."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import reproduce
from reproductions import common, mel, mel_world

from posttrain.data.experiences import read_sections
from posttrain.rollout.types import Example


def test_the_world_is_what_it_is_said_to_be():
    assert mel_world.compute("-", 1, 3) == 3
    assert mel_world.write_solution("Qc123", "+", "*") == "xc+3yc*4"
    assert mel_world.computes("xc+3yc*4", "Qc123")
    assert not any(mel_world.computes(text, "Qc123") for text in ("xc+2yc*3", "xc3", "", "xc+3yc*44"))
    problems = mel_world.all_problems()
    assert len({example.id for example in problems}) == 750
    for example in problems[:50]:
        category = example.prompt[1]
        first, second = (mel_world.TRUTH[step][category] for step in "xy")
        assert mel_world.write_solution(example.prompt, first, second)[-1] == example.answer
        wrong = next(rule for rule in "+-*" if rule != first)
        true = mel_world.write_experience("x", wrong, category, first)
        assert mel_world.is_true(true, example)
        assert not mel_world.is_true(mel_world.write_experience("x", first, category, wrong), example)
        assert not mel_world.is_true(true, Example("", f"Q{'b' if category == 'a' else 'a'}000"))
    assert read_sections("PxK-xc+", mel_world.FORMAT.sections) == ["x", "-xc+"]


def test_the_rows_of_the_base():
    rng, tokenizer = np.random.default_rng(0), mel_world.make_tokenizer()
    lengths = {"solve": (5, 8), "obey": (13, 8), "analyse": (25, 7), "recall": (7, 7)}
    for kind, expected in lengths.items():
        rows = mel_world.base_rows(kind, 300, rng)
        ids = [tokenizer([row[place] for row in rows])["input_ids"] for place in (0, 1)]
        assert {(len(asked), len(told)) for asked, told in zip(*ids, strict=True)} == {expected}
        if kind == "obey":
            found = [re.fullmatch(r"HP.K.([xy]).([-+*])Q.*", asked).groups() for asked, _ in rows]
            obeyed = [
                told[{"x": 2, "y": 6}[step]] == rule
                for (step, rule), (_, told) in zip(found, rows, strict=True)
            ]
            assert np.mean(obeyed) == pytest.approx(0.95 + 0.05 / 3, abs=0.03)
        if kind == "analyse":
            for asked, told in rows:
                wrong, right = re.fullmatch(r"IQ....W(.{8})C(.{8})M", asked).groups()
                assert wrong != right
                assert told[1] == ("y" if wrong[2] == right[2] else "x")
                assert told[3] == wrong[{"x": 2, "y": 6}[told[1]]]


def test_a_curve_between_its_points():
    curve = [{"step": 0, "tokens": 0, "pass": 0.2}, {"step": 20, "tokens": 100, "pass": 0.4}]
    assert mel.value_at(curve, "tokens", 50) == pytest.approx(0.3)
    assert mel.value_at(curve, "step", 40) == 0.4


def test_the_facts_of_sums():
    assert mel.rule_is_true("at 3-9=6;why sign;rule 3-9=-6", Example("", "3-9="))
    assert not mel.rule_is_true("at 3-9=6;why sign;rule 3-9=-5", Example("", "3-9="))
    assert not mel.rule_is_true("at 3-9=6;why sign;rule end", Example("", "3-9="))


def points(*passes):
    """A curve of 20 steps and 100 tokens from point to point."""
    return {"curve": [{"step": 20 * n, "tokens": 100 * n, "pass": p} for n, p in enumerate(passes)]}


def test_verdicts_on_training():
    """Against GRPO after as many updates (step 20) and after as many tokens (its step 30)."""
    arms = {
        "grpo": [points(0.3, 0.4, 0.6), points(0.3, 0.5, 0.7), points(0.3, 0.45, 0.65)],
        "retro 1": [points(0.3, 0.39), points(0.3, 0.48), points(0.3, 0.45)],
        "distill 0.1": [points(0.3, 0.5), points(0.3, 0.61), points(0.3, 0.54)],
    }
    for rows in (arms["retro 1"], arms["distill 0.1"]):
        for row in rows:
            row["curve"][-1]["tokens"] = 150
    best, elsewhere, *made = mel.training_claims(arms)
    assert "(distill 0.1)" in best["name"]
    assert (best["measured"], best["holds"]) == (0.1, True)
    assert (elsewhere["measured"], elsewhere["holds"]) == (0.1, True)
    assert [item["measured"] for item in made] == [-0.01, -0.11, 0.1, 0.0]
    assert [item["holds"] for item in made] == [False, False, True, False]


def test_the_best_of_many_by_chance_is_not_the_best_elsewhere():
    chance = {"a": [0.3, 0.0, -0.1], "b": [-0.1, 0.3, 0.0], "c": [0.0, -0.1, 0.3]}
    assert mel.chosen_elsewhere(chance) == [-0.1, -0.1, -0.1]
    assert mel.chosen_elsewhere({"a": [0.2, 0.3], "b": [0.1, 0.1]}) == [0.2, 0.3]


def test_verdicts_on_transfer():
    def rows(*passes):
        return [{**points(0.3, p), "written": {"true, all": p}} for p in passes]

    arms = {
        "retro": rows(0.30, 0.31, 0.29),
        "distill": rows(0.50, 0.51, 0.50),
        "unverified": rows(0.2, 0.2, 0.2),
        "solution": rows(0.30, 0.30, 0.30),
    }
    made = mel.transfer_claims(arms)
    assert [(item["measured"], item["holds"]) for item in made] == [(0.0, False), (0.2033, True), (0.1, True)]


def test_verdicts_in_context():
    good = {"pass, raw": 0.45, "pass, shuffled": 0.32, "pass, kept": 0.57, "pass, rejected": 0.33,
            "true, kept": 0.58, "true, all": 0.51, "retention": 0.43, "pass, none": 0.34}  # fmt: skip
    rows = [{key: value + shift for key, value in good.items()} for shift in (0.0, 0.01)]
    assert [item["holds"] for item in mel.context_claims("w", rows)] == [True] * 5
    bad = [{**row, "pass, shuffled": row["pass, raw"] - 0.04, "true, kept": row["true, all"]} for row in rows]
    assert [item["holds"] for item in mel.context_claims("w", bad)] == [False, True, True, False, True]


def test_mel_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RUNS", tmp_path)
    reproduce.main(["mel", "--fast"])
    result = json.loads((tmp_path / "mel-fast.json").read_text())
    trained = {"training: grpo", "training: retro 1", "training: distill 0.1"}
    assert trained | {"transfer: retro", "in context: world", "in context: tiny reasoner"} <= set(
        result["arms"]
    )
    for name in trained:  # all of them start from the same model
        assert result["arms"][name]["pass, start"] == result["arms"]["training: grpo"]["pass, start"]
        assert [point["step"] for point in result["curves"][name][0]] == [0, 2]
    about = {item["name"].partition(":")[0] for item in result["claims"]}
    assert {"world, in context", "tiny reasoner, in context", "retro 1"} <= about
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "reproduce-mel-fast").glob("*.json")}
    assert len(written) == 7
    reproduce.main(["mel", "--fast"])  # what is there is kept
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())
