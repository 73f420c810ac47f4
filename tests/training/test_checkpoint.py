"""Checkpoints of a plain Trainer: a linear model, so that a step takes a millisecond."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import signal
import subprocess

import pytest
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from posttrain.errors import RecipeError, Stopped, TrainingError
from posttrain.training.checkpoint import Checkpointer
from posttrain.training.manifest import write_manifest
from posttrain.training.record import Clock
from posttrain.training.stop import StopSignals


class Noisy(torch.nn.Module):
    """A linear layer whose training uses the random state."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, x):
        return {"loss": (self.layer(x) + torch.randn(())).square().mean()}


class Part(TrainerCallback):
    """State of a stage's own: it counts its steps."""

    def __init__(self, then=lambda step: None):
        self.steps = 0
        self.seen = torch.zeros(0)
        self.then = then

    def on_step_begin(self, args, state, control, **kwargs):
        self.then(state.global_step + 1)

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        self.seen = torch.cat([self.seen, torch.tensor([float(state.global_step)])])

    def state_dict(self):
        return {"steps": self.steps}, {"seen": self.seen}

    def load_state_dict(self, values, tensors):
        self.steps, self.seen = values["steps"], tensors["seen"]


def train(folder, *, part=None, every=1, keep=2, said=None):
    """Seven steps, over two passes through the rows. Returns the trained layer and the part."""
    part = part or Part()
    with StopSignals() as stop:
        checkpointer = Checkpointer(
            folder,
            stage="01-test",
            every=every,
            keep=keep,
            stop=stop,
            clock=Clock(),
            say=[].append if said is None else said.append,
        )
        arguments = TrainingArguments(
            output_dir=checkpointer.output_dir,
            max_steps=7,
            per_device_train_batch_size=2,
            learning_rate=0.1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        rows = [{"x": row} for row in torch.arange(40.0).reshape(10, 4) / 40]
        trainer = Trainer(model=Noisy(), args=arguments, train_dataset=rows, callbacks=[part])
        trainer.remove_callback(PrinterCallback)
        checkpointer.train(trainer, part)
    return trainer.model.layer.weight.detach(), part


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def stop_at(step, number=signal.SIGTERM):
    return Part(lambda now: os.kill(os.getpid(), number) if now == step else None)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return train(tmp_path_factory.mktemp("straight"))


def test_checkpoints_are_due_every_so_many_steps_but_not_after_the_last(tmp_path, straight):
    train(tmp_path / "a", every=3, keep=5)
    assert names(tmp_path / "a") == ["step-000003", "step-000006"]
    train(tmp_path / "b", every=1, keep=3)
    assert names(tmp_path / "b") == ["step-000004", "step-000005", "step-000006"]
    train(tmp_path / "c", every=None)
    assert names(tmp_path / "c") == []
    train(tmp_path / "d", every=7)
    assert names(tmp_path / "d") == []


@pytest.mark.parametrize("step", [1, 4, 5, 6])
def test_a_stopped_training_goes_on_exactly(tmp_path, straight, step):
    """Step 5 is the end of the first pass over the rows: the order of the second one must be the same."""
    with pytest.raises(Stopped) as stopped:
        train(tmp_path, every=None, part=stop_at(step))
    assert stopped.value.exit_code == 143
    assert names(tmp_path) == [f"step-{step:06d}"]
    weight, part = train(tmp_path, every=None)
    expected, _ = straight
    assert torch.equal(weight, expected)
    assert part.steps == 7
    assert part.seen.tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_a_signal_in_the_last_step_lets_the_stage_end(tmp_path, straight):
    weight, _ = train(tmp_path, every=None, part=stop_at(7))
    assert torch.equal(weight, straight[0])
    assert names(tmp_path) == []


def test_only_plain_files_and_no_training_arguments(tmp_path):
    train(tmp_path, every=6)
    assert names(tmp_path / "step-000006") == [
        "manifest.json",
        "model.safetensors",
        "optimizer.pt",
        "posttrain-0.json",
        "posttrain-0.safetensors",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
    ]


class Bomb:
    """A pickle that makes a folder when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("write", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_a_pickle_that_runs_code_is_refused(tmp_path, name, write):
    """What transformers loads with torch.load it must load with weights_only=True."""
    with pytest.raises(Stopped):
        train(tmp_path, part=stop_at(6), every=None)
    checkpoint = tmp_path / "step-000006"
    write(Bomb(tmp_path / "boom"), checkpoint / name)
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, stage="01-test", step=6, processes=1)
    with pytest.raises(TrainingError, match=r"step-000006 is not loaded: a file in it would run code"):
        train(tmp_path)
    assert not (tmp_path / "boom").exists()


def test_another_number_of_processes_is_refused(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path, part=stop_at(2))
    checkpoint = tmp_path / "step-000002"
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, stage="01-test", step=2, processes=4)
    with pytest.raises(RecipeError, match="was written by 4 processes; it cannot be resumed with 1"):
        train(tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of a few hundred kilobytes where one can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("file systems cannot be mounted here; the test with a limit on a file's size always runs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder, left):
    """Leave so many bytes of a file system."""
    with (folder / "ballast").open("wb") as file:
        file.write(bytes(shutil.disk_usage(folder).free - left))


@pytest.mark.parametrize("left", [0, 4096, 12288, 20480, 28672])
def test_a_full_disk(small_disk, straight, left):
    """Whatever file is the first that does not fit: one sentence, and the checkpoints before it are whole."""
    run = small_disk / "checkpoints"

    def at(step):
        if step == 4:
            fill(small_disk, left)

    with pytest.raises(
        TrainingError, match=r"a checkpoint could not be written to .*checkpoints: .* free on "
    ):
        train(run, keep=5, part=Part(at))
    assert names(run) == ["step-000001", "step-000002", "step-000003"]
    (small_disk / "ballast").unlink()
    weight, _ = train(run, every=None)
    assert torch.equal(weight, straight[0])


def test_a_file_that_may_not_grow(tmp_path, straight):
    """As a full disk, where none can be had: the system refuses to write more than 1000 bytes to a file."""

    def at(step):
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(TrainingError) as error:
            train(tmp_path, part=Part(at))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    text = "a file could not be written in full"
    assert str(error.value).startswith(f"a checkpoint could not be written to {tmp_path}: {text} (")
    assert str(error.value).endswith("free on its disk); the checkpoints before it are untouched")
    assert names(tmp_path) == ["step-000001", "step-000002"]
    weight, _ = train(tmp_path)
    assert torch.equal(weight, straight[0])
