"""Memory per device, by what is split over devices; lengths of data; risks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.recipe import risks
from posttrain.recipe.devices import layout_of
from posttrain.recipe.known_models import known_config
from posttrain.recipe.lengths import lengths_of
from posttrain.recipe.library import FOLDER
from posttrain.recipe.load import load_recipe
from posttrain.recipe.memory import Memory
from posttrain.recipe.model_info import find_model_info, read_model_info
from posttrain.recipe.plan import Plan, format_plan, make_plan
from posttrain.recipe.schema import DataSource

RECIPE = """\
name: try
model: {path: model, dtype: bfloat16}
data:
  train: {jsonl: rows.jsonl}
rollout: {max_tokens: 64}
rewards: [math_answer]
stages:
  - policy: {steps: 10, prompts_per_step: 16, group_size: 4}
"""
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-8B-Base": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
}


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Callable[..., Path]) -> None:
    monkeypatch.chdir(tmp_path)
    model_folder()
    Path("try.yaml").write_text(RECIPE)
    Path("rows.jsonl").write_text(json.dumps({"prompt": "x" * 20, "answer": "1"}) + "\n")


def plan(*overrides: str) -> Plan:
    return make_plan(load_recipe("try.yaml", overrides))


def phases(*overrides: str) -> dict[str, Memory]:
    return {phase.phase: phase for phase in plan(*overrides).memory[0]}


def launched(name: str) -> str:
    return f"launch={{config_file: {FOLDER / 'accelerate' / name}.yaml}}"


@pytest.mark.parametrize(
    ("name", "weights", "gradients", "optimizer"),
    [
        ("ddp_8gpu", 1, 1, 1),
        ("zero2_8gpu", 1, 8, 8),
        ("zero3_8gpu", 8, 8, 8),
        ("fsdp2_8gpu", 8, 8, 8),
        ("two_nodes", 16, 16, 16),
    ],
)
def test_what_is_split_over_devices(name: str, weights: int, gradients: int, optimizer: int) -> None:
    whole = 4 * (read_model_info(Path("model")).parameters or 0)
    update = phases(launched(name))["update"]
    assert update.parts["weights"] == whole // weights
    assert update.parts["gradients"] == whole // gradients
    assert update.parts["optimizer"] == 2 * whole // optimizer
    assert ("gathered" in update.parts) == (weights > 1)
    assert update.host == 8 * whole  # each of a machine's eight processes loads all of it
    # Where weights are split, the engine has a copy, in bfloat16, that a sync fills.
    sync = phases(launched(name)).get("sync")
    assert (sync is not None) == (weights > 1)
    if sync is not None:
        assert sync.parts["engine weights"] == whole // 2


def test_offload_and_a_file_of_deepspeed_s_own() -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    Path("zero.json").write_text(json.dumps({"zero_optimization": zero}))
    Path("ds.yaml").write_text(
        "distributed_type: DEEPSPEED\nnum_processes: 4\n"
        "deepspeed_config: {deepspeed_config_file: zero.json}\n"
    )
    made = plan("launch={config_file: ds.yaml}")
    assert (made.layout.backend, made.layout.processes, made.layout.offload_optimizer) == ("zero3", 4, True)
    assert made.memory[0][1].parts["optimizer"] == 0
    assert "4 processes, ZeRO-3" in format_plan(made)
    assert layout_of(load_recipe("try.yaml", ["launch={num_processes: 2}"]).recipe).text == "2 processes, DDP"


def test_the_budget_bounds_activations_and_the_longest_row_breaks_it() -> None:
    base = "rollout.max_tokens=200"
    small, large = (
        phases(base, f"stages.policy.micro_batch_tokens={tokens}")["update"].parts["activations"]
        for tokens in (1000, 2000)
    )
    assert large == 2 * small
    longest = phases(base, "stages.policy.micro_batch_tokens=10")["update"].parts["activations"]
    assert longest == pytest.approx(small * (200 + 52) / 1000)  # 20 bytes and a chat template's
    assert phases(base, "stages.policy.gradient_checkpointing=true")["update"].total < small * 16


def test_the_optimizer_s_state_is_its_own() -> None:
    adam, eight, lion = (
        phases(f"stages.policy.optimizer.name={name}")["update"].parts["optimizer"]
        for name in ("adamw_torch", "adamw_bnb_8bit", "lion_32bit")
    )
    assert (adam, adam, adam) == (4 * eight, 2 * lion, adam)


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_shapes_have_the_published_parameters(name: str) -> None:
    found = find_model_info(name)
    assert found is not None
    assert found[0].parameters == pytest.approx(
        PUBLISHED[name], rel=1e-4
    )  # biases and some norms are left out
    assert known_config("org/model") is None


def test_the_hub_s_cache_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Callable[..., Path]
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert find_model_info("org/model") is None
    cache = tmp_path / "hub" / "models--org--model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "model" / "config.json").rename(cache / "snapshots" / "abc" / "config.json")
    found = find_model_info("org/model")
    assert found is not None
    assert (found[0].layers, found[1]) == (4, "in the hub's cache")


# --- lengths -----------------------------------------------------------------------------------------------


def test_bytes_bound_tokens_where_the_tokenizer_is_not_read() -> None:
    Path("rows.jsonl").write_text(
        '{"prompt": "é", "answer": "1", "done": "ab"}\n\n{"prompt": "abc", "done": "a"}\n'
    )
    source = DataSource(
        jsonl="rows.jsonl", format="text", columns={"completion": "done"}, template="<{prompt}>"
    )
    known = lengths_of(source, "model")
    assert known is not None
    assert (known.rows, known.prompt, known.completion, known.both, known.exact) == (2, 3 + 10, 3, 15, False)
    assert lengths_of(DataSource(hub="org/data"), "model") is None
    assert lengths_of(DataSource(task="arithmetic", size=5), "org/model") is None  # would import numpy


def test_tokens_of_the_tiny_reasoner_are_counted() -> None:
    source = DataSource(task="arithmetic", size=50, format="text")
    known = lengths_of(source, str(FOLDER.parent / "data" / "tiny-reasoner"))
    assert known is not None
    assert known.exact
    assert known.completion is not None
    assert known.prompt < known.completion < known.both


# --- risks -------------------------------------------------------------------------------------------------


def told(*overrides: str) -> str:
    return "\n".join(plan(*overrides).risks)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ["rollout.max_tokens=1000"],
            "prompts of jsonl rows.jsonl have up to 52 bytes, so perhaps as many tokens",
        ),
        (
            ["data.train={hub: org/data}"],
            "hub org/data (train) are is known when they are read; those above 960",
        ),
        (["data.train.columns.answer=null"], "reward math_answer never applies"),
        (
            ["rewards=[math_answer, {name: format, args: {tags: [think, answer]}}]"],
            "reward format asks for <think>, which neither system message nor template",
        ),
        (["rewards=[{name: length_penalty, args: {max_tokens: 512, buffer: 64}}]"], "it never fires"),
        ([], "nothing says before it how often the rewards fire"),
        ([], "12% of groups where 50% are right"),
        (["stages.policy.dynamic_sampling=2"], "up to 2 rounds replace them"),
        ([], "a step takes 16 prompts and there are 1: some are in it twice"),
        ([], "policy: no checkpoints (save_steps)"),
    ],
)
def test_risks_are_told(overrides: list[str], text: str) -> None:
    assert text in told(*overrides)


def test_what_is_no_risk_is_not_told() -> None:
    Path("rows.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n' * 100)
    quiet = told(
        "stages.policy.save_steps=5",
        "rewards=[math_answer, {name: format, args: {tags: [think]}}]",
        'data.train.template="{prompt} Write <think> first."',
    )
    assert "zero-variance" in quiet
    for text in ("never", "prompts of", "nothing says before", "twice", "checkpoints", "memory"):
        assert text not in quiet.replace(
            "nothing says before it how often the rewards fire; if they never", ""
        )


def test_a_machine_that_is_too_small_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(risks, "available_memory", lambda: 1000)
    monkeypatch.setattr(risks, "DEVICE", Path("no-such-device"))
    assert "out of memory: policy takes up to" in told()
    monkeypatch.setattr(risks, "available_memory", lambda: 2**40)
    assert "out of memory" not in told()


def test_vllm_s_share_counts_when_a_gpu_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "vllm" else find(name))
    base = (
        "model={path: Qwen/Qwen3-1.7B, dtype: bfloat16}",
        "rollout.engine=vllm",
        "rollout.max_model_len=1024",
    )
    made = plan(*base)
    needed = risks.device_needed(made.loaded.recipe, made.memory)
    update = made.memory[0][1]
    engine = update.parts["engine weights"] + update.parts["KV cache"]
    assert needed == int((update.total - engine) / 0.7)
    assert "of which vLLM takes 30%" in format_plan(made)
