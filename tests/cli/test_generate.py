from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import make_tiny_model

from posttrain.cli import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("model")))


def generate(capsys: Capture, *argv: str) -> str:
    assert main(["generate", *argv]) == 0
    return capsys.readouterr().out


def test_one_prompt_gives_its_completion_alone(model: str, capsys: Capture) -> None:
    options = ["--max-tokens", "5", "--seed", "1"]
    text = generate(capsys, model, "1+1=", *options)
    [row] = generate(capsys, model, "1+1=", *options, "--json").splitlines()
    assert text == json.loads(row)["completion"] + "\n"
    assert json.loads(row)["prompt"] == "1+1="


def test_prompts_of_a_file_in_their_order(model: str, capsys: Capture, tmp_path: Path) -> None:
    prompts = ["a", "b", "c"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    lines = generate(capsys, model, "--prompts", str(file), "--n", "2", "--max-tokens", "4", "--json")
    rows = [json.loads(line) for line in lines.splitlines()]
    assert [row["prompt"] for row in rows] == ["a", "a", "b", "b", "c", "c"]
    assert {row["finish_reason"] for row in rows} <= {"length", "stop"}


def test_several_completions_stand_below_their_prompts(model: str, capsys: Capture) -> None:
    text = generate(capsys, model, "x", "y", "--max-tokens", "3", "--temperature", "0")
    assert text.startswith("── x\n")
    assert "\n── y\n" in text


def test_a_model_that_is_not_there(capsys: Capture) -> None:
    assert main(["generate", "./nowhere", "hi"]) == 1
    assert capsys.readouterr().err == "model.path: there is no model folder './nowhere'\n"
