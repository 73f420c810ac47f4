"""From a TRL GRPO configuration to a recipe."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import trl
import yaml
from trl import DatasetMixtureConfig, GRPOConfig, ModelConfig
from trl.scripts.grpo import GRPOScriptArguments

from posttrain.cli import main
from posttrain.errors import RecipeError
from posttrain.recipe.commented import Commented, plain, to_yaml
from posttrain.recipe.from_trl.config import read_trl
from posttrain.recipe.from_trl.convert import Converted, convert
from posttrain.recipe.from_trl.keys import CARRIED, LAUNCHER, LEFT_OUT, TRL_VERSION, UNNEEDED
from posttrain.recipe.load import load_recipe
from posttrain.recipe.plan import make_plan
from posttrain.recipe.schema import Recipe

MINIMAL = {
    "model_name_or_path": "org/model",
    "dataset_name": "org/data",
    "reward_funcs": "think_format_reward",
}
MANY = {
    **MINIMAL,
    "reward_funcs": ["accuracy_reward", "get_soft_overlong_punishment"],
    "reward_weights": [1.0, "0.5"],
    "learning_rate": "1e-5",  # text in YAML 1.1, which TRL reads
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "num_generations": 16,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "num_processes": 4,
    "num_iterations": 2,
    "max_steps": 100,
    "loss_type": "dr_grpo",
    "scale_rewards": False,
    "beta": 0.04,
    "epsilon_high": 0.28,
    "delta": 4.0,
    "use_vllm": True,
    "vllm_gpu_memory_utilization": 0.4,
    "vllm_max_model_length": 2048,
    "max_completion_length": 1024,
    "use_peft": True,
    "lora_r": 32,
    "lora_target_modules": "all-linear",
    "save_steps": 20,
    "save_total_limit": 3,
    "eval_strategy": "steps",
    "seed": 7,
    "output_dir": "out/first try",
}


def converted(**changes: Any) -> Converted:
    return convert({**MINIMAL, **changes}, "grpo.yaml")


def recipe_of(made: Converted) -> Recipe:
    return Recipe.model_validate(plain(made.recipe))


def stage_of(**changes: Any) -> Any:
    return recipe_of(converted(**changes)).stages[0].config


# --- the installed TRL -------------------------------------------------------------------------------------


def defaults() -> dict[str, Any]:
    """Every key of the classes that `trl grpo` reads, and its default."""
    found = {}
    for kind in (GRPOConfig, ModelConfig, GRPOScriptArguments, DatasetMixtureConfig):
        for field in dataclasses.fields(kind):
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            found[field.name] = getattr(default, "value", default)
    return found


def test_every_key_of_the_installed_trl_is_known_with_its_default() -> None:
    """A new TRL whose keys or defaults differ fails here: decide about each, then raise TRL_VERSION."""
    assert trl.__version__.startswith(TRL_VERSION + ".")
    known = CARRIED | {key: default for key, (default, _) in (LEFT_OUT | UNNEEDED).items()}
    assert known == defaults()


def test_a_key_is_in_one_table_alone() -> None:
    tables = [CARRIED, LEFT_OUT, UNNEEDED, LAUNCHER]
    assert len(set().union(*tables)) == sum(map(len, tables))


def test_every_carried_key_is_read() -> None:
    class Read(dict[str, Any]):
        asked: set[str] = set()  # noqa: RUF012  shared by all, on purpose

        def get(self, key: str, default: Any = None) -> Any:
            self.asked.add(key)
            return super().get(key, default)

    server = {"use_vllm": True, "vllm_mode": "server"}
    for values in (
        MINIMAL,
        MANY,
        MINIMAL | server,
        MINIMAL | {"datasets": [{"path": "a"}], "dataset_name": None},
    ):
        convert(Read(values), "grpo.yaml")
    assert set(CARRIED) - Read.asked == set()


# --- values ------------------------------------------------------------------------------------------------


def test_defaults_are_trl_s() -> None:
    made = recipe_of(converted())
    stage = made.stages[0].policy
    assert stage is not None
    assert (stage.prompts_per_step, stage.group_size, stage.updates_per_batch) == (1, 8, 1)
    assert (stage.loss.kind, stage.loss.kl, stage.loss.scale, stage.loss.clip_low) == (
        "dapo",
        0.0,
        "group",
        0.2,
    )
    assert stage.loss.importance.mode == "none"  # TRL corrects for vLLM alone
    assert (stage.optimizer.schedule, stage.optimizer.learning_rate) == ("linear", 1e-6)
    assert stage.gradient_checkpointing
    assert (made.seed, made.rollout.engine, made.rollout.max_tokens) == (42, "transformers", 512)
    assert (made.model.dtype, made.model.lora) == ("bfloat16", None)


def test_many_values() -> None:
    made = recipe_of(convert(MANY, "grpo.yaml"))
    stage = made.stages[0].policy
    assert stage is not None
    # 8 × 4 processes × 4 accumulated = 128 completions, 16 of a prompt; two updates on each: 50 steps of 100.
    assert (stage.prompts_per_step, stage.group_size, stage.updates_per_batch, stage.steps) == (8, 16, 2, 50)
    assert (stage.loss.kind, stage.loss.scale, stage.loss.kl) == ("dr_grpo", "none", 0.04)
    assert (stage.loss.clip_high, stage.loss.dual_clip) == (0.28, 4.0)
    assert (stage.loss.importance.mode, stage.loss.importance.cap) == ("sequence_mask", 3.0)
    assert (stage.optimizer.learning_rate, stage.optimizer.schedule) == (1e-5, "cosine")
    assert stage.optimizer.warmup_steps == 10  # a tenth of 100 updates
    assert (stage.save_steps, stage.keep_checkpoints) == (10, 3)
    assert (made.rollout.engine, made.rollout.memory_fraction, made.rollout.max_model_len) == (
        "vllm",
        0.4,
        2048,
    )
    assert made.model.lora is not None
    assert (made.model.lora.r, made.model.lora.target_modules, made.model.lora.dropout) == (
        32,
        "all-linear",
        0,
    )
    assert [(reward.code, reward.weight) for reward in made.rewards] == [
        ("trl.rewards:accuracy_reward", 1.0),
        ("length_penalty", 0.5),
    ]
    assert made.data.train is not None
    assert made.data.eval is not None
    assert (made.data.train.columns.answer, made.data.eval.split) == ("solution", "test")
    assert made.stages[1].evaluate is not None
    assert made.stages[1].evaluate.samples == 16
    assert (made.name, made.output_dir, made.seed) == ("first-try", "out", 7)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"gradient_accumulation_steps": 8, "steps_per_generation": 16},
            (8, 1),
        ),  # two steps, fresh ones here
        ({"generation_batch_size": 32, "per_device_train_batch_size": 4}, (4, 8)),  # steps of half a group
        ({"gradient_accumulation_steps": 8, "num_iterations": 3}, (8, 3)),
        ({"accelerate_config": "zero3"}, (8, 1)),  # eight processes
    ],
)
def test_batches(changes: dict[str, Any], expected: tuple[int, int]) -> None:
    stage = stage_of(**changes)
    assert (stage.prompts_per_step, stage.updates_per_batch) == expected


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, "kind", "gspo"),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, "clip_high", 4.0),  # TRL's is the cap itself
        ({"loss_type": "dr_grpo"}, "scale", "group"),  # TRL scales unless it is told not to
        ({"multi_objective_aggregation": "normalize_then_sum"}, "scale", None),
        ({"entropy_coef": 0.01}, "entropy", 0.01),
    ],
)
def test_losses(changes: dict[str, Any], key: str, value: Any) -> None:
    assert getattr(stage_of(**changes).loss, key) == value


@pytest.mark.parametrize(
    ("changes", "table", "text"),
    [
        ({"top_p": 0.9}, "left_out", "importance correction"),
        ({"loss_type": "sapo"}, "left_out", "sapo is not offered"),
        ({"loss_type": "cispo"}, "left_out", "cannot be 0.2"),
        ({"num_generatons": 4}, "left_out", "no such key. Did you mean num_generations?"),
        ({"env": {"TOKEN": "canary"}}, "left_out", "set in the shell"),
        ({"num_train_epochs": 2}, "left_out", "2 passes over N prompts are 2 × N ÷ 1"),
        ({"lr_scheduler_type": "polynomial"}, "left_out", "polynomial is not offered"),
        ({"report_to": ["wandb", "mlflow"]}, "left_out", "no tracker mlflow"),
        ({"model_init_kwargs": {"device_map": "auto"}}, "left_out", "without device_map"),
        ({"datasets": [{"path": "a"}, {"path": "b"}]}, "left_out", "b would have to be put"),
        ({"loss_type": "bnpo"}, "changed", "not of each micro-batch"),
        ({"fp16": True}, "changed", "bfloat16"),
        ({"use_peft": True}, "changed", "held in bfloat16"),
        ({"steps_per_generation": 2}, "changed", "rollouts of its own"),
        ({"use_vllm": True, "vllm_mode": "server"}, "changed", "trl vllm-serve"),
        ({"accelerate_config": "fsdp1"}, "changed", "nearest is fsdp2_8gpu"),
        ({"logging_steps": 1}, "unneeded", "every step is logged"),
    ],
)
def test_what_is_not_carried_over_is_listed_with_the_reason(
    changes: dict[str, Any], table: str, text: str
) -> None:
    made = converted(**changes)
    reasons = getattr(made, table).values()
    assert any(text in reason for reason in reasons), reasons
    recipe_of(made)


def test_values_at_trl_s_defaults_are_not_listed() -> None:
    everything = {key: default for key, (default, _) in (LEFT_OUT | UNNEEDED).items()}
    made = converted(**everything, max_steps=5)
    assert (made.left_out, made.unneeded) == ({}, {})


def test_a_written_grpo_config_is_read(tmp_path: Path) -> None:
    """As `GRPOConfig.to_dict` writes it: every field, with what its own checks have filled in."""
    arguments = GRPOConfig(output_dir=str(tmp_path / "run"), max_steps=5, num_generations=4, use_cpu=True)
    values = json.loads(json.dumps(arguments.to_dict(), default=str))
    made = convert({**values, **MINIMAL}, "grpo.json")
    stage = recipe_of(made).stages[0].config
    assert (stage.steps, stage.prompts_per_step, stage.group_size) == (5, 2, 4)
    assert "use_cpu" in made.left_out
    assert set(made.left_out) <= {"use_cpu", "accelerator_config", "hub_token"}


def test_a_file_of_rows_is_counted(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n' * 40)
    source = {"path": "json", "data_files": str(tmp_path / "rows.jsonl")}
    made = convert({**MINIMAL, "datasets": [source], "num_train_epochs": 2}, "grpo.yaml")
    recipe = recipe_of(made)
    assert recipe.data.train is not None
    assert recipe.data.train.jsonl == source["data_files"]
    assert recipe.stages[0].config.steps == 80  # one prompt a step
    assert "num_train_epochs" not in made.left_out


# --- the command -------------------------------------------------------------------------------------------


def init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: Any, *more: str) -> int:
    monkeypatch.chdir(tmp_path)
    text = values if isinstance(values, str) else yaml.safe_dump(values)
    Path("grpo.yaml").write_text(text)
    return main(["init", "r.yaml", "--from-trl", "grpo.yaml", *more])


def test_the_recipe_passes_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {key: value for key, value in MANY.items() if not key.startswith(("use_vllm", "vllm"))}
    assert init(tmp_path, monkeypatch, {**values, "hub_token": "canary", "top_k": 5}) == 0
    shown = capsys.readouterr().out
    text = Path("r.yaml").read_text()
    assert "Not carried over:\n  hub_token: nothing is uploaded" in shown
    assert "#   top_k: " in text
    assert "canary" not in shown + text
    assert "prompts_per_step: 8  # per_device_train_batch_size 8 × gradient_accumulation_steps 4 × 4" in text
    plan = make_plan(load_recipe("r.yaml"))
    assert plan.loaded.recipe == recipe_of(convert(read_trl(Path("grpo.yaml")), "grpo.yaml"))
    assert plan.sizes[0].rollouts == 50 * 8 * 16


def test_json_is_read_too_and_processes_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert init(tmp_path, monkeypatch, json.dumps(MINIMAL), "--processes", "4") == 0
    recipe = load_recipe("r.yaml").recipe
    assert recipe.stages[0].config.prompts_per_step == 4
    assert recipe.launch is not None
    assert recipe.launch.num_processes == 4


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ("[1, 2]", "grpo.yaml should be a mapping of TRL's options, found list."),
        ("a: [", "grpo.yaml cannot be read as YAML or JSON"),
        ({}, "grpo.yaml has no model_name_or_path"),
        ({"model_name_or_path": "a", "reward_funcs": "x.y"}, "has neither dataset_name nor datasets"),
        ({**MINIMAL, "reward_funcs": None}, "has neither reward_funcs nor reward_model_name_or_path"),
        ({**MINIMAL, "reward_funcs": ["nearly"]}, "'nearly', which is neither TRL's nor a dotted path"),
        ({**MINIMAL, "num_generations": "eight"}, "num_generations should be a whole number, found 'eight'."),
        ({**MINIMAL, "num_generations": 0}, "num_generations should be at least 1, found 0."),
        ({**MINIMAL, "num_generations": 3}, "no multiple of num_generations 3; --processes N says"),
        ({**MINIMAL, "use_vllm": "maybe"}, "use_vllm should be true or false, found 'maybe'."),
        ({**MINIMAL, "reward_weights": [1, 2]}, "reward_weights should be 1 numbers, found [1, 2]."),
        ({**MINIMAL, "temperature": 0}, "makes no valid recipe: rollout.temperature: "),
    ],
)
def test_bad_input_is_one_sentence(
    values: Any,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert init(tmp_path, monkeypatch, values) == 2
    assert text in capsys.readouterr().err
    assert not Path("r.yaml").exists()


def test_a_missing_file_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"there is no file nowhere\.yaml\."):
        read_trl(Path("nowhere.yaml"))


def test_commented_yaml_reads_back(tmp_path: Path) -> None:
    tree = {
        "name": "a: b",
        "number": Commented(1e-6, "why\nso"),
        "none": None,
        "flags": [True, "yes", "1e5", "null"],
        "nested": {"list": [{"a": 1, "b": {"c": []}}, "plain"], "empty": {}},
    }
    text = to_yaml(tree)
    assert "number: 1e-06  # why so" in text
    (tmp_path / "a.yaml").write_text(text)
    assert yaml.safe_load(text)["nested"] == plain(tree)["nested"]
    assert plain(tree)["flags"] == yaml.safe_load(text)["flags"]
