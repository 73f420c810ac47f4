"""Metric `pareto` in an evaluate stage, and where a recipe cannot have it."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
from helpers import make_tiny_model

from posttrain.errors import DataError, RecipeError
from posttrain.recipe.check import require_runnable
from posttrain.recipe.load import load_recipe
from posttrain.recipe.run import run_recipe
from posttrain.report.html import write_report
from posttrain.zip_rc.grid import CONFIG_KEY, Grid

GRID = Grid(first_id=200, reward_values=(0.0, 0.5, 1.0), length_edges=(0, 4, 8, 16))
RECIPE = """
name: spent
model: {{path: {model}}}
data: {{eval: {{jsonl: {rows}}}}}
rewards: [{{name: length, from: {rewards}}}]
rollout: {{max_tokens: 12}}
stages:
  - evaluate:
      samples: 3
      metrics: [pareto, forecasts]
      pareto: {{interval: 4, betas: [0.05], difficulty: level}}
"""
REWARD = """
from posttrain.rewards.registry import reward


@reward("length")
def length(completion, example):
    return float(len(completion.token_ids) % 2 == int(example.answer))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pareto")
    model = make_tiny_model(path / "model", seed=3)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, CONFIG_KEY: GRID.to_config()}))
    rows = [{"prompt": f"{level}=", "answer": str(level % 2), "level": level} for level in range(4)]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "rewards.py").write_text(REWARD)
    recipe = RECIPE.format(model=model, rows=path / "rows.jsonl", rewards=path / "rewards.py")
    (path / "r.yaml").write_text(recipe)
    return path


def load(folder, *overrides):
    return load_recipe(folder / "r.yaml", [f"output_dir={folder}", *overrides])


def test_a_run_with_the_metric(folder, monkeypatch):
    monkeypatch.chdir(folder)
    run = run_recipe(load(folder))
    summary = json.loads((run / "summary.json").read_text())
    [evaluation] = summary["evaluations"]
    assert (evaluation["metrics"], summary["accuracy_after"]) == ({}, None)
    pareto = evaluation["pareto"]
    assert (pareto["problems"], pareto["samples"], pareto["left_out"]) == (4, 3, 0)
    points = {(point["family"], point["setting"]): point for point in pareto["points"]}
    one, all_of_them = points["majority vote", "N = 1"], points["best of N", "N = 3"]
    correct = pq.read_table(run / "rollouts" / "01-evaluate" / "samples.parquet")["correct"].to_pylist()
    assert one["accuracy"]["value"] == pytest.approx(sum(correct) / 12)
    assert (one["compute"], all_of_them["compute"]) == (pytest.approx(1.0), pytest.approx(3.0))
    assert 0 < points["utility, α = 1", "β = 0.05"]["compute"] <= 3
    assert pareto["effort"]["measure"] == "level"
    table = json.loads((run / "evaluations" / "01-evaluate" / "pareto.json").read_text())
    assert sorted(table["difficulty"]) == [0.0, 1.0, 2.0, 3.0]
    assert len(table["points"]) == len(points)
    assert "forecasts" in evaluation
    assert write_report(run).read_text().count("data-pareto=") == 3


def test_a_difficulty_that_is_not_there(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(DataError, match="has no number in column 'steps'"):
        run_recipe(load(folder, "name=other", "stages[0].evaluate.pareto.difficulty=steps"))


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["stages[0].evaluate.samples=1"], "set samples, 8 for example"),
        (["stages[0].evaluate.temperature=0"], "set temperature above 0"),
        (["tools.use=[calculator]"], "pareto cannot be measured with tools"),
        (["rollout.engine=vllm", "stages[0].evaluate.top_p=0.9"], "with top_p or top_k on engine vllm"),
    ],
)
def test_what_the_plan_refuses(folder, overrides, text):
    with pytest.raises(RecipeError, match=text):
        require_runnable(load(folder, *overrides))


def test_a_model_without_forecasts(folder, tmp_path):
    model = make_tiny_model(tmp_path / "model")
    with pytest.raises(RecipeError, match="pareto needs a model that forecasts: put a stage zip_rc before"):
        require_runnable(load(folder, f"model.path={model}"))
    require_runnable(load(folder))
