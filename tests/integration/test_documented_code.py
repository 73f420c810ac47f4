"""The code in README.md and CONTRIBUTING.md does what the text says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers import make_tiny_model

from posttrain.recipe.load import load_recipe
from posttrain.recipe.run import run_recipe

ROOT = Path(__file__).resolve().parents[2]

RECIPE = """
name: documented
model: {{path: {model}}}
data: {{train: {{task: arithmetic, size: 20, split: train}}}}
rollout: {{max_tokens: 8}}
{rewards}
stages:
  - policy: {{steps: 1, prompts_per_step: 2, group_size: 4, methods: ["my_method.py:Baseline"]}}
"""


def code_blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL)


def test_the_reward_and_the_method_of_the_documents_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (reward,) = code_blocks("README.md", "python")
    (method,) = code_blocks("CONTRIBUTING.md", "python")
    (rewards,) = (block for block in code_blocks("README.md", "yaml") if block.startswith("rewards:"))
    Path("my_rewards.py").write_text(reward)
    Path("my_method.py").write_text(method)
    Path("r.yaml").write_text(RECIPE.format(model=make_tiny_model(tmp_path / "model"), rewards=rewards))
    folder = run_recipe(load_recipe("r.yaml"))
    (line,) = (json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines())
    assert line["rewards/concise/mean"] == pytest.approx(1 - line["completions/mean_length"] / 400)
    assert 0 < line["reward"] <= 1.1


def test_the_recipe_of_the_readme_is_a_recipe(tmp_path):
    (recipe,) = (block for block in code_blocks("README.md", "yaml") if block.startswith("name:"))
    (tmp_path / "base.yaml").write_text("description: parent\n")
    (tmp_path / "my.yaml").write_text(recipe)
    loaded = load_recipe(tmp_path / "my.yaml", ["seed=1", "name=my-run-1", "stages.policy.steps=50"])
    assert loaded.recipe.stages[1].policy is not None
    assert loaded.recipe.stages[1].policy.steps == 50
    assert loaded.recipe.description == "parent"
