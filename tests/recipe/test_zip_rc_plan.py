"""What the plan says of a stage zip_rc: steps, tokens, memory, defaults by variant."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.errors import RecipeError
from posttrain.recipe.check import require_runnable
from posttrain.recipe.load import load_recipe
from posttrain.recipe.model_info import read_model_info
from posttrain.recipe.plan import Plan, format_plan, make_plan
from posttrain.recipe.schema import ZipRcStage

RECIPE = """\
name: try
model: {path: model}
data: {train: {task: arithmetic, size: 1000}}
rollout: {max_tokens: 64}
rewards: [exact_match]
stages:
  - zip_rc: {batch_size: 64}
"""


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Callable[..., Path]) -> None:
    monkeypatch.chdir(tmp_path)
    model_folder()
    Path("try.yaml").write_text(RECIPE)


def plan(*overrides: str) -> Plan:
    return make_plan(load_recipe("try.yaml", overrides))


def test_two_trainings_or_one() -> None:
    (size,) = plan().sizes
    assert (size.rollouts, size.sampled_tokens, size.steps) == (2000, 2000 * 64, 2 * 63)
    (size,) = plan("stages.zip_rc.label=outcome", "stages.zip_rc.max_steps=5").sizes
    assert size.steps == 5
    text = format_plan(plan())
    assert "two heads one after the other of full ZIP-RC: 2,000 rollouts" in text
    assert "train forecasts of reward and length (full)" in text


def test_a_policy_that_is_trained_on_leaves_its_forecasts_behind() -> None:
    after = "{policy: {steps: 1, prompts_per_step: 2}}"
    notes = plan(f"stages=[{after}, {{zip_rc: {{}}}}]").notes
    assert not any("forecasts" in note for note in notes)
    notes = plan(f"stages=[{{zip_rc: {{}}}}, {after}]").notes
    text = "stage policy changes the policy after stage zip_rc: the forecasts stay those of the policy before"
    assert f"{text} it." in notes


def test_memory_by_variant() -> None:
    parameters = read_model_info(Path("model")).parameters
    assert parameters is not None
    ((_, full),) = plan().memory
    assert full.parts["weights"] == 4 * parameters
    assert full.parts["optimizer"] == 8 * parameters
    assert full.parts["reference"] == 2 * parameters  # in the checkpoint's bfloat16
    ((_, lite),) = plan("stages.zip_rc.variant=lite").memory
    assert lite.parts["optimizer"] == 8 * parameters  # of the throw-away head
    assert "reference" not in lite.parts
    ((_, held),) = plan("stages.zip_rc.variant=lite", "stages.zip_rc.critic.kl=1").memory
    assert held.parts["reference"] == 2 * parameters
    ((_, both),) = plan("stages.zip_rc.variant=lite", "stages.zip_rc.critic.variant=lite").memory
    assert both.parts["optimizer"] == 8 * 256 * 128  # the head alone


def test_defaults_follow_the_variant() -> None:
    assert ZipRcStage().optimizer.learning_rate == 3e-5
    assert ZipRcStage(variant="lite").optimizer.learning_rate == 1e-3
    own = ZipRcStage(variant="lite", optimizer={"learning_rate": 0.01})
    assert own.optimizer.learning_rate == 0.01
    assert own.optimizer.betas == (0.9, 0.95)
    assert own.critic.optimizer.learning_rate == 3e-5
    assert ZipRcStage(critic={"variant": "lite"}).critic.optimizer.learning_rate == 1e-3
    assert ZipRcStage().cells == 56
    assert ZipRcStage(label="outcome", length_edges=[0, 4, 8]).cells == 4


def test_a_model_with_forecasts_is_not_fine_tuned() -> None:
    """Supervised fine-tuning normalises over the slice, whichever run trained it."""
    Path("sft.yaml").write_text(RECIPE.replace("zip_rc: {batch_size: 64}", "sft: {}"))
    require_runnable(load_recipe("sft.yaml"))
    config = Path("model/config.json")
    grid = {"first_id": 200, "reward_values": [0, 1], "length_edges": [0, 8]}
    config.write_text(json.dumps({**json.loads(config.read_text()), "zip_rc": grid}))
    with pytest.raises(RecipeError, match="normalises over the slice of the forecasts of model: train"):
        require_runnable(load_recipe("sft.yaml"))
    require_runnable(load_recipe("try.yaml"))
