"""The dashboard of a running stage, on a terminal that is not there."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from posttrain.report.dashboard import BLOCKS, Dashboard, shown, sparkline
from posttrain.report.progress import Progress

METRICS = {
    "loss": 0.01,
    "reward": 0.5,
    "completions/mean_length": 40.0,
    "seconds/generate": 2.0,
    "seconds/score": 0.5,
    "seconds/update": 1.5,
    "tokens/sampled": 4000.0,
    "tokens/trained": 3000.0,
}
ROLLOUT = {"reward": 1.0, "tokens": 3, "truncated": False, "prompt": "1+1=", "completion": "It is\n2."}


def picture(dashboard, width=90, height=40):
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    console.print(dashboard)
    return console.file.getvalue()


def test_it_shows_metrics_phases_and_rollouts():
    now = [100.0]
    dashboard = Dashboard("03-policy", "policy", clock=lambda: now[0])
    assert "03-policy (policy)" in picture(dashboard)
    for step in range(2, 9, 2):  # every second step is logged
        now[0] += 3.0
        dashboard.show(step, 20, METRICS | {"reward": step / 8})
    dashboard.show(8, 20, {"rollouts": [ROLLOUT, ROLLOUT | {"reward": None, "truncated": True}]})
    text = picture(dashboard)
    assert "step 8 of 20  12 s, about 18 s left" in text
    reward, length = (
        next(line for line in text.splitlines() if f" {name} " in line) for name in ("reward", "length")
    )
    assert reward.split()[1:4] == ["reward", "1.000", "▁▃▆█"]
    assert "40.0" in length
    for expected in ("2.0 s", "50%", "2,000 tokens/s", "8,000 tokens/s", "1,000 tokens/s"):
        assert expected in text
    assert "reward 1, 3 tokens" in text
    assert "1+1= It is 2." in text
    assert "unscored, 3 tokens, cut" in text


@pytest.mark.parametrize(("width", "height"), [(40, 12), (80, 24), (200, 60)])
def test_it_stays_within_the_terminal(width, height):
    dashboard = Dashboard("03-policy", "policy")
    long = ROLLOUT | {"completion": "word " * 500}
    dashboard.show(1, 10, METRICS)
    dashboard.show(1, 10, {"rollouts": [long, long]})
    lines = picture(dashboard, width, height).splitlines()
    assert max(map(len, lines)) <= width
    assert ("word" in "".join(lines)) == (height > 20)


def test_what_a_model_writes_does_not_steer_the_terminal():
    assert shown("a\x1b[2J\x07b\nc\u202e", 50, 50) == "a·[2J·b c·"
    assert shown("abcdefghij", 2, 3) == "ab … hij"
    assert shown("abcdefghij", 0, 3) == "… hij"


def test_sparklines():
    assert sparkline([0, 1], 10) == BLOCKS[0] + BLOCKS[-1]
    assert sparkline([1, 1, 1], 10) == BLOCKS[3] * 3
    assert sparkline([0, 0, 7, 7], 2) == BLOCKS[0] + BLOCKS[-1]
    assert sparkline([math.nan, 0, 1], 10) == " " + BLOCKS[0] + BLOCKS[-1]
    assert sparkline([], 10) == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_has_the_dashboard_and_the_log_has_every_line(tmp_path, terminal):
    progress = Progress(tmp_path)
    progress.console = Console(
        file=io.StringIO(), width=80, height=40, force_terminal=terminal, color_system=None
    )
    with progress:
        show = progress.stage("01-policy", "policy")
        for step in (1, 2):
            show(step - 1, 2, {"rollouts": [ROLLOUT]})
            show(step, 2, METRICS)
        show(0, 1, {"phase": "sampling"})
        progress.finished("01-policy", {}, 12.0)
    out = progress.console.file.getvalue()
    log = (tmp_path / "run.log").read_text().splitlines()
    assert log[1:3] == [f"   step {step}/2  loss 0.0100  reward 0.500  length 40.0  4.0 s" for step in (1, 2)]
    assert log[3:] == ["   sampling …", "   01-policy took 12 s"]
    assert ("step 1/2" in out) == (not terminal)
    assert "step 2/2  loss 0.0100" in out
    assert ("╭─ 01-policy (policy)" in out) == terminal
    assert ("\x1b" in out) == terminal
