"""The trackers of a recipe's `report_to` hold what `metrics.jsonl` holds. Those not installed are skipped."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from helpers import make_tiny_model
from policy_training import make_stage, make_trainer

from posttrain.training.trackers import track


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_tiny_model(folder)
    return folder


@pytest.fixture(autouse=True)
def _environment(monkeypatch, tmp_path):
    """What is set here and what `track` sets is gone after a test."""
    for name in ("PROJECT", "DIR", "RUN_GROUP"):
        monkeypatch.setenv(f"WANDB_{name}", "")
        monkeypatch.delenv(f"WANDB_{name}")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def train(model_folder, tmp_path, tracker):
    """Two steps with a tracker. Returns the numbers of each step as `metrics.jsonl` gets them."""
    run = tmp_path / "my-run"
    run.mkdir()
    log = {}
    trainer = make_trainer(
        model_folder,
        tmp_path / "out",
        stage=make_stage(2),
        tracking=track([tracker], run, "01-policy"),
        on_log=lambda step, steps, metrics: log.update({step: dict(metrics)}),
    )
    trainer.train()
    assert {"reward", "loss", "grad_norm", "completions/mean_length", "seconds/generate"} <= log[2].keys()
    return log


def same(found, expected):
    return math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-12)


def test_tensorboard(model_folder, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = train(model_folder, tmp_path, "tensorboard")
    folder = tmp_path / "my-run" / "trackers" / "tensorboard" / "01-policy"
    written = events.EventAccumulator(str(folder)).Reload()
    for name in log[1]:
        points = {event.step: event.value for event in written.Scalars(f"train/{name}")}
        assert all(same(points[step], log[step][name]) for step in (1, 2)), name


def test_wandb(model_folder, tmp_path):
    wandb = pytest.importorskip("wandb")
    log = train(model_folder, tmp_path, "wandb")
    assert (wandb.run.name, wandb.run.project, wandb.run.group) == ("my-run/01-policy", "posttrain", "my-run")
    assert wandb.run.offline
    summary = wandb.run.summary
    assert all(same(summary[f"train/{name}"], value) for name, value in log[2].items())
    first = Path(wandb.run.dir).parent
    assert first.is_relative_to(tmp_path / "my-run" / "trackers")
    track(["wandb"], tmp_path / "my-run", "02-policy")
    assert wandb.run is None
    assert [path.suffix for path in first.glob("run-*")] == [".wandb"]
    assert os.environ["WANDB_PROJECT"] == "posttrain"


def test_trackio(model_folder, tmp_path):
    trackio = pytest.importorskip("trackio.sqlite_storage")
    log = train(model_folder, tmp_path, "trackio")
    rows = trackio.SQLiteStorage.get_logs("posttrain", "my-run/01-policy")
    found = {row["train/global_step"]: row for row in rows if "train/reward" in row}
    for step, metrics in log.items():
        told = {name: found[step][f"train/{name}"] for name in metrics}
        assert told == {name: pytest.approx(value, rel=1e-6, abs=1e-12) for name, value in metrics.items()}


def test_nothing_is_tracked_without_a_tracker(tmp_path):
    assert track([], tmp_path, "01-policy") == {"report_to": "none"}
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == ""
