from __future__ import annotations

import json
import time

import pytest

from posttrain.errors import TrainingError
from posttrain.recipe.run_state import FinishedStage
from posttrain.recipe.schema import ModelConfig, Recipe
from posttrain.recipe.summary import summarise
from posttrain.training.record import Clock, MetricsFile, remove_rollouts, replacing, write_json


def test_metrics_are_cut_back_to_a_step_of_one_stage(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.cut("02-b", 0)
    assert metrics.lines() == []
    for stage, step in (("01-a", 1), ("01-a", 2), ("02-b", 1), ("02-b", 2), ("02-b", 3)):
        metrics.write(stage=stage, kind="policy", step=step, metrics={"loss": float("nan")})
    with metrics.path.open("a") as file:
        file.write('{"stage": "02-b", "step": 4, "lo')  # what a kill leaves
    metrics.cut("02-b", 2)
    assert [(line["stage"], line["step"]) for line in metrics.lines()] == [
        ("01-a", 1),
        ("01-a", 2),
        ("02-b", 1),
        ("02-b", 2),
    ]
    assert metrics.path.read_text().endswith('"loss": "NaN"}\n')


def test_rollouts_of_later_steps_go(tmp_path):
    for name in ("step-000001.parquet", "step-000002-0.parquet", "step-000003-1.parquet", "samples.parquet"):
        (tmp_path / name).touch()
    remove_rollouts(tmp_path, 2)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["samples.parquet", "step-000001.parquet", "step-000002-0.parquet"]
    remove_rollouts(tmp_path / "none", 0)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "state.json"
    write_json(path, {"old": 1})
    with (
        pytest.raises(TrainingError, match=r"state\.json cannot be written: .* free on its disk"),
        replacing(path),
    ):
        raise OSError(28, "No space left on device")
    assert json.loads(path.read_text()) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]


def test_a_clock_counts_on():
    clock = Clock()
    assert 0 <= clock.seconds() < 60
    clock.restart(1000.0)
    time.sleep(0.01)
    assert 1000.01 <= clock.seconds() < 1060


def test_seconds_and_phases_are_those_of_the_work_that_counts(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step, seconds in ((1, 1.5), (2, 2.5)):
        metrics.write(stage="01-a", kind="policy", step=step, metrics={"seconds/generate": seconds})
    metrics.write(stage="02-b", kind="policy", step=1, metrics={"seconds/generate": 100.0})
    model = ModelConfig(path="m")
    recipe = Recipe.model_validate({"name": "x", "model": {"path": "m"}, "stages": [{"evaluate": {}}]})
    found = {"truncated": 2, "unscored": 1}
    stages = [
        FinishedStage("01-a", "policy", model, {"tokens/sampled": 7, "tokens/trained": 5}, 10.04),
        FinishedStage("03-c", "zip_rc", model, {"zip_rc": found, "tokens/sampled": 3}, 1.0),
    ]
    summary = summarise(recipe, stages, metrics)
    assert summary["seconds"] == 11.0
    assert summary["stages"] == [
        {"stage": "01-a", "kind": "policy", "seconds": 10.0, "phases": {"generate": 4.0}},
        {"stage": "03-c", "kind": "zip_rc", "seconds": 1.0, "phases": {}, "zip_rc": found},
    ]
    assert (summary["tokens_sampled"], summary["tokens_trained"]) == (10, 5)
