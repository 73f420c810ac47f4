from __future__ import annotations

import json
import os
import signal
import sys

import pytest

from posttrain.training.manifest import (
    STAGING,
    checkpoint_name,
    find_checkpoint,
    publish,
    read_manifest,
    remove_older,
    write_manifest,
)


def stage(folder, step):
    """A folder that the Trainer has written."""
    staged = folder / STAGING / f"checkpoint-{step}"
    (staged / "part").mkdir(parents=True)
    (staged / "weights").write_bytes(bytes([step % 256]) * 1000)
    (staged / "part" / "state.json").write_text(json.dumps({"step": step}))
    return staged


def save(folder, step, keep=2):
    staged = stage(folder, step)
    write_manifest(staged, step=step)
    publish(staged, folder / checkpoint_name(step))
    remove_older(folder, step, keep)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refuse(problem):
    raise AssertionError(problem)


def test_a_checkpoint_is_found_by_its_step_and_old_ones_go(tmp_path):
    assert find_checkpoint(tmp_path, refuse) is None
    for step in (9, 10, 1_000_000):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-000010", "step-1000000"]
    assert find_checkpoint(tmp_path, refuse) == tmp_path / "step-1000000"
    assert read_manifest(tmp_path / "step-1000000")["files"]["weights"]["size"] == 1000


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda c: (c / "weights").write_bytes(b"\2" * 999), "weights has 999 bytes instead of 1000"),
        (
            lambda c: (c / "weights").write_bytes(b"\2" * 999 + b"\3"),
            "weights is not what was written: its SHA-256 differs",
        ),
        (lambda c: (c / "part" / "state.json").unlink(), "part/state.json is missing"),
        (lambda c: (c / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda c: (c / "manifest.json").write_text('{"files"'), "manifest.json cannot be read"),
        (lambda c: (c / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (
            lambda c: (c / "manifest.json").write_text('{"format": 2, "files": {}}'),
            "manifest.json has format 2, this version reads 1",
        ),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_is_taken(tmp_path, damage, problem):
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage(tmp_path / "step-000002")
    said = []
    assert find_checkpoint(tmp_path, said.append) == tmp_path / "step-000001"
    assert said == [f"checkpoint {tmp_path / 'step-000002'} is damaged and not used: {problem}"]


def test_an_abandoned_later_checkpoint_is_replaced_and_never_counted(tmp_path):
    """A run that went on from step 1, since step 3 was damaged, keeps the two newest of its own."""
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    (tmp_path / "step-000003" / "weights").write_bytes(b"damaged")
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-000001", "step-000002", "step-000003"]
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-000002", "step-000003"]
    assert find_checkpoint(tmp_path, refuse) == tmp_path / "step-000003"


EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.fsync")


def save_and_die(folder, operation):
    """Save step 3 in a process that is killed before its `operation`-th operation on a file.

    Returns whether it got so far.
    """
    child = os.fork()
    if child == 0:
        try:
            left = operation

            def count(event, *arguments):
                nonlocal left
                if event in EVENTS:
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left -= 1

            sync = os.fsync
            os.fsync = lambda descriptor: (count("os.fsync"), sync(descriptor))  # Python does not audit it
            sys.addaudithook(count)
            save(folder, 3)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_killed_between_any_two_file_operations(tmp_path):
    """There is always a complete checkpoint: the new one from its rename on, before that the one before."""
    found = []
    for operation in range(1000):
        folder = tmp_path / str(operation)
        folder.mkdir()
        save(folder, 1)
        save(folder, 2)
        killed = save_and_die(folder, operation)
        newest = find_checkpoint(folder, refuse)
        found.append(newest.name)
        assert json.loads((newest / "part" / "state.json").read_text()) == {"step": int(newest.name[-1])}
        assert STAGING not in names(folder)
        save(folder, 3)
        assert names(folder) == ["step-000002", "step-000003"]
        if not killed:
            break
    assert len(found) > 20
    renamed = found.index("step-000003")
    assert found == ["step-000002"] * renamed + ["step-000003"] * (len(found) - renamed)
    assert renamed > 10
