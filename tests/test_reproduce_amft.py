"""The reproduction of AMFT: its world and its arithmetic by hand, and that it runs from end to end."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import reproduce
import torch
from reproductions import amft, amft_table, common
from reproductions.amft_world import answer, encoded, is_blind, make_pairs, make_tokenizer, question


def test_the_world_is_what_it_is_said_to_be():
    pairs = make_pairs()
    together = np.concatenate(list(pairs.values()))
    assert len({tuple(pair) for pair in together.tolist()}) == len(together) == 9500
    every = np.stack(np.meshgrid(np.arange(100), np.arange(100)), -1).reshape(-1, 2)
    assert is_blind(every).mean() == pytest.approx(0.225)
    assert (question(37, 48), answer(37, 48), answer(57, 48, forget=True)) == ("73+84=", "580", "590")
    assert list(is_blind(np.array([[57, 48], [37, 48], [52, 41]]))) == [True, False, False]
    tokens = make_tokenizer()(question(37, 48) + answer(37, 48))["input_ids"]
    assert encoded(np.array([[37, 48]])).tolist() == [[*tokens, 1]]


class Line(torch.nn.Module):
    """Two weights; the chances of both held-out answers are 0.5 plus the first weight, and 0.5 minus it."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.zeros(2))


def test_brute_force_by_hand(monkeypatch):
    """g_S = (-1, 0), g_R = (3, 0): imitation alone moves by (1, 0) · rate, none at all by (-3, 0) · rate."""
    model = Line()
    mu, rate = 0.25, 0.1
    monkeypatch.setattr(amft, "answer_logprobs", lambda m, shown: m.weights[:1] * shown)
    monkeypatch.setattr(
        amft, "chances", lambda m, pairs: np.array([0.5, 0.7]) + np.array([1.0, 3.0]) * float(m.weights[0])
    )
    model.weights.grad = torch.tensor([mu * -1.0 + (1 - mu) * 3.0, 0.0])
    difference, error = amft.by_brute_force(model, torch.ones(1), mu, None, rate)
    # dU/dmu of the two answers: rate · 4 and 3 · rate · 4; mean 0.8, standard deviation 0.5657, over √2.
    assert difference == pytest.approx(0.8, rel=1e-5)
    assert error == pytest.approx(0.4, rel=1e-5)
    assert model.weights.tolist() == [0.0, 0.0]


def line(step, accuracy, mu, **more):
    values = {"test/accuracy": accuracy, "test/blind": accuracy / 2, "test/elsewhere": accuracy, "mu": mu}
    return {"step": step, **{f"amft/{key}": value for key, value in (values | more).items()}}


def test_a_log_is_read():
    lines = [line(step, step / 10, 0.5) for step in range(1, 8)]
    lines[0] |= {"amft/meta_gradient": 0.2, "amft/brute_force": 0.3, "amft/brute_force_error": 0.1}
    lines[1] |= {"amft/meta_gradient": -0.2, "amft/brute_force": 0.3, "amft/brute_force_error": 0.1}
    lines[2] |= {"amft/meta_gradient": -0.2, "amft/brute_force": 0.1, "amft/brute_force_error": 0.1}
    found = amft.read(lines)
    assert found["accuracy"] == pytest.approx(0.5)  # of the last five
    assert found["blind"] == pytest.approx(0.25)
    assert (found["checked"], found["sure"], found["agreement"]) == (3, 2, 0.5)


def measured(accuracy, mu, blind=0.8, agreement=0.95):
    return {
        "accuracy": accuracy,
        "blind": blind,
        "mu": mu,
        "agreement": agreement,
        "tokens": 1,
        "seconds": 1.0,
    }


def test_verdicts():
    good = {f"amft {mu:g}": [measured(0.9, 0.05 + mu / 10)] * 3 for mu in amft.STARTS}
    others = {
        "turned around": [measured(0.8, 0.95)] * 3,
        "fixed 0.1": [measured(0.92, 0.1)] * 3,
        "fixed 0.9": [measured(0.8, 0.9)] * 3,
        "imitation": [measured(0.8, 1.0, blind=0.2)] * 3,
        "switch at 150": [measured(0.95, 0.0)] * 3,
    }
    made = amft.report(good | others)
    assert all(item["holds"] for item in made["claims"])
    assert made["regret"]["of amft 0.5 to fixed 0.1"] == pytest.approx([0.02] * 3)
    assert made["regret"]["of amft 0.5 to switch at 150"] == pytest.approx([0.05] * 3)
    bad = {arm: [measured(0.8, mu, 0.3, 0.6)] * 3 for arm, mu in (("amft 0.1", 0.1), ("amft 0.5", 0.5))}
    made = amft.report(bad | others)
    assert [item["holds"] for item in made["claims"]] == [False] * 5 + [True]


def test_amft_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RUNS", tmp_path)
    reproduce.main(["amft", "--fast"])
    result = json.loads((tmp_path / "amft-fast.json").read_text())
    assert set(result["arms"]) == set(amft.FAST_ARMS)
    learned = result["arms"][amft.MAIN]
    assert len(learned["accuracy, curve"][0]) == 4
    assert result["arms"]["fixed 0.1"]["checked"] == [0]
    written = (tmp_path / "reproduce-amft-amft-0.5-fast-0" / "summary.json").stat().st_mtime_ns
    reproduce.main(["amft", "--fast"])  # what is there is kept
    assert (tmp_path / "reproduce-amft-amft-0.5-fast-0" / "summary.json").stat().st_mtime_ns == written


def test_verdicts_on_the_table():
    def trained(*finals):
        return [amft_table.Trained(final=final, mu=[0.5]) for final in finals]

    runs = {
        amft_table.LEARNED: trained(0.86, 0.88),
        "amft, rate 0.3": trained(0.91, 0.93),
        "fixed 0.1": trained(0.88, 0.9),
        "fixed 0.9": trained(0.7, 0.7),
        "switch at 40": trained(0.9, 0.9),
        "switch at 150": trained(0.92, 0.94),
        amft_table.TURNED: trained(0.7, 0.7),
    }
    made = amft_table.report(runs)
    assert [item["holds"] for item in made["claims"]] == [True, True]
    assert [item["measured"] for item in made["claims"]] == pytest.approx([-0.02, 0.17])
    assert made["regret"]["of amft, rate 0.3 to switch at 150"] == pytest.approx([0.01, 0.01])
    assert made["regret"]["of amft, rate 0.05 to fixed 0.1"] == pytest.approx([0.02, 0.02])
    worse = amft_table.report(runs | {amft_table.LEARNED: trained(0.7, 0.74)})
    assert [item["holds"] for item in worse["claims"]] == [False, False]


def test_the_control_differs_in_the_sign_alone():
    learned, turned = (amft_table.ARMS[name] for name in (amft_table.LEARNED, amft_table.TURNED))
    assert replace(learned, rate=-learned.rate) == turned
    assert amft.ARMS[amft.TURNED] == amft.ARMS[amft.MAIN] | {"rate": -amft.CONTROLLER["rate"], "mu": 0.5}


def test_the_table_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RUNS", tmp_path)
    reproduce.main(["amft_table", "--fast"])
    result = json.loads((tmp_path / "amft_table-fast.json").read_text())
    assert set(result["arms"]) == set(amft_table.FAST_ARMS)
    assert len(result["slopes"]["40"]) == 5
