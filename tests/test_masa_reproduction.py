"""The reproduction of MASA: its arithmetic by hand, and that it runs from end to end."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import reproduce
from reproductions import common, masa

from posttrain.data.self_predictions import parse_prediction

CURVE = [
    {"pass@1": 0.25, "solution_tokens": 0, "meta_tokens": 0},
    {"pass@1": 0.5, "solution_tokens": 80, "meta_tokens": 20},
    {"pass@1": 0.75, "solution_tokens": 160, "meta_tokens": 40},
]


def test_tokens_to_an_accuracy_and_accuracy_at_tokens():
    assert masa.tokens_to(CURVE, 0.5) == 100
    assert masa.tokens_to(CURVE, 0.625) == 150
    assert masa.tokens_to(CURVE, 0.8) == math.inf
    assert masa.at_tokens(CURVE, 50) == pytest.approx(0.375)
    assert masa.at_tokens(CURVE, 1000) == 0.75


def test_the_world_is_what_it_is_said_to_be():
    tokenizer, rng = masa.make_tokenizer(), np.random.default_rng(0)
    for row in masa.demonstrations(60, seed=0):
        text = row.columns["completion"]
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert len(ids) < 60
        if row.prompt.startswith("assess "):
            assert parse_prediction(text, masa.QUESTION).complete
            assert len(ids) < 24
    text = masa.careful(987, 18, rng).replace(masa.CHECK, "")
    assert text == "columncarry7+8+0=15;8+1+1=10;9+0+1=10;####1005"
    drawn = masa.problems(24, masa.DIGITS, "train")
    assert [len(p.prompt.partition("+")[0]) for p in drawn] == list(masa.DIGITS) * 2
    assert all(sum(map(int, p.prompt[:-1].split("+"))) == int(p.answer) for p in drawn)


def test_masa_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RUNS", tmp_path)
    reproduce.main(["masa", "--fast"])
    result = json.loads((tmp_path / "masa-fast.json").read_text())
    assert set(result["arms"]) == set(masa.FAST_ARMS)
    assert [point["step"] for point in result["curves"]["masa"][0]] == [0, 1, 2]
    assert result["arms"]["grpo"]["tokens"][0] < result["arms"]["masa"]["tokens"][0]
    for arm in result["arms"].values():  # all of them start from the same model
        assert arm["pass@1, start"] == result["arms"]["grpo"]["pass@1, start"]
    assert {item["name"].partition(":")[0] for item in result["claims"]} == {"masa", "grpo", "paper"}
    written = (tmp_path / f"reproduce-masa-masa-fast-{masa.SEEDS[0]}" / "summary.json").stat().st_mtime_ns
    reproduce.main(["masa", "--fast"])  # what is there is kept
    assert (
        tmp_path / f"reproduce-masa-masa-fast-{masa.SEEDS[0]}" / "summary.json"
    ).stat().st_mtime_ns == written
