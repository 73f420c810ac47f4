"""The same recipe on one process and on two, under every backend, with real processes over gloo."""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed.run
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from helpers import make_tiny_model
from peft import AutoPeftModelForCausalLM
from peft.utils import get_peft_model_state_dict
from talker import make_talker, write_recipe
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from posttrain.training.distributed import splits_weights

CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"
BACKENDS = {"ddp": "ddp_8gpu", "zero2": "zero2_8gpu", "fsdp2": "fsdp2_8gpu", "zero3": "zero3_8gpu"}

# What accelerate makes of zero3_8gpu.yaml, but for the threshold: by default DeepSpeed keeps every weight of
# fewer than 100 000 numbers whole, which is all of them in a tiny model.
ZERO3 = {
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu"), "auto"),
    **dict.fromkeys(("gradient_accumulation_steps", "gradient_clipping"), "auto"),
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
RECIPE = """
name: run
model: {{path: {model}}}
data:
  train: {{task: arithmetic, size: 40, split: train, args: {{max_terms: 3, min_terms: 3}}}}
  eval: {{task: arithmetic, size: 5, split: test, args: {{max_terms: 3, min_terms: 3}}}}
rollout: {{max_tokens: 8, max_model_len: 96}}
rewards: [{{name: "{folder}/parts.py:even"}}]
reward_options: {{workers: 1}}
stages:
  - sft: {{max_steps: 2, batch_size: 4, log_every: 1, optimizer: {{learning_rate: 1e-3}}}}
  - policy:
      steps: 5
      prompts_per_step: 5
      group_size: 4
      micro_batch_tokens: 120
      loss: {{kl: 0.05, entropy: 0.01}}
      optimizer: {{learning_rate: 1e-3, max_grad_norm: 0.1}}
  - evaluate: {{samples: 2, metrics: [pass@1, greedy, mean_length]}}
"""
POLICY = "steps: {steps}, group_size: 4, optimizer: {{learning_rate: 1e-3}}, prompts_per_step: {prompts}"
PARTS = '''
import os, signal
from pathlib import Path

from posttrain.methods.base import Method


def even(completions, **columns):
    """The share of characters with an even code."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(ord(x) % 2 == 0 for x in text) / max(len(text), 1) for text in texts]


class Crash(Method):
    """The first time, kills every rank after the third update."""

    name = "crash"

    def after_update(self, context):
        marker = Path(f"crashed-{os.environ['RANK']}")
        if context.step == 2 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
'''


def launched(config: Path, *options: str) -> tuple[dict[str, str], argparse.Namespace]:
    """What `accelerate launch` with a configuration sets in the environment, and asks of torch's launcher."""
    recorded: dict[str, Any] = {}
    before = dict(os.environ)

    def record(arguments: argparse.Namespace) -> None:
        recorded["arguments"] = arguments
        recorded["environment"] = {
            key: value for key, value in os.environ.items() if before.get(key) != value
        }

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed.run, "run", record)
        command = ["--config_file", str(config), *options, "-m", "posttrain"]
        launch_command(launch_command_parser().parse_args(command))
    return recorded["environment"], recorded["arguments"]


class Ranks:
    """Runs command lines on ranks that a server process forks."""

    def __init__(self, folder: Path):
        self.folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("rank_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.jobs = 0

    def run(
        self,
        *arguments: Any,
        target: str = "posttrain",
        backend: str | None = None,
        world: int = 1,
        environment: Mapping[str, str] | None = None,
    ) -> tuple[list[int], str]:
        """Exit codes of the ranks and all their output; one rank without a backend is an ordinary process."""
        shared = dict(environment or {})
        if backend is not None:
            shared |= launched(CONFIGS / f"{BACKENDS[backend]}.yaml", "--num_processes", str(world))[0]
        if backend == "zero3":
            file = self.folder / "zero3.json"
            file.write_text(json.dumps(ZERO3))
            shared |= {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file), "ACCELERATE_CONFIG_DS_FIELDS": ""}
        if world > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {} for rank in range(world)]
        self.jobs += 1
        output = self.folder / f"job-{self.jobs}"
        job = {
            "environments": [{**shared, **rank} for rank in ranks],
            "arguments": [str(argument) for argument in arguments],
            "target": target,
            "output": str(output),
            "folder": str(self.folder),
            "fsdp_on_cpu": backend == "fsdp2" and environment is None,
        }
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        ready, _, _ = select.select([self.server.stdout], [], [], 300)
        texts = [path.read_text() for path in sorted(self.folder.glob(f"{output.name}.*"))]
        assert ready, "the ranks hang:\n" + "\n".join(texts)
        return json.loads(self.server.stdout.readline()), "\n".join(texts)

    def close(self) -> None:
        """End the server and what it has started."""
        if self.server.poll() is None:
            os.killpg(self.server.pid, 9)
        self.server.wait()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "parts.py").write_text(PARTS)
    model = make_tiny_model(folder / "model")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(model=model, folder=folder))
    return path


def train(ranks: Ranks, recipe: Path, name: str, *options: str, **launch: Any) -> Path:
    """The folder of a finished run."""
    output = f"output_dir={ranks.folder}"
    codes, text = ranks.run("train", recipe, f"name={name}", output, *options, **launch)
    assert codes == [0] * len(codes), text
    return ranks.folder / name


def lines(run: Path, kind: str = "policy") -> list[dict[str, Any]]:
    """What a run wrote about the steps of its stages of a kind."""
    metrics = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in metrics if line["kind"] == kind]


def evaluation(run: Path) -> dict[str, Any]:
    return json.loads(next(run.glob("evaluations/*/metrics.json")).read_text())["metrics"]


def weights_of(run: Path, stage: str) -> dict[str, torch.Tensor]:
    """The weights a stage handed on, as plain transformers and peft load them."""
    folder = run / "models" / stage
    if not (folder / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(folder).state_dict()
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    return get_peft_model_state_dict(model)


COUNTS = ("reward", "reward_std", "tokens/sampled", "tokens/trained", "completions/mean_length")


def assert_same_steps(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> None:
    """The same completions and rewards; losses and gradient norms up to the order of float32 sums.

    float32 rounds at 6e-8 of what is summed, and what is summed cancels to a loss thirty times smaller. The
    largest differences seen are 5e-6.
    """
    assert [line["step"] for line in one] == [line["step"] for line in other]
    for left, right in zip(one, other, strict=True):
        for key in (key for key in COUNTS if key in left):
            assert left[key] == pytest.approx(right[key], rel=1e-9), (key, left["step"])
        for key in ("loss", "grad_norm"):
            assert left[key] == pytest.approx(right[key], rel=1e-5), (key, left["step"])


def assert_same_weights(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    """Adam moves a weight whose gradient is all rounding by as much as any other: a few may differ more."""
    assert one.keys() == other.keys()
    differences = torch.cat([(other[name] - weight).abs().flatten() for name, weight in one.items()])
    assert differences.mean() < 1e-7
    assert differences.max() < 1e-3  # the learning rate


@pytest.fixture(scope="module")
def alone(ranks: Ranks, recipe: Path) -> Path:
    """The recipe on one process: supervised, five policy steps, evaluation."""
    return train(ranks, recipe, "alone")


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_processes_do_what_one_does(ranks: Ranks, recipe: Path, alone: Path, backend: str) -> None:
    """Five prompts a step: the ranks have different numbers of prompts and of micro-batches."""
    run = train(ranks, recipe, backend, backend=backend, world=2)
    assert_same_steps(lines(alone, "sft"), lines(run, "sft"))
    assert_same_steps(lines(alone), lines(run))
    for stage in ("01-sft", "02-policy"):
        assert_same_weights(weights_of(alone, stage), weights_of(run, stage))
    assert evaluation(run) == evaluation(alone)
    if backend == "ddp":
        first, last = (weights_of(run, stage) for stage in ("01-sft", "02-policy"))
        assert max((first[name] - last[name]).abs().max() for name in first) > 1e-3  # the steps did something


@pytest.mark.parametrize("backend", ["fsdp2", "zero3"])
def test_split_adapters_and_ranks_without_a_prompt(ranks: Ranks, recipe: Path, backend: str) -> None:
    """One prompt a step is the second rank's; a second stage goes on from the adapter of the first."""
    stage = POLICY.format(steps=2, prompts=1) + ", loss: {kl: 0.05, entropy: 0.01}"
    options = ["model.lora={r: 4}", f"stages=[{{policy: {{{stage}}}}}, {{policy: {{name: more, {stage}}}}}]"]
    one = train(ranks, recipe, f"alone-lora-{backend}", *options)
    two = train(ranks, recipe, f"{backend}-lora", *options, backend=backend, world=2)
    assert_same_steps(lines(one), lines(two))
    for stage in ("01-policy", "02-more"):
        assert_same_weights(weights_of(one, stage), weights_of(two, stage))
        assert not (two / "models" / stage / "reference").exists()


AMFT = """{amft: {
  demonstrations: {task: arithmetic, size: 9, seed: 1, args: {max_terms: 3, min_terms: 3}},
  held_out: {data: {task: arithmetic, size: 9, split: validation, args: {max_terms: 3, min_terms: 3}},
    prompts: 3, evidence: 1},
  batch_size: 5, first: 0, interval: 2, rate: 0.5, entropy_rate: 0.05, warmup_steps: 1}}"""


def test_gradients_compared_by_several_ranks(ranks: Ranks, recipe: Path) -> None:
    """Ranks with unlike shares, under DDP and with adapters whose weights are split: one weight, as alone."""
    stage = f"stages=[{{policy: {{{POLICY.format(steps=4, prompts=3)}, methods: [{AMFT}]}}}}]"
    options = ["model.lora={r: 4}", "rollout.max_model_len=128", " ".join(stage.split())]
    one = lines(train(ranks, recipe, "amft-alone", *options))
    assert [line["amft/mu"] for line in one][:2] == [1.0, 0.5]
    assert sum("amft/meta_gradient" in line for line in one) == 2
    assert len({line["amft/mu"] for line in one}) > 2
    for backend in ("ddp", "fsdp2", "zero3"):
        two = lines(train(ranks, recipe, f"amft-{backend}", *options, backend=backend, world=2))
        assert_same_steps(one[1:], two[1:])
        for left, right in zip(one, two, strict=True):
            for key in (key for key in left if key.startswith("amft/")):
                assert right[key] == pytest.approx(left[key], rel=1e-4, abs=1e-6), (
                    backend,
                    left["step"],
                    key,
                )
    codes, text = ranks.run(
        "train",
        recipe,
        "name=amft-whole",
        f"output_dir={ranks.folder}",
        *options[1:],
        backend="fsdp2",
        world=2,
    )
    assert codes != [0, 0]
    assert "train an adapter (model.lora), or use DDP or ZeRO-2" in text


@pytest.mark.parametrize("backend", ["fsdp2", "zero3"])
def test_weights_of_a_split_model(ranks: Ranks, tmp_path: Path, backend: str) -> None:
    for tie in (True, False):
        make_tiny_model(tmp_path / f"tied-{tie}", tie=tie)
    codes, text = ranks.run(tmp_path, target="weights_are_put_together", backend=backend, world=2)
    assert codes == [0, 0], text


@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero3"])
def test_a_run_of_two_processes_goes_on_where_it_was_killed(ranks: Ranks, recipe: Path, backend: str) -> None:
    method = f'methods: ["{recipe.parent}/parts.py:Crash"]'
    stage = f"stages=[{{policy: {{{POLICY.format(steps=4, prompts=3)}, save_steps: 2, {method}}}}}]"
    arguments = ["train", recipe, stage, f"output_dir={ranks.folder}"]
    for rank in (0, 1):
        (ranks.folder / f"crashed-{rank}").unlink(missing_ok=True)
    name = f"{backend}-killed"
    codes, text = ranks.run(*arguments, f"name={name}", backend=backend, world=2)
    assert -9 in codes, text
    assert [line["step"] for line in lines(ranks.folder / name)] == [1, 2]
    codes, text = ranks.run("resume", ranks.folder / name, backend=backend, world=2)
    assert codes == [0, 0], text
    whole = train(ranks, recipe, f"{backend}-whole", stage, backend=backend, world=2)
    for left, right in zip(lines(whole), lines(ranks.folder / name), strict=True):
        for key in (*COUNTS, "loss", "grad_norm"):
            assert left[key] == right[key], (key, left["step"])
    one, other = weights_of(whole, "01-policy"), weights_of(ranks.folder / name, "01-policy")
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_posttrain_train_starts_accelerate(recipe: Path, alone: Path, tmp_path: Path) -> None:
    """With its configuration. Of a signal to the launcher all processes hear: they agree on the step to stop
    after, and the exit code is theirs.
    """
    launch = f"launch={{num_processes: 2, config_file: {CONFIGS / 'ddp_8gpu.yaml'}}}"
    command = [sys.executable, "-m", "posttrain", "train", str(recipe), launch, f"output_dir={tmp_path}"]
    with subprocess.Popen(
        [*command, "stages.policy.steps=500"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as launcher:
        assert launcher.stdout is not None
        seen = []
        for line in launcher.stdout:
            seen.append(line)
            if "step 2/500" in line:
                launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) == 143, seen
    run = tmp_path / "run"
    assert seen[-1] == f"Stopped by SIGTERM. To go on: posttrain resume {run}\n", seen
    assert_same_steps(lines(alone, "sft"), lines(run, "sft"))
    steps = lines(run)
    common = min(len(steps), len(lines(alone)))
    assert common >= 2
    assert_same_steps(lines(alone)[:common], steps[:common])
    assert [path.name for path in (run / "checkpoints/02-policy").iterdir()] == [f"step-{len(steps):06d}"]


def test_fsdp_that_is_not_to_be_had_is_an_error(ranks: Ranks, recipe: Path) -> None:
    """Accelerate would silently use DDP."""
    environment = launched(CONFIGS / "fsdp2_8gpu.yaml", "--num_processes", "2")[0]
    output = f"output_dir={ranks.folder}"
    codes, text = ranks.run("train", recipe, "name=silent", output, world=2, environment=environment)
    assert codes != [0, 0]
    assert "told to use FSDP, but accelerate uses MULTI_CPU" in text
    assert "Traceback" not in text


def test_a_launcher_that_starts_one_process_of_several_is_noticed(ranks: Ranks, recipe: Path) -> None:
    """`accelerate launch --cpu --num_processes 2` sets this, and starts one process."""
    environment = {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    codes, text = ranks.run("train", recipe, "name=single", environment=environment)
    assert codes == [1]
    assert "accelerate was asked for several processes" in text


def test_single_gpu_configuration() -> None:
    config = load_config_from_file(str(CONFIGS / "single_gpu.yaml"))
    assert config.distributed_type == DistributedType.NO
    assert config.num_processes == 1


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "single_gpu"])
def test_configurations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerate makes of each file, up to the processes that it would start."""
    options = ["--machine_rank", "1"] if name == "two_nodes" else []
    environment, arguments = launched(CONFIGS / f"{name}.yaml", *options)
    assert arguments.nproc_per_node == "8"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    if name == "two_nodes":
        assert (arguments.nnodes, arguments.node_rank) == ("2", 1)
        assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("static", "node0:29500")
    if name in ("fsdp2_8gpu", "two_nodes"):
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2
        assert plugin.reshard_after_forward is True
        assert plugin.cpu_ram_efficient_loading is False
        assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
        assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    if name.startswith("zero"):
        plugin = DeepSpeedPlugin()
        assert plugin.zero_stage == int(name[4])
        assert plugin.gradient_clipping == "auto"  # the Trainer fills in the recipe's
        assert plugin.gradient_accumulation_steps == "auto"
        assert plugin.offload_optimizer_device == "none"
        assert plugin.zero3_save_16bit_model == (name == "zero3_8gpu")
    assert splits_weights() == (name in ("fsdp2_8gpu", "two_nodes", "zero3_8gpu"))


PREFERENCES = """
name: run
model: {{path: {model}}}
stages:
  - annotate_preferences: {{data: {{jsonl: {pairs}}}, members: 1, treatment: none, {options}}}
  - reward_model:
      data: {{stage: annotate_preferences}}
      eval: {{jsonl: {pairs}, limit: 11}}
      log_every: 1
      batch_size: 4
      optimizer: {{learning_rate: 1e-3, name: sgd}}
"""


def test_reward_models_are_those_of_one_process(ranks, recipe):
    """Votes, metrics, weights and held-out scores; eleven of these, so that their last batch is not full."""
    rows = [{"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": "no" * (1 + n % 3)} for n in range(16)]
    pairs = ranks.folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = "batch_size: 4, optimizer: {learning_rate: 1e-3, name: sgd}"
    path = ranks.folder / "preferences.yaml"
    path.write_text(PREFERENCES.format(model=recipe.parent / "model", pairs=pairs, options=options))
    alone = train(ranks, path, "preferences-alone")
    both = train(ranks, path, "preferences-ddp", backend="ddp", world=2)
    votes = [
        pq.read_table(run / "data/01-annotate_preferences/rows.parquet")["votes"] for run in (alone, both)
    ]
    assert len(votes[0]) == 16
    torch.testing.assert_close(*(torch.tensor(v.to_pylist()) for v in votes), rtol=0, atol=1e-4)
    assert len(lines(alone, "reward_model")) == 4
    for one, two in zip(lines(alone, "reward_model"), lines(both, "reward_model"), strict=True):
        for name in ("loss", "accuracy", "gap", "reward", "grad_norm"):
            assert two[name] == pytest.approx(one[name], abs=1e-4), name
    weights = [
        AutoModelForSequenceClassification.from_pretrained(run / "models/02-reward_model").state_dict()
        for run in (alone, both)
    ]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-4, msg=name)
    held_out = [
        json.loads((run / "evaluations/02-reward_model/metrics.json").read_text()) for run in (alone, both)
    ]
    assert held_out[0]["pairs"] == held_out[1]["pairs"] == 11
    assert held_out[1]["gap"] == pytest.approx(held_out[0]["gap"], abs=1e-3)


def test_students_on_two_processes_are_those_of_one(ranks: Ranks, tmp_path: Path) -> None:
    """Each process trains students of its own; the promoted one may be the other's."""
    recipe = write_recipe(
        tmp_path, make_talker(tmp_path / "talker"), steps=2, promotion={"threshold": -2.0, "window": 1}
    )
    one = train(ranks, recipe, "students-alone")
    two = train(ranks, recipe, "students-on-two", backend="ddp", world=2)
    counted = [
        [
            {key: value for key, value in line.items() if key != "time" and "seconds" not in key}
            for line in lines(run, "soar")
        ]
        for run in (one, two)
    ]
    assert counted[0] == counted[1]
    assert [line["promotions"] for line in counted[0]] == [1, 2]
    journals = [path.read_text().split() for path in sorted((two / "journal/01-soar").iterdir())]
    assert len(journals) == 2
    assert all(journals)
    for name in ("01-soar", "01-soar-teacher"):
        left, right = weights_of(one, name), weights_of(two, name)
        assert all(torch.equal(weight, right[key]) for key, weight in left.items())
