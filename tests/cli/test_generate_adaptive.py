"""`posttrain generate --adaptive`."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from helpers import make_tiny_model
from rich.console import Console

from posttrain.cli import main
from posttrain.cli.adaptive import Display, utility
from posttrain.zip_rc.controller import UtilityPolicy
from posttrain.zip_rc.grid import Grid
from posttrain.zip_rc.sampler import Progress, SampleView

GRID = Grid(first_id=200, reward_values=(0.0, 0.5, 1.0), length_edges=(0, 8, 16, 32))
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def model(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("foreseeing") / "model"
    shutil.copytree(plain, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"zip_rc": GRID.to_config()}))
    return str(folder)


def test_the_best_of_several_and_what_it_took(model: str, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("a", "b")))
    options = ["--adaptive", "--prompts", str(file), "--max-tokens", "12", "--n", "3", "--interval", "8"]
    assert main(["generate", model, *options, "--utility", "alpha=1,beta=0.05", "--json"]) == 0
    shown = capsys.readouterr()
    rows = [json.loads(line) for line in shown.out.splitlines()]
    assert [row["prompt"] for row in rows] == ["a", "b"]
    for row in rows:
        assert 0 <= row["confidence"] <= 1
        assert 1 <= row["samples"] <= 3
        assert row["tokens"] <= 36
        assert row["latency"] >= 12 or row["finish_reason"] == "stop"
    lines = [line for line in shown.err.splitlines() if "confidence" in line]
    assert len(lines) == 2
    assert lines[1].startswith("2/2  confidence ")

    assert main(["generate", model, "a", "--adaptive", "--max-tokens", "12", "--budget", "12"]) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_a_model_without_forecasts(plain: Path, capsys: Capture) -> None:
    assert main(["generate", str(plain), "a", "--adaptive"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"model.path: '{plain}' foresees neither reward nor length")
    assert "zip_rc" in error


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--interval", "8"], "--interval is for --adaptive"),
        (["--utility", "alpha=1"], "--utility is for --adaptive"),
        (["--adaptive", "--budget", "5"], "--budget 5 does not pay for one sample of --max-tokens 256"),
        (["--adaptive", "--interval", "0"], "--interval should be at least 1"),
        (["--adaptive", "--temperature", "0"], "--temperature above 0"),
        (["--adaptive", "--utility", "alfa=1"], "there is no weight 'alfa'"),
        (["--adaptive", "--utility", "alpha=much"], "alpha should be a number; found 'much'"),
        (["--adaptive", "--utility", "alpha=2"], "alpha should be from 0 to 1"),
        (["--adaptive", "--utility", "beta=-1"], "beta should be 0 or more"),
    ],
)
def test_options_that_cannot_be_used(options: list[str], text: str, capsys: Capture) -> None:
    assert main(["generate", "model", "a", *options]) == 2
    assert text in capsys.readouterr().err


def test_weights() -> None:
    assert utility("beta=0.5") == UtilityPolicy(0.1, 0.5)
    assert utility("alpha=1,beta=0") == UtilityPolicy(1.0, 0.0)


def progress(place: int, done: bool) -> Progress:
    states = ("finished", "truncated", "paused", "waiting") if done else ("running",) * 4
    samples = tuple(SampleView(state, 10, 0.5, 20.0) for state in states)
    return Progress(place, samples, 0.75, 0.0 if done else 1234.0, 40, done)


def test_a_live_table_on_a_terminal() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, height=20)
    with Display(["one\ntwo", "three"], console) as display:
        display.show(progress(0, done=False))
        display.show(progress(1, done=False))
        display.show(progress(1, done=True))
    shown = screen.getvalue()
    assert "one two" in shown
    assert "●●●●" in shown
    assert "1,234" in shown
    assert "1 of 2 prompts answered" in shown


def test_a_line_for_each_answer_elsewhere() -> None:
    screen = io.StringIO()
    with Display(["one\ntwo"], Console(file=screen, width=200)) as display:
        display.show(progress(0, done=False))
        display.show(progress(0, done=True))
    assert screen.getvalue() == "1/1  confidence 0.75 with 40 tokens in 3 samples, 1 finished: one two\n"
