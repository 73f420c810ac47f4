from __future__ import annotations

import subprocess
import sys

import pytest

from posttrain.errors import RecipeError
from posttrain.recipe.run_state import FinishedStage, RunLock, RunState, make_folder
from posttrain.recipe.schema import LoraConfig, ModelConfig

OTHER = """
import sys
from pathlib import Path
from posttrain.recipe.run_state import RunLock
with RunLock(Path(sys.argv[1])) as lock:
    lock.acquire()
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def owner(tmp_path):
    """Another process that works in the folder."""
    (tmp_path / "recipe.yaml").write_text("name: theirs\n")
    command = [sys.executable, "-c", OTHER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_folder_in_use_is_refused_with_the_owners_pid(tmp_path, owner):
    refused = f"run folder {tmp_path} is in use by process {owner.pid}$"
    with pytest.raises(RecipeError, match=refused), RunLock(tmp_path) as lock:
        lock.acquire()
    with pytest.raises(RecipeError, match=refused), RunLock(tmp_path) as lock:
        make_folder(tmp_path, lock, overwrite=True)
    assert (tmp_path / "recipe.yaml").read_text() == "name: theirs\n"


def test_the_lock_of_a_dead_process_is_none(tmp_path, owner):
    owner.kill()
    owner.wait()
    with RunLock(tmp_path) as lock:
        lock.acquire()
    with RunLock(tmp_path) as lock:  # and one that was released is none
        lock.acquire()


def test_make_folder(tmp_path):
    run = tmp_path / "runs" / "x"
    with RunLock(run) as lock:
        make_folder(run, lock, overwrite=False)
        (run / "recipe.yaml").write_text("name: x\n")
        (run / "logs").mkdir()
    with RunLock(run) as lock, pytest.raises(RecipeError, match="exists already; `posttrain resume"):
        make_folder(run, lock, overwrite=False)
    with RunLock(run) as lock:
        make_folder(run, lock, overwrite=True)
        assert [path.name for path in run.iterdir()] == ["lock"]
    with RunLock(run) as lock:  # a run that ended before it wrote anything
        make_folder(run, lock, overwrite=False)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    run = tmp_path / "file" / "x"
    with RunLock(run) as lock, pytest.raises(RecipeError, match="x cannot be made: Not a directory"):
        make_folder(run, lock, overwrite=False)
    with (
        RunLock(tmp_path / "none") as lock,
        pytest.raises(RecipeError, match="none cannot be locked: No such"),
    ):
        lock.acquire()


def test_only_runs_are_overwritten(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with RunLock(tmp_path) as lock, pytest.raises(RecipeError, match="is not the folder of a run"):
        make_folder(tmp_path, lock, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_the_state_reads_back(tmp_path):
    model = ModelConfig(path="runs/x/models/01-sft", lora=LoraConfig(r=4), adapter="a")
    stage = FinishedStage("01-sft", "sft", model, {"tokens/trained": 3}, 1.5)
    state = RunState("/somewhere", [stage], finished=True)
    state.write(tmp_path)
    assert RunState.read(tmp_path) == state


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"format": 2}', '{"format": 1, "directory": "x", "stages": [{}]}']
)
def test_a_state_that_cannot_be_read_is_named(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(RecipeError, match=r"state\.json cannot be read: "):
        RunState.read(tmp_path)


def test_no_state(tmp_path):
    with pytest.raises(RecipeError, match=r"it has no state\.json"):
        RunState.read(tmp_path)
