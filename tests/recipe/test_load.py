from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.errors import RecipeError
from posttrain.recipe.load import LoadedRecipe, dump_recipe, load_recipe
from posttrain.recipe.schema import (
    Columns,
    DataConfig,
    DataSource,
    EvaluateStage,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyStage,
    Recipe,
    RewardSpec,
    SftStage,
    StageSpec,
)

BASE = """\
name: base
model: {path: some/model, lora: {r: 8, alpha: 4}}
data:
  train: {jsonl: rows.jsonl, columns: {prompt: question}}
rewards: [exact_match, {name: concise, weight: 0.1, from: mine.py}]
stages:
  - sft: {optimizer: {warmup_steps: 3}}
  - policy: {steps: 3, prompts_per_step: 4, methods: [masa, {hdpo: {weight: 1e-1}}]}
  - evaluate: {name: final}
"""


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)


def load(text: str, *overrides: str) -> LoadedRecipe:
    Path("child.yaml").write_text(text)
    return load_recipe("child.yaml", overrides)


def base(*overrides: str) -> Recipe:
    return load_recipe("base.yaml", overrides).recipe


def test_values_and_where_they_come_from() -> None:
    loaded = load_recipe("base.yaml", ["stages.policy.steps=5"])
    assert loaded.recipe.stages[1].config.steps == 5
    assert loaded.source("stages[1].policy.steps") == "command line"
    assert loaded.source("stages[1].policy.prompts_per_step") == "base.yaml:8:42"
    assert loaded.source("stages[1].policy.group_size") == "default"
    assert loaded.source("rewards[0].name") == "base.yaml:5:11"
    assert str(loaded.origin("stages[1].policy.loss.kind")) == "base.yaml:8:5"
    assert str(loaded.origin("launch")) == "base.yaml:1:1"


def test_extends_merges_mappings_and_replaces_the_rest() -> None:
    child = "extends: base.yaml\nname: child\nmodel: {lora: {alpha: 32}}\nrewards: [numeric_match]\n"
    loaded = load(child)
    recipe = loaded.recipe
    assert recipe.name == "child"
    assert recipe.model.path == "some/model"
    assert recipe.model.lora is not None
    assert (recipe.model.lora.r, recipe.model.lora.alpha) == (8, 32)
    assert [reward.name for reward in recipe.rewards] == ["numeric_match"]
    assert loaded.source("model.lora.r") == "base.yaml:2:37"
    assert loaded.source("model.lora.alpha") == "child.yaml:3:23"


def test_null_takes_away_what_a_parent_set() -> None:
    recipe = load(
        "extends: base.yaml\nmodel: {lora: null}\ndata: {train: {jsonl: null, parquet: rows.parquet}}\n"
    ).recipe
    assert recipe.model.lora is None
    assert recipe.data.train is not None
    assert (recipe.data.train.jsonl, recipe.data.train.parquet) == (None, "rows.parquet")


def test_parents_are_relative_to_the_file_that_names_them() -> None:
    Path("below").mkdir()
    Path("below/middle.yaml").write_text("extends: ../base.yaml\nseed: 3\n")
    loaded = load("extends: below/middle.yaml\n")
    assert (loaded.recipe.name, loaded.recipe.seed) == ("base", 3)
    assert loaded.source("seed") == "below/middle.yaml:2:7"


@pytest.mark.parametrize(
    "override",
    [
        "stages[1].policy.steps=9",
        "stages.1.policy.steps=9",
        "stages.policy.steps=9",
        "stages[1].policy={steps: 9, prompts_per_step: 4}",
    ],
)
def test_ways_to_name_a_stage(override: str) -> None:
    assert base(override).stages[1].config.steps == 9


def test_overrides_by_name_in_lists() -> None:
    recipe = base(
        "stages.final.samples=4",
        "rewards.exact_match.weight=2",
        "rewards.concise.weight=3",
        "stages.policy.methods.masa.gate=true",
        "stages.policy.methods.hdpo.weight=0.5",
    )
    assert recipe.stages[2].config.samples == 4
    assert [(r.name, r.weight) for r in recipe.rewards] == [("exact_match", 2.0), ("concise", 3.0)]
    assert recipe.stages[1].config.methods == [{"masa": {"gate": True}}, {"hdpo": {"weight": 0.5}}]


def test_overrides_make_sections_and_later_ones_win() -> None:
    recipe = base("launch.num_processes=2", "rollout.stop=[a, '1']", "seed=1", "seed=2", "model.lora=")
    assert recipe.launch is not None
    assert recipe.launch.num_processes == 2
    assert recipe.rollout.stop == ["a", "1"]
    assert recipe.seed == 2
    assert recipe.model.lora is None


def test_sft_keeps_its_defaults_when_some_options_are_set() -> None:
    optimizer = base().stages[0].config.optimizer
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.warmup_steps) == (1e-5, "cosine", 3)
    assert SftStage().optimizer == OptimizerConfig(learning_rate=1e-5, schedule="cosine")


def test_a_recipe_needs_no_options_for_an_evaluation() -> None:
    text = "name: a\nmodel: {path: m}\nstages: [{evaluate: {}}]\n"
    assert load(text).recipe.stages[0].config == EvaluateStage()


def test_all_problems_of_all_layers_are_told_at_once() -> None:
    Path("base.yaml").write_text(BASE.replace("r: 8", "rr: 8"))
    with pytest.raises(RecipeError) as error:
        load("extends: base.yaml\nsed: 1\nseed: x\n", "rollout.temprature=1")
    assert [line.split("  ")[0] for line in str(error.value).splitlines()] == [
        "child.yaml:2:1",
        "child.yaml:3:7",
        "base.yaml:2:34",
        "command line",
    ]


def test_dump_and_load_give_the_same_recipe() -> None:
    loaded = load_recipe("base.yaml", ["data.train.columns.answer=null", "description='yes: 1e-5 # no'"])
    assert load(dump_recipe(loaded.recipe)).recipe == loaded.recipe


def test_other_readers_of_yaml_see_the_same_values() -> None:
    recipe = base("description='on'", "output_dir='1e-5'", "rewards.concise.name='0o7'")
    values = yaml.safe_load(dump_recipe(recipe))
    assert values["description"] == "on"
    assert values["output_dir"] == "1e-5"
    assert values["rewards"][1]["name"] == "0o7"
    assert values["stages"][1]["policy"]["optimizer"]["learning_rate"] == 1e-6


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc", "Co", "Cn"]), max_size=12)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXT)
ARGS = st.dictionaries(
    TEXT,
    st.recursive(
        SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3)
    ),
    max_size=3,
)


@settings(max_examples=30, deadline=None)
@given(
    args=ARGS,
    text=TEXT,
    rate=st.floats(min_value=1e-12, max_value=1.0),
    betas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    answer=st.none() | TEXT,
    kind=st.sampled_from(["grpo", "gspo", "rloo"]),
)
def test_any_recipe_round_trips(
    args: dict[str, object],
    text: str,
    rate: float,
    betas: tuple[float, float],
    answer: str | None,
    kind: str,
) -> None:
    recipe = Recipe(
        name="a",
        description=text,
        model=ModelConfig(path="m"),
        data=DataConfig(
            train=DataSource(task="arithmetic", size=3, args=args, columns=Columns(answer=answer))
        ),
        rewards=[RewardSpec(name=text, args=args)],
        stages=[
            StageSpec(
                policy=PolicyStage(
                    steps=1,
                    prompts_per_step=1,
                    loss=LossConfig.model_validate({"kind": kind}),
                    optimizer=OptimizerConfig(learning_rate=rate, betas=betas),
                )
            )
        ],
    )
    assert load(dump_recipe(recipe)).recipe == recipe


def test_a_weight_may_be_a_schedule(tmp_path: Path) -> None:
    text = (
        "rewards: [{name: exact_match, weight: {0: 1.0, 200: 0.1}, clip: [0, 1], only_if: exact_match > 0}]"
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: r\nmodel: {{path: org/model}}\n{text}\nstages: [{{evaluate: {{}}}}]\n")
    recipe = load_recipe(path, ["rewards.exact_match.weight={5: 2}"]).recipe
    assert recipe.rewards[0].weight == {5: 2.0}
    recipe = load_recipe(path).recipe
    assert recipe.rewards[0].weight == {0: 1.0, 200: 0.1}
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path).recipe == recipe
