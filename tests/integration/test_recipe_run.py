"""Whole recipes, started as a user starts them; where that is not the point, in forks of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers import make_tiny_model
from integration.forked_runs import RunServer

RECIPE = """
name: small
output_dir: {out}
model: {{path: {model}}}
data:
  train: {{task: arithmetic, size: 40, split: train, args: {{max_terms: 3, min_terms: 3}}}}
  eval: {{task: arithmetic, size: 12, split: test, args: {{max_terms: 3, min_terms: 3}}}}
rollout: {{engine: {engine}, max_tokens: 8, max_model_len: 96, kv_cache_gib: 0.25}}
rewards:
  - {reward}
  - {{name: "{out}/digits.py:digits", weight: 0.5}}
reward_options: {{workers: 1}}
stages:
  - sft: {{max_steps: 2, batch_size: 8, log_every: 1, optimizer: {{learning_rate: 1e-3}}}}
  - evaluate: {{name: before, samples: 2, metrics: [pass@1, pass@2, maj@2, greedy, mean_length]}}
  - policy: {{steps: 2, prompts_per_step: 3, group_size: 4, optimizer: {{learning_rate: 1e-3}}}}
  - evaluate: {{name: after, samples: 2, metrics: [pass@1, pass@2, maj@2, greedy, mean_length]}}
"""
REWARD = '''
def digits(completions, **columns):
    """TRL's signature: the share of digits."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(x.isdigit() for x in text) / max(len(text), 1) for text in texts]
'''


def posttrain(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "posttrain", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[RunServer]:
    server = RunServer(tmp_path_factory.mktemp("runs"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def write_recipe(
    folder: Path, model: Path, engine: str = "transformers", reward: str = "numeric_match"
) -> Path:
    (folder / "digits.py").write_text(REWARD)
    recipe = folder / "small.yaml"
    recipe.write_text(RECIPE.format(out=folder, model=model, engine=engine, reward=reward))
    return recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model) -> tuple[Path, str]:
    """The recipe of a run in a process of its own, and what it printed."""
    recipe = write_recipe(tmp_path_factory.mktemp("trained"), model, reward="math_answer")
    done = posttrain("train", recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    return recipe, done.stdout


# Of the other two pairs, one is in the engines' contract, and one in the tests of resuming.
def test_a_recipe_runs_through_all_stages(trained):
    recipe, printed = trained
    assert_complete(recipe.parent, printed, "model.safetensors")


def test_a_recipe_with_vllm_and_an_adapter_runs_through_all_stages(tmp_path, model):
    recipe = write_recipe(tmp_path, model, "vllm", "math_answer")
    done = posttrain("train", recipe, "model.lora={r: 4}", "stages.policy.loss.kl=0.01")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_complete(tmp_path, done.stdout, "adapter_model.safetensors")


def assert_complete(folder: Path, printed: str, weights: str) -> None:
    run = folder / "small"

    summary = json.loads((run / "summary.json").read_text())
    assert summary["accuracy_before"]["n"] == summary["accuracy_after"]["n"] == 12
    assert summary["seconds"] > 0
    assert summary["tokens_sampled"] > summary["tokens_trained"] > 0
    assert {*summary["stages"][2]["phases"]} == {"generate", "score", "update", "sync"}

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "policy"]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line["sampling/logprob_difference"] < 1e-4 for line in steps)
    assert all(0 <= line["rewards/math_answer/mean"] <= 1 for line in steps)

    rollouts = pq.read_table(run / "rollouts" / "03-policy" / "step-000001.parquet").to_pylist()
    assert len(rollouts) == 12
    for row in rollouts:
        assert row["status"] == "trained"
        assert len(row["completion_ids"]) == len(row["logprobs"]) == len(row["advantage/outcome"])
    samples = pq.read_table(run / "rollouts" / "04-after" / "samples.parquet").to_pylist()
    assert len(samples) == 12 * 3
    assert {row["correct"] for row in samples} <= {True, False}

    assert (run / "models" / "03-policy" / weights).is_file()
    assert (run / "recipe.yaml").is_file()
    listed = {entry["name"]: entry for entry in json.loads((run / "rewards.json").read_text())}
    assert set(listed) == {"math_answer", f"{folder}/digits.py:digits"}
    for row in [*rollouts, *samples]:
        for name, version in json.loads(row["reward_versions"]).items():
            assert version == f"{listed[name]['version']} sha256:{listed[name]['sha256'][:16]}"
    assert (run / "cache" / "rewards" / "0.jsonl").stat().st_size > 0
    assert "<html" in (run / "report.html").read_text()
    assert "Report:" in printed


def test_a_trained_adapter_can_be_evaluated(runs, tmp_path, model):
    recipe = write_recipe(tmp_path, model)
    trained = runs.run(
        "train", str(recipe), "model.lora={r: 4}", "stages=[{sft: {max_steps: 1, batch_size: 4}}]"
    )
    assert trained.code == 0, trained.output
    done = runs.run("evaluate", str(recipe), "--model", str(tmp_path / "small" / "models" / "01-sft"))
    assert done.code == 0, done.output
    assert (tmp_path / "small-evaluate-01-sft" / "summary.json").is_file()


def test_a_run_is_repeatable_and_a_seed_changes_it(runs, trained):
    """The first was a process of its own: its hashes of text, and so the order of its sets, are others."""
    recipe, _ = trained
    for name, seed in (("two", 0), ("three", 1)):
        done = runs.run("train", str(recipe), f"name={name}", f"seed={seed}")
        assert done.code == 0, done.output
    weights = [
        (recipe.parent / name / "models" / "03-policy" / "model.safetensors").read_bytes()
        for name in ("small", "two", "three")
    ]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_a_batch_can_be_sampled_ahead(runs, tmp_path, model):
    recipe = write_recipe(tmp_path, model)
    policy = "steps: 3, prompts_per_step: 3, group_size: 4, overlap: 1, optimizer: {learning_rate: 1e-3}"
    done = runs.run("train", str(recipe), f"stages=[{{policy: {{{policy}}}}}]")
    assert done.code == 0, done.output
    lines = [json.loads(line) for line in (tmp_path / "small" / "metrics.jsonl").read_text().splitlines()]
    mismatch = [line["sampling/logprob_difference"] for line in lines]
    assert mismatch[0] < 1e-5 < min(mismatch[1:])  # later batches are of weights one step old
    folder = tmp_path / "small" / "rollouts" / "01-policy"
    versions = [set(pq.read_table(file)["policy_version"].to_pylist()) for file in sorted(folder.iterdir())]
    assert versions == [{0}, {0}, {1}]


def test_a_gate_that_is_not_passed_stops_the_run_and_resume_says_so(runs, tmp_path, model):
    """The model stays the same, and with it every answer: no worse than before, and no better."""
    recipe = write_recipe(tmp_path, model)
    stages = ", ".join(
        f"{{evaluate: {{name: {name}, samples: 2, metrics: [pass@1, mean_length]{gate}}}}}"
        for name, gate in (
            ("first", ""),
            ("no-worse", ", advance_if: pass@1 > baseline - 0.5"),
            ("better", ", advance_if: mean_length < no-worse"),
            ("never", ""),
        )
    )
    run = tmp_path / "small"
    stopped = runs.run("train", str(recipe), f"stages=[{stages}]")
    state = json.loads((run / "state.json").read_text())
    resumed = runs.run("resume", str(run))
    sentence = (
        "03-better stops the run: its gate mean_length < no-worse was not passed, since the 95% interval of "
        "the paired difference over 12 problems, [+0.000, +0.000], is not below 0."
    )
    for ended in (stopped, resumed):
        assert ended.code == 3, ended.output
        lines = [line.strip() for line in ended.output.splitlines()]
        assert lines[-1] == sentence
        assert any(line.startswith("gate pass@1 > baseline - 0.5: passed, the 95% in") for line in lines)
        assert [line.split()[0] for line in lines[-4:-1]] == ["metric", "mean_length", "pass@1"]
        assert lines[-4].split()[1:] == ["02-no-worse", "03-better", "difference", "interval", "problems"]
    assert [stage["stage"] for stage in state["stages"]] == ["01-first", "02-no-worse", "03-better"]
    decided = [stage["summary"].get("gate", {}).get("passed") for stage in state["stages"]]
    assert decided == [None, True, False]
    assert not state["finished"]
    assert json.loads((run / "state.json").read_text()) == state
    assert not (run / "summary.json").exists()
    assert not (run / "rollouts" / "04-never").exists()


def test_an_existing_run_is_not_touched_without_being_told_to(runs, tmp_path, model):
    recipe = write_recipe(tmp_path, model)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "precious.txt").write_text("mine")
    refused = runs.run("train", str(recipe))
    assert refused.code == 2
    assert "exists already" in refused.output
    assert "Traceback" not in refused.output
    not_a_run = runs.run("train", str(recipe), "--overwrite")
    assert not_a_run.code == 2
    assert "not the folder of a run" in not_a_run.output
    assert (tmp_path / "small" / "precious.txt").read_text() == "mine"


def test_prompts_that_do_not_fit_are_refused_or_left_out(runs, tmp_path, model):
    recipe = write_recipe(tmp_path, model)
    options = ["rollout.max_model_len=20", "stages=[{policy: {steps: 1, prompts_per_step: 2}}]"]
    refused = runs.run("train", str(recipe), *options)
    assert refused.code == 1
    assert "prompts are too long" in refused.output
    assert "Traceback" not in refused.output
