"""Every broken recipe gives exactly the text beside it, exit code 2, and nothing on disk.

`UPDATE_GOLDEN=1 pytest tests/recipe/test_broken_recipes.py` writes the texts anew.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from posttrain.cli import main
from posttrain.errors import RecipeError
from posttrain.recipe.load import dump_recipe, load_recipe

BROKEN = Path(__file__).parent / "broken"
NAMES = sorted(path.stem for path in BROKEN.glob("*.yaml"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = tmp_path / "broken"
    shutil.copytree(BROKEN, copy)
    monkeypatch.chdir(copy)
    return copy


def arguments(name: str) -> list[str]:
    overrides = BROKEN / f"{name}.args"
    return [f"{name}.yaml", *(overrides.read_text().splitlines() if overrides.exists() else [])]


def contents(folder: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {name: path.read_bytes() if path.is_file() else b"" for name, path in files.items()}


def test_there_are_enough() -> None:
    assert len(NAMES) >= 24


@pytest.mark.parametrize("name", NAMES)
def test_message(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(folder)

    assert main(["plan", *arguments(name)]) == 2

    out, err = capsys.readouterr()
    err = err.replace(str(folder), "FOLDER")
    golden = BROKEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(err)
    assert err == golden.read_text()
    assert out == ""
    assert "CANARY" not in err
    assert "Traceback" not in err
    assert contents(folder) == before


@pytest.mark.parametrize("name", NAMES)
def test_train_refuses_it_too(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(folder)
    assert main(["train", *arguments(name)]) == 2
    assert capsys.readouterr().err.replace(str(folder), "FOLDER") == (BROKEN / f"{name}.txt").read_text()
    assert contents(folder) == before


def test_as_a_process(folder: Path) -> None:
    command = [sys.executable, "-m", "posttrain", "train", "several_problems.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 2
    assert done.stderr == (BROKEN / "several_problems.txt").read_text()
    assert done.stdout == ""


def test_a_problem_a_line_with_its_place() -> None:
    for name in NAMES:
        for line in (BROKEN / f"{name}.txt").read_text().splitlines():
            place, _, text = line.partition("  ")
            assert place == "command line" or place.count(":") == 2, line
            assert text.endswith((".", "?")), line


def test_every_misspelt_key_is_found_where_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = {"jsonl": "rows.jsonl", "shuffle": False, "columns": {"completion": "solution"}}
    stages = [{"sft": {"data": source}}, {"policy": {"steps": 1, "prompts_per_step": 2}}, {"evaluate": {}}]
    values = {"name": "a", "model": {"path": "m", "lora": {}}, "data": {"eval": source}, "stages": stages}
    Path("r.yaml").write_text(yaml.safe_dump({**values, "rewards": [{"name": "x"}], "launch": {}}))
    lines = dump_recipe(load_recipe("r.yaml").recipe).splitlines()
    keys = 0
    for number, line in enumerate(lines):
        found = re.match(r"([- ]*)([a-z_]{3,}):", line)
        if found is None:
            continue
        indent, key = found.groups()
        typo = key[0] + "x" + key[1:]
        wrong = line.replace(key, typo, 1)
        Path("wrong.yaml").write_text("\n".join([*lines[:number], wrong, *lines[number + 1 :]]))
        with pytest.raises(RecipeError) as error:
            load_recipe("wrong.yaml")
        place = f"wrong.yaml:{number + 1}:{len(indent) + 1}  "
        messages = [text for text in str(error.value).splitlines() if text.startswith(place)]
        ending = f"{typo}: unknown field. Did you mean {key}?"
        assert any(text.endswith(ending) for text in messages), error.value
        keys += 1
    assert keys > 80


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"name: \xff\n", "the file is not UTF-8 text."),
        (b"# " + b"x" * (1 << 20), "the file has more than 1024 KiB."),
        (b"name: a\x00b\n", "not valid YAML: it contains a control character."),
    ],
)
def test_unreadable_files(data: bytes, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(data)
    assert main(["plan", str(path)]) == 2
    assert text in capsys.readouterr().err
