from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.errors import RecipeError
from posttrain.recipe.check import require_runnable
from posttrain.recipe.estimate import count_rows
from posttrain.recipe.lengths import lengths_of
from posttrain.recipe.load import load_recipe
from posttrain.recipe.memory import trainable_parameters
from posttrain.recipe.model_info import read_model_info
from posttrain.recipe.plan import Plan, format_plan, make_plan, plan_to_dict
from posttrain.recipe.schema import DataSource, LoraConfig

RECIPE = """\
name: try
model: {path: model}
data:
  train: {task: arithmetic, size: 1000}
  eval: {task: arithmetic, size: 100, split: test}
rollout: {max_tokens: 64}
rewards: [exact_match]
stages:
  - sft: {epochs: 2, batch_size: 30, max_length: 100}
  - policy: {steps: 10, prompts_per_step: 8, group_size: 4, loss: {kl: 0.1}}
  - evaluate: {samples: 4, metrics: [pass@4, greedy], max_tokens: 32}
"""


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Callable[..., Path]) -> None:
    monkeypatch.chdir(tmp_path)
    model_folder()
    Path("try.yaml").write_text(RECIPE)


def plan(*overrides: str) -> Plan:
    return make_plan(load_recipe("try.yaml", overrides))


def test_steps_rollouts_and_tokens() -> None:
    sft, policy, evaluate = plan().sizes
    assert (sft.rows, sft.steps, sft.sampled_tokens) == (1000, 67, None)
    assert (policy.steps, policy.rollouts, policy.sampled_tokens) == (10, 320, 320 * 64)
    assert (evaluate.rows, evaluate.rollouts, evaluate.sampled_tokens) == (100, 500, 500 * 32)


def test_an_upper_bound_counts_replaced_prompts_and_an_explicit_number_of_steps() -> None:
    sft, policy, _ = plan("stages.policy.dynamic_sampling=2", "stages.sft.max_steps=5").sizes
    assert sft.steps == 5
    assert policy.sampled_tokens == 3 * 320 * 64


def test_memory_of_full_fine_tuning() -> None:
    parameters = read_model_info(Path("model")).parameters
    assert parameters is not None
    weights = 4 * parameters  # what is trained is float32, and computed in bfloat16
    [sft], [generate, update], [evaluate] = plan().memory
    assert [sft.parts[name] for name in ("weights", "gradients", "optimizer", "casts")] == [
        weights,
        weights,
        2 * weights,
        weights // 2,
    ]
    assert generate.parts["reference"] == update.parts["reference"] == weights // 2
    assert generate.parts["optimizer"] == update.parts["optimizer"] == 2 * weights
    # 32 sequences in a cache with room for 64 tokens after the prompt: 4 layers, keys and values of width 64
    known = lengths_of(DataSource(task="arithmetic", size=1000), "model")
    assert known is not None
    assert generate.parts["KV cache"] == 32 * (known.prompt + 64) * 4 * 2 * 64 * 2
    assert "optimizer" not in evaluate.parts
    assert evaluate.parts["weights"] == weights // 2
    assert update.total == sum(update.parts.values())


def test_memory_of_adapters() -> None:
    _, [_, update], _ = plan("model.lora={r: 4}").memory
    shapes = [(128, 128), (128, 64), (128, 64), (128, 128), (128, 512), (128, 512), (512, 128)]
    adapters = 4 * sum(4 * (inputs + outputs) for inputs, outputs in shapes)
    assert update.parts["adapters"] == update.parts["gradients"] == 4 * adapters  # float32
    assert "reference" not in update.parts  # the base weights are the reference
    lora = LoraConfig(r=4, target_modules=["k_proj"])
    assert trainable_parameters(read_model_info(Path("model")), lora) == 4 * 4 * (128 + 64)


def test_checkpoints_take_disk() -> None:
    without, with_two = plan().disk, plan("stages.policy.save_steps=5").disk
    parameters = read_model_info(Path("model")).parameters
    assert without is not None
    assert with_two is not None
    assert parameters is not None
    assert with_two - without == 2 * 3 * 4 * parameters


def test_rows_are_counted_where_that_is_cheap() -> None:
    Path("rows.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n{"prompt": "c"}\n')
    assert count_rows(DataSource(jsonl="rows.jsonl")) == 3
    assert count_rows(DataSource(jsonl="rows.jsonl", limit=2)) == 2
    assert count_rows(DataSource(hub="x/y")) is None
    assert count_rows(DataSource(hub="x/y", limit=7)) == 7


def test_the_text_ends_with_what_will_run() -> None:
    text = format_plan(plan("launch.num_processes=2"))
    assert text.splitlines()[-1] == (
        "This will fine-tune on demonstrations, then train 10 steps with dapo, then evaluate pass@4, greedy "
        "in 2 processes, and write to runs/try."
    )
    Path("ddp.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 8\n")
    assert " in 8 processes, " in format_plan(plan("launch={config_file: ddp.yaml}"))
    assert "10 steps × 8 prompts × 4 completions = 320 rollouts, at most 20.5k sampled tokens" in text


def test_defaults_are_shown_on_demand() -> None:
    made = plan()
    assert "clip_low" not in format_plan(made)
    assert ["stages[1].policy.loss.clip_low", "0.2", "default"] in [
        line.split() for line in format_plan(made, all_values=True).splitlines()
    ]


def test_json_has_every_value_with_its_source() -> None:
    made = json.loads(json.dumps(plan_to_dict(plan("seed=7"))))
    values = {entry["key"]: (entry["value"], entry["source"]) for entry in made["values"]}
    assert values["seed"] == (7, "command line")
    assert values["rollout.max_tokens"] == (64, "try.yaml:6:23")
    assert values["rollout.temperature"] == (1.0, "default")
    assert made["stages"][1]["rollouts"] == 320
    assert {phase["phase"] for phase in made["stages"][1]["memory"]} == {"generate", "update"}


def test_a_hub_model_is_noted_and_has_no_estimates() -> None:
    made = plan("model.path=org/model")
    assert made.memory == []
    assert made.disk is None
    assert any("org/model is not on this machine" in note for note in made.notes)
    assert any("memory is not known" in risk for risk in made.risks)
    assert "not on this machine, size unknown" in format_plan(made)


def test_a_run_of_the_same_name_is_noted() -> None:
    Path("runs/try").mkdir(parents=True)
    assert any("runs/try exists" in note for note in plan().notes)


def test_missing_vllm_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name))
    with pytest.raises(RecipeError, match=r"command line  rollout.engine: vllm is not installed"):
        plan("rollout.engine=vllm")


def test_replicas_are_planned_and_count_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name))
    with pytest.raises(RecipeError, match=r"command line  rollout.engine: vllm is not installed"):
        plan("rollout.engine=vllm_server")
    running = plan("rollout.engine=vllm_server", "rollout.server.urls=[http://localhost:8000]")
    assert "running already: http://localhost:8000" in format_plan(running)
    assert "KV cache" not in running.memory[1][0].parts

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "vllm" else find(name))
    three = plan("rollout.engine=vllm_server", "rollout.server.replicas=3", "rollout.kv_cache_gib=2")
    assert "3 × vllm serve on this machine" in format_plan(three)
    generate = three.memory[1][0].parts
    assert generate["KV cache"] == 3 * 2 * 2**30
    assert generate["engine weights"] == 3 * generate["weights"] // 2  # in bfloat16


def test_vllm_keeps_a_second_copy_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "vllm" else find(name))
    _, phases, _ = plan("rollout.engine=vllm", "rollout.kv_cache_gib=2").memory
    assert [phase.phase for phase in phases] == ["generate", "update", "sync"]
    for phase in phases:
        assert phase.parts["engine weights"] == phase.parts["weights"] // 2
    assert phases[0].parts["KV cache"] == phases[1].parts["KV cache"] == 2 * 2**30


def test_only_what_the_wanted_stages_need_is_checked() -> None:
    loaded = load_recipe("try.yaml", ["data.train={jsonl: nowhere.jsonl}"])
    require_runnable(loaded, kinds=["evaluate"])
    with pytest.raises(RecipeError, match=r"there is no file nowhere.jsonl"):
        require_runnable(loaded)


def test_tools_are_planned_and_looked_for() -> None:
    text = format_plan(plan("tools={use: [calculator], max_turns: 3}"))
    assert "calculator; at most 3 turns of them in a completion" in text
    with pytest.raises(RecipeError, match=r"tools\.use\[0\]\.name.*Did you mean calculator\?"):
        plan("tools={use: [calclator]}")
    with pytest.raises(RecipeError, match="either use, a list of tools, or environment"):
        plan("tools={max_turns: 3}")


PREFERENCES = """\
name: try
model: {path: model}
stages:
  - annotate_preferences: {data: {jsonl: pairs.jsonl}, members: 4, folds: 3, batch_size: 20}
  - reward_model: {data: {stage: annotate_preferences}, lora: {r: 4}, max_length: 50, batch_size: 8}
  - reward_model: {name: other, data: {jsonl: pairs.jsonl}, epochs: 2, batch_size: 20, max_length: 50}
"""


def test_preferences() -> None:
    """Four votes from three folds are twelve models, each trained on 60 of the 90 pairs in 3 steps."""
    Path("pairs.jsonl").write_text(90 * '{"prompt": "1+1=", "chosen": "2", "rejected": "3"}\n')
    Path("try.yaml").write_text(PREFERENCES)
    made = plan("model.dtype=float32")
    assert [(size.rows, size.steps, size.rollouts) for size in made.sizes] == [
        (90, 12 * 3, None),
        (None, None, None),
        (90, 9, None),
    ]
    assert made.model is not None
    assert made.memory[1][0].parts["adapters"] == 4 * trainable_parameters(made.model, LoraConfig(r=4))
    adapted, full = made.memory[1][0].parts["activations"] / 8, made.memory[2][0].parts["activations"] / 20
    assert adapted == full  # of a pair
    text = format_plan(made)
    assert "4 votes on each of 90 pairs: 12 models from the policy, each trained on 2 of 3 folds" in text
    assert "in batches of 20 = 36 steps, then drop" in text
    assert "1 × pairs in batches of 8, from the policy" in text
    assert "vote on preferences, then train the reward model reward_model, then train the reward" in text


def test_reward_models_are_shown_with_where_they_are() -> None:
    Path("try.yaml").write_text(
        RECIPE + "reward_models:\n"
        "  tone: {path: org/tone, trust_remote_code: true}\n"
        '  facts: {url: "http://node1:8000"}\n'
    )
    lines = format_plan(plan()).splitlines()
    shown = [" ".join(line.split()) for line in lines if line.strip().startswith("reward model ")]
    code = "RUNS CODE FROM THE CHECKPOINT (trust_remote_code)"
    assert shown == [
        f"reward model tone org/tone, loaded once on this machine, {code}",
        "reward model facts served at http://node1:8000",
    ]


def test_a_known_model_is_planned_without_its_files() -> None:
    made = plan("model={path: Qwen/Qwen3-8B, dtype: bfloat16}")
    assert "8.19B parameters" in format_plan(made)
    assert "its shape is known, it is not on this machine" in format_plan(made)
    update = made.memory[1][1].parts
    assert update["weights"] / 8_190_735_360 == pytest.approx(4, rel=1e-4)
    assert any("out of memory on GPUs of 80 GB" in risk for risk in made.risks)


def test_tokens_and_operations_of_a_step() -> None:
    """By hand: 8 prompts × 4 completions × 64 tokens; blocks of 245,760 weights and a head of 256 × 128."""
    sft, policy, evaluate = plan("model.dtype=float32").costs
    assert policy is not None
    assert evaluate is None
    assert (policy.sampled, policy.trained) == (8 * 4 * 64, 8 * 4 * 64)  # prompts are known as bytes only
    block = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 512
    forward = 2 * (4 * block + 256 * 128 + 4 * 128 * 64)  # and attention over 64 tokens
    assert policy.generate == 2048 * forward
    assert policy.update == 2048 * forward * (3 + 1)  # and the reference's log-probs
    assert sft is None  # bytes are no tokens
    text = format_plan(plan())
    assert "2.05k tokens sampled, 2.05k trained" in text
    assert "How long it takes is not known" in text


def test_time_is_that_of_an_earlier_run() -> None:
    Path("runs/try").mkdir(parents=True)
    Path("runs/try/summary.json").write_text('{"seconds": 1234.5}')
    assert "The run in runs/try took 1,234 s." in format_plan(plan())
