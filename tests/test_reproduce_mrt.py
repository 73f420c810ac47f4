"""The reproduction of MRT: its own arithmetic, and that it runs from end to end."""

from __future__ import annotations

import json
import math

import pytest
import reproduce
from reproductions import common, mrt


def test_tokens_needed_by_hand():
    curve = {"tokens": [10.0, 20.0, 30.0], "accuracy": [0.2, 0.6, 0.6]}
    assert mrt.tokens_needed(curve, 0.1) == pytest.approx(5)
    assert mrt.tokens_needed(curve, 0.4) == pytest.approx(15)
    assert mrt.tokens_needed(curve, 0.6) == pytest.approx(20)
    assert mrt.tokens_needed(curve, 0.7) == math.inf


def measured(waste, regret, accuracy, tokens):
    return {
        "accuracy": accuracy,
        "repeated": waste / 2,
        "fillers": waste / 2,
        **{f"regret@{budget}": regret for budget in mrt.BUDGETS},
        "continued@+0%": accuracy,
        "continued@+100%": accuracy,
        "curve": {"tokens": [tokens, 2 * tokens], "accuracy": [accuracy, accuracy]},
        "tokens_sampled": 1,
        "seconds": 1.0,
        "mrt/probe_share": 0.3,
        "mrt/telescoping_error": 1e-12,
        "agreement": 0.95,
    }


def test_verdicts():
    good = [measured(0.1, 0.5 + noise, 0.9, 20) for noise in (0.0, 0.01, 0.02)]
    grpo = [measured(0.4, 0.7 + noise, 0.9, 40) for noise in (0.0, 0.02, 0.01)]
    names = ("grpo", "mrt online", "grpo, equal tokens", "mrt online, equal tokens")
    made = mrt.report({"cold start": grpo[:1], **dict(zip(names, [grpo, grpo, grpo, good], strict=True))})
    assert all(item["holds"] for item in made["claims"])
    made = mrt.report({"cold start": grpo[:1], **dict.fromkeys(names, grpo)})
    failed = [item["name"] for item in made["claims"] if not item["holds"]]
    assert len(failed) == 4  # waste, both regrets, and the tokens for grpo's accuracy


@pytest.mark.slow
def test_it_runs_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RUNS", tmp_path)
    reproduce.main(["mrt", "--fast"])
    result = json.loads((tmp_path / "mrt-fast.json").read_text())
    even = {"grpo, equal tokens", "mrt online, equal tokens"}
    assert {"cold start", "grpo", "mrt online", "star"} | even == set(result["arms"])
    online = result["arms"]["mrt online"]
    assert online["mrt/telescoping_error"][0] < 1e-6
    assert "Written to" in capsys.readouterr().out
