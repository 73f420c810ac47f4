"""The same recipe on one process and on two, under every backend, with real processes over gloo."""

from __future__ import annotations

import argparse
import json
import math
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.run
from accelerate.commands.launch import launch_command, launch_command_parser
from helpers import make_tiny_model
from transformers import AutoModelForCausalLM

CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"
BACKENDS = {"ddp": "ddp_8gpu", "zero2": "zero2_8gpu", "fsdp2": "fsdp2_8gpu", "zero3": "zero3_8gpu"}

RECIPE = """
name: run
model: {{path: {model}}}
data:
  train: {{task: arithmetic, size: 40, split: train, args: {{max_terms: 3, min_terms: 3}}}}
  eval: {{task: arithmetic, size: 7, split: test, args: {{max_terms: 3, min_terms: 3}}}}
rollout: {{engine: transformers, max_tokens: 8, max_model_len: 96}}
rewards: [{{name: "{folder}/even.py:even"}}]
reward_options: {{workers: 1}}
stages:
  - policy:
      steps: 5
      prompts_per_step: 5
      group_size: 4
      micro_batch_tokens: 120
      loss: {{kl: 0.05, entropy: 0.01}}
      optimizer: {{learning_rate: 1e-3, max_grad_norm: 0.1}}
"""
REWARD = '''
def even(completions, **columns):
    """The share of characters with an even code."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(ord(x) % 2 == 0 for x in text) / max(len(text), 1) for text in texts]
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
    (folder / "even.py").write_text(REWARD)
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


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trained_weights(run: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(next((run / "models").iterdir())).state_dict()


SAME = ("reward", "tokens/sampled", "tokens/trained", "completions/mean_length", "reward_std")


def assert_same_steps(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> float:
    """The largest relative difference of a loss or a gradient norm."""
    assert len(one) == len(other)
    worst = 0.0
    for left, right in zip(one, other, strict=True):
        for key in SAME:
            assert left[key] == pytest.approx(right[key], rel=1e-12), (key, left["step"])
        for key in ("loss", "grad_norm"):
            assert left[key] == pytest.approx(right[key], rel=1e-4, abs=1e-7), (key, left["step"])
            worst = max(worst, abs(left[key] - right[key]) / max(abs(left[key]), 1e-3))
    return worst


@pytest.fixture(scope="module")
def alone(ranks: Ranks, recipe: Path) -> Path:
    return train(ranks, recipe, "alone")


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_processes_do_what_one_does(ranks: Ranks, recipe: Path, alone: Path, backend: str) -> None:
    run = train(ranks, recipe, backend, backend=backend, world=2)
    worst = assert_same_steps(metrics(alone), metrics(run))
    print(backend, worst, [line["loss"] for line in metrics(run)])
    expected, weights = trained_weights(alone), trained_weights(run)
    assert expected.keys() == weights.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5, msg=name)
        assert math.isfinite(float(weight.sum()))
