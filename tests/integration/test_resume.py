"""Runs that are killed or stopped anywhere and resumed end as if nothing had happened: bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from helpers import make_tiny_model
from integration.forked_runs import Ended, RunServer

from posttrain.recipe.run_state import RunLock

KILLS = 20
RECIPE = """
name: {name}
output_dir: runs
model: {{path: model{model}}}
data:
  train: {{task: arithmetic, size: 40, split: train, args: {{max_terms: 3, min_terms: 3}}}}
  eval: {{task: arithmetic, size: 4, split: test, args: {{max_terms: 3, min_terms: 3}}}}
rollout: {{max_tokens: 10, max_model_len: 96, stop: [a, b, c, d, e, f, g, h, i, j, k, A, B, C, D, "+", "="]}}
rewards: {rewards}
stages:
  - sft: {{epochs: 1.2, batch_size: 16, save_steps: {save}, log_every: 2, optimizer: {{learning_rate: 1e-3}}}}
  - policy:
      steps: {steps}
      prompts_per_step: 3
      group_size: 4
      updates_per_batch: {updates}
      save_steps: {save}
      loss: {{kl: {kl}}}
      methods: ["methods.py:Remembering"]
      optimizer: {{learning_rate: 1e-3, schedule: linear}}
  - evaluate: {{}}
"""
PREFERENCES = """
name: {name}
output_dir: runs
model: {{path: model}}
stages:
  - annotate_preferences: {{name: votes, data: {{jsonl: pairs.jsonl}}, members: 2, max_steps: 2, {shared}}}
  - reward_model: {{data: {{stage: votes}}, max_steps: 4, save_steps: 1, {shared}}}
"""
SHARED = "batch_size: 4, optimizer: {learning_rate: 1e-3, schedule: linear}"
METHOD = '''
from posttrain.methods.base import Channel, Method


class Remembering(Method):
    """A channel of rewards minus their mean over all steps so far, which it has to remember."""

    name = "remembering"
    sum, count = 0.0, 0

    def channels(self, batch, context):
        rewards = {rollout.id: rollout.reward for rollout in batch}
        self.sum, self.count = self.sum + sum(rewards.values()), self.count + len(rewards)
        mean = self.sum / self.count
        noise = context.rng.normal(0, 0.1)
        return [Channel("surprise", {key: value - mean + noise for key, value in rewards.items()}, 0.5)]

    def state_dict(self):
        return {"sum": self.sum, "count": self.count}

    def load_state_dict(self, state):
        self.sum, self.count = state["sum"], state["count"]
'''
IN_PROCESS = "[{name: length_penalty, args: {max_tokens: 10, buffer: 10}}]"
WORKERS = '[{name: length_penalty, args: {max_tokens: 10, buffer: 10}}, "rewards.py:digits"]'
REWARD = """
def digits(completions, **columns):
    return [sum(x.isdigit() for x in str(text)) / 10 for text in completions]
"""


class Server(RunServer):
    """Runs of the recipe above."""

    def train(self, name: str, *, trigger: dict[str, Any] | None = None, **options: Any) -> Ended:
        values = {"model": "", "rewards": IN_PROCESS, "steps": 3, "updates": 2, "save": 1, "kl": 0}
        (self.folder / f"{name}.yaml").write_text(RECIPE.format(name=name, **values | options))
        return self.run("train", f"{name}.yaml", trigger=trigger)

    def resume(self, name: str, trigger: dict[str, Any] | None = None) -> Ended:
        return self.run("resume", f"runs/{name}", trigger=trigger)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("resume")
    make_tiny_model(folder / "model")
    (folder / "methods.py").write_text(METHOD)
    (folder / "rewards.py").write_text(REWARD)
    server = Server(folder)
    yield server
    server.close()


@pytest.fixture(scope="module")
def straight(server) -> tuple[Ended, dict[str, Any]]:
    """A run that nothing happened to: how it went, and what it left."""
    done = server.train("straight")
    assert done.code == 0, done.output
    return done, traces(server.folder / "runs" / "straight")


def traces(run: Path) -> dict[str, Any]:
    """All that a run computed: hashes of the models, metrics, rollouts.

    Times are left out, and how many rewards came from the cache: it has those of lost work, too.
    """
    kept: dict[str, Any] = {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.glob("models/*/*.safetensors"))
    }
    for line in (run / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        kept[f"{metrics['stage']} {metrics['step']}"] = {
            key: value
            for key, value in metrics.items()
            if key not in ("time", "rewards/cache_hits") and not key.startswith("seconds/")
        }
    for path in sorted(run.glob("rollouts/*/*.parquet")):
        kept[str(path.relative_to(run))] = pq.read_table(path).to_pylist()
    summary = json.loads((run / "summary.json").read_text())
    kept["tokens"] = summary["tokens_sampled"], summary["tokens_trained"]
    return kept


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name] == value, name


def test_the_straight_run_has_something_to_lose(straight):
    """Every step has a loss and a gradient, and the weights change in both training stages."""
    _, kept = straight
    steps = [value for name, value in kept.items() if name.startswith("02-policy ")]
    assert len(steps) == 6
    assert all(abs(step["loss"]) > 0 and step["grad_norm"] > 0 for step in steps)
    weights = [value for name, value in kept.items() if name.endswith("model.safetensors")]
    assert len(set(weights)) == 2


def test_killed_anywhere(server, straight):
    """20 seeded instants: in generation, scoring, backward, while a checkpoint is written or published.

    A run is resumed to be killed again, until it is at its end; then the next one is started.
    """
    done, expected = straight
    chance = random.Random(0)
    names = list(done.spans)
    assert set(names) == {"generate", "score", "backward", "save", "publish"}
    story: list[dict[str, Any]] = []  # of one run
    kills = runs = 0
    while kills < KILLS or story:
        trigger = None
        if kills < KILLS:
            point = names[kills % len(names)]
            call = chance.randrange(len(done.spans[point]) // 2)
            delay = chance.random() * done.spans[point][call]
            trigger = {"point": point, "call": call, "delay": delay, "signal": signal.SIGKILL}
        name = f"killed-{runs}"
        ended = server.resume(name, trigger) if story else server.train(name, trigger=trigger)
        if ended.code == -signal.SIGKILL:
            kills += 1
            story.append(trigger)
            continue
        assert ended.code == 0, (story, ended.output)
        assert_same(traces(server.folder / "runs" / name), expected)
        assert not list((server.folder / "runs" / name).rglob(".writing*"))
        story, runs = [], runs + 1
    assert runs >= 3


def test_stages_of_preferences_that_are_killed(server):
    """While the third of four models that vote is trained, in a step of the reward model, in a checkpoint."""
    pairs = [{"prompt": f"{n % 8}+1=", "chosen": str(n), "rejected": str(n + 1)} for n in range(24)]
    (server.folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for name in ("pairs", "pairs-killed"):
        (server.folder / f"{name}.yaml").write_text(PREFERENCES.format(name=name, shared=SHARED))
    done = server.run("train", "pairs.yaml")
    assert done.code == 0, done.output
    assert len(done.spans["backward"]) == 4 * 2 + 4
    assert server.run("train", "pairs-killed.yaml", trigger=kill("backward", 4)).code == -signal.SIGKILL
    assert server.resume("pairs-killed", kill("backward", 4 + 2)).code == -signal.SIGKILL
    killed = server.resume("pairs-killed", kill("publish", 0))
    assert killed.code == -signal.SIGKILL
    resumed = server.resume("pairs-killed")
    assert resumed.code == 0, resumed.output
    runs = server.folder / "runs"
    log = (runs / "pairs-killed" / "logs" / "run.log").read_text()
    assert "2 of 4 models have voted before" in log
    assert log.count("resumed from runs/pairs-killed/checkpoints/02-reward_model/step-000002") == 2
    assert_same(traces(runs / "pairs-killed"), traces(runs / "pairs"))
    votes = [next((runs / name / "data").rglob("*.parquet")) for name in ("pairs-killed", "pairs")]
    assert pq.read_table(votes[0]).equals(pq.read_table(votes[1]))


def kill(point: str, call: int) -> dict[str, Any]:
    return {"point": point, "call": call, "delay": 0, "signal": signal.SIGKILL}


def test_stopped_after_every_update(server, straight):
    """One update a process: with two updates on a batch, every other checkpoint holds a half-used batch."""
    _, expected = straight
    trigger = {"point": "backward", "call": 0, "delay": 0, "signal": signal.SIGTERM}
    stopped = server.train("stopped", save="null", trigger=trigger)
    run = server.folder / "runs" / "stopped"
    attempts = 1
    while stopped.code != 0:
        assert stopped.code == 143, stopped.output
        assert "Traceback" not in stopped.output
        assert stopped.output.rstrip().endswith("Stopped by SIGTERM. To go on: posttrain resume runs/stopped")
        attempts += 1
        stopped = server.resume("stopped", trigger)
    # The last update of a stage needs no checkpoint: the stage ends, and then the run stops.
    assert attempts == 4 + 6 + 1
    assert [path.name for path in sorted(run.glob("checkpoints/02-policy/*"))] == [
        "step-000004",
        "step-000005",
    ]
    assert_same(traces(run), expected)
    log = (run / "logs" / "run.log").read_text()
    assert "resumed from runs/stopped/checkpoints/02-policy/step-000003" in log
    assert log.count("stopped by SIGTERM") == attempts - 1


def test_a_second_signal_stops_at_once(server, straight):
    trigger = {"point": "backward", "call": 5, "delay": 0, "signal": signal.SIGINT, "times": 2}
    stopped = server.train("twice", trigger=trigger, rewards=WORKERS)
    assert stopped.code == -signal.SIGINT  # a shell reports 130
    assert stopped.output.rstrip().endswith("a second signal stops at once.")
    assert_no_process_of(server)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_where_there_are_no_steps_a_signal_stops_at_once(server, straight, tmp_path, number, code):
    """In the evaluation, the last call for rollouts. The run is resumed from another working directory."""
    done, expected = straight
    trigger = {"point": "generate", "call": len(done.spans["generate"]) - 1, "delay": 0, "signal": number}
    name = f"evaluating-{code}"
    stopped = server.train(name, trigger=trigger)
    assert stopped.code == code
    assert stopped.output.rstrip().endswith(f"To go on: posttrain resume runs/{name}")
    resumed = server.run("resume", str(server.folder / "runs" / name), folder=tmp_path)
    assert resumed.code == 0, resumed.output
    assert "01-sft was finished before\n── 02-policy was finished before\n" in resumed.output
    assert_same(traces(server.folder / "runs" / name), expected)


def assert_no_process_of(server: Server) -> None:
    """No worker outlives its run for long; the command line of each has the folder in it."""
    deadline = time.monotonic() + 10
    while left := [
        p for p in psutil.process_iter(["cmdline"]) if str(server.folder) in str(p.info["cmdline"])
    ]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_a_run_in_use_is_refused(server, straight):
    run = server.folder / "runs" / "used"
    run.mkdir()
    (run / "recipe.yaml").write_text("name: used\n")
    with RunLock(run) as lock:
        lock.acquire()
        (server.folder / "used.yaml").write_text((server.folder / "straight.yaml").read_text())
        refused = server.run("train", "used.yaml", "name=used", "--overwrite")
    assert refused.code == 2
    assert refused.output == f"run folder runs/used is in use by process {os.getpid()}\n"


def test_worker_processes_and_adapters(server):
    """Rewards in processes of their own; LoRA with a frozen copy of the adapter as the reference."""
    options = {"model": ", lora: {r: 4}", "rewards": WORKERS, "kl": 0.1, "steps": 2}
    assert server.train("adapter", **options).code == 0
    expected = traces(server.folder / "runs" / "adapter")
    for call in (1, 4):
        trigger = {"point": "backward", "call": 2 + call, "delay": 0, "signal": signal.SIGKILL}
        name = f"adapter-{call}"
        assert server.train(name, **options, trigger=trigger).code == -signal.SIGKILL
        resumed = server.resume(name)
        assert resumed.code == 0, resumed.output
        assert_same(traces(server.folder / "runs" / name), expected)
    assert_no_process_of(server)


def test_checkpoints_load_without_posttrain(server, straight, monkeypatch):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(server.folder)  # an adapter names its base as the recipe did
    runs = server.folder / "runs"
    full = sorted((runs / "straight/checkpoints/02-policy").iterdir())[-1]
    model = AutoModelForCausalLM.from_pretrained(full)
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()
    adapter = sorted((runs / "adapter/checkpoints/02-policy").iterdir())[-1]
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    assert any("lora_B" in name and parameter.any() for name, parameter in model.named_parameters())


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(server, straight, damage):
    _, expected = straight
    trigger = {"point": "backward", "call": 9, "delay": 0, "signal": signal.SIGKILL}
    assert server.train(damage, trigger=trigger).code == -signal.SIGKILL
    run = server.folder / "runs" / damage
    before, newest = sorted((run / "checkpoints/02-policy").iterdir())
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "cut":
        del content[-100:]
        problem = f"model.safetensors has {len(content)} bytes instead of {len(content) + 100}"
    else:
        content[len(content) // 2] ^= 1
        problem = "model.safetensors is not what was written: its SHA-256 differs"
    weights.write_bytes(content)
    resumed = server.resume(damage)
    assert resumed.code == 0, resumed.output
    where = newest.relative_to(server.folder)
    assert f"checkpoint {where} is damaged and not used: {problem}\n" in resumed.output
    assert f"resumed from {before.relative_to(server.folder)}\n" in resumed.output
    assert_same(traces(run), expected)


def test_a_finished_run_is_left_alone(server, straight):
    resumed = server.resume("straight")
    assert (resumed.code, resumed.output) == (0, "The run in runs/straight is finished.\n")


def test_what_cannot_be_resumed(server, straight):
    none = server.run("resume", "runs/none")
    assert none.code == 2
    assert none.output == "runs/none is not the folder of a run that can be resumed: it has no state.json\n"
