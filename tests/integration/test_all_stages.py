"""Every kind of training stage in one recipe, one after the other, each from the model of the one before."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from talker import make_talker, write_recipe

from posttrain.data.error_analysis import SHORT
from posttrain.recipe.load import load_recipe
from posttrain.recipe.run import run_recipe

QUESTION = {"system": None, "template": "? {problem}", "format": "text"}
METHODS = [
    {"masa": {"group_size": 2, "question": QUESTION}},
    {"hdpo": {"cost": "tokens"}},
    {"mel": {"prompts": {**SHORT.model_dump(), "format": "text"}}},
]


@pytest.fixture
def run(tmp_path, tmp_path_factory) -> Path:
    talker = make_talker(tmp_path_factory.mktemp("talker"))
    path = write_recipe(tmp_path, talker, "all", steps=1)
    recipe = json.loads(path.read_text())
    rows = [json.loads(line) for line in (tmp_path / "hard.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"solution": row["answer"], "chosen": row["answer"], "rejected": "x"}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"jsonl": str(tmp_path / "rows.jsonl"), "format": "text"}
    pairs = {"data": {**source, "columns": {"answer": None}}, "max_steps": 1, "batch_size": 4}
    shown = {"data": {**source, "columns": {"completion": "solution"}}, "max_steps": 1, "batch_size": 4}
    policy = {"steps": 1, "prompts_per_step": 8, "group_size": 8, "methods": METHODS}
    forecasts = {"value_tokens": 1, "length_bins": 2, "max_steps": 1, "batch_size": 8}
    recipe["data"]["eval"] = source
    recipe["stages"] = [
        {"sft": {**shown, "log_every": 1}},
        {"dpo": {**pairs, "log_every": 1, "optimizer": {"warmup_steps": 0}}},
        {"reward_model": {**pairs, "log_every": 1}},
        {"policy": {**policy, "optimizer": {"learning_rate": 1e-3}}},
        *recipe["stages"],
        {"zip_rc": {**forecasts, "log_every": 1, "optimizer": {"learning_rate": 1e-3}}},
        {"evaluate": {"samples": 2, "metrics": ["pass@1", "forecasts"]}},
    ]
    path.write_text(json.dumps(recipe))
    return run_recipe(load_recipe(path))


def test_all_stages_in_one_recipe(run):
    state = json.loads((run / "state.json").read_text())
    assert state["finished"]
    kinds = ["sft", "dpo", "reward_model", "policy", "soar", "zip_rc", "evaluate"]
    assert [stage["kind"] for stage in state["stages"]] == kinds
    handed_on = [Path(stage["model"]["path"]).name for stage in state["stages"]]
    assert handed_on == ["01-sft", "02-dpo", "02-dpo", "04-policy", "05-soar", "06-zip_rc", "06-zip_rc"]
    weights = {
        name: (run / "models" / name / "model.safetensors").read_bytes() for name in dict.fromkeys(handed_on)
    }
    del weights["05-soar"]  # whose student need not have been promoted
    assert len({*weights.values()}) == 4
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {*kinds[:-1]}
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
    (policy,) = (line for line in lines if line["kind"] == "policy")
    assert {"masa/tokens/meta", "hdpo/active_groups", "mel/pairs"} <= policy.keys()
    evaluation = json.loads((run / "evaluations" / "07-evaluate" / "metrics.json").read_text())
    assert evaluation["metrics"]["pass@1"]["n"] == 18
    assert "forecasts" in evaluation
