"""The reward `http` against servers that fail: no failed sample is scored, and an outage pauses the run."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers import make_tiny_model
from rewards.score_server import serving
from rewards.scoring import make_rollouts, make_scorer

from posttrain.cli import main
from posttrain.rewards import outage

ATTEMPT = 1.5
"""Seconds of an attempt where hangs are injected; nothing else may take so long, however busy the machine."""


def score_of(text):
    return len(text) % 8 / 7


def http(server, **args):
    return {
        "name": "style",
        "use": "http",
        "args": {"url": f"{server.url}/score", "timeout": ATTEMPT, **args},
    }


def flaky(seed):
    """A rule with 30 % 503s, 10 % hangs and 5 % garbage."""
    draw = random.Random(seed).random

    def rule(body):
        number = draw()
        fault = 503 if number < 0.3 else "hang" if number < 0.4 else "{garbage" if number < 0.45 else None
        return fault or {"score": score_of(body["completion"])}

    return rule


def assert_counted(counts, server):
    """What a reward has counted is what the server has done."""
    assert counts["requests"] == len(server.seen)
    assert counts["http_503"] == server.acts[503]
    assert counts["timeouts"] == server.acts["hang"]
    assert counts["garbage"] == server.acts["{garbage"]
    assert counts["connection_errors"] == 0
    assert all(server.acts[act] for act in (503, "hang", "{garbage"))


def test_what_is_sent_and_what_is_understood():
    def rule(body):
        return {"1": {"points": 1}, "null": {"points": None}, "1.5": {"points": 1.5, "more": []}}[
            body["completion"]
        ]

    columns = {"level": 3, "weights": (1.0, float("nan"))}
    with serving(rule) as server:
        rollouts = make_rollouts(["1", "null", "1.5"], answer="42", **columns)
        spec = http(server, score_key="points", range=[0, 2], headers={"X-Team": "a"}, version=3)
        with make_scorer(spec) as scorer:
            report = scorer.score(rollouts)
        assert [rollout.rewards["style"] for rollout in rollouts] == [1.0, None, 1.5]
        assert report.rewards["style"].not_applicable == 1
        assert rollouts[0].reward_versions["style"].startswith("3 sha256:")
        method, path, body, headers = next(seen for seen in server.seen if seen[2]["completion"] == "1")
    assert (method, path, headers["X-Team"]) == ("POST", "/score", "a")
    assert body == {
        "prompt": "What?",
        "completion": "1",
        "answer": "42",
        "columns": {"level": 3, "weights": [1.0, None]},
        "example_id": "row-0",
    }


def test_anything_else_is_no_score():
    answers = [{"score": "1"}, {"score": True}, {"score": [1]}, {}, [1], 1.5, "NaN", '{"score": NaN}', "null"]
    with serving(lambda body: answers[int(body["completion"])]) as server:
        rollouts = make_rollouts([str(number) for number in range(len(answers))])
        with make_scorer(http(server, retries=1)) as scorer:
            report = scorer.score(rollouts)
    assert [rollout.reward for rollout in rollouts] == [None] * len(answers)
    assert report.rewards["style"].errors == {"exception": len(answers)}
    assert report.rewards["style"].counts == {
        "requests": 2 * len(answers), "retries": len(answers), "garbage": 2 * len(answers)
    }  # fmt: skip
    assert "RewardError: http://127.0.0.1" in rollouts[0].reward_errors["style"]


def test_a_failed_sample_is_never_scored(monkeypatch):
    """Two servers with faults: every value is one that a server gave, and every fault is counted."""
    texts = ["x" * length for length in range(80)]
    rollouts = make_rollouts(texts)
    with serving(flaky(1)) as first, serving(flaky(2)) as second:
        specs = [http(first, retries=2), {**http(second, retries=2), "name": "tone"}]
        with make_scorer(*specs, say=lambda text: None) as scorer:
            report = scorer.score(rollouts)
        for name, server in (("style", first), ("tone", second)):
            assert_counted(report.rewards[name].counts, server)
            scored = [rollout for rollout in rollouts if rollout.rewards[name] is not None]
            assert all(rollout.rewards[name] == score_of(rollout.completion.text) for rollout in scored)
            assert len(scored) == server.acts["answer"]
            assert len(scored) + report.rewards[name].errors["exception"] == len(rollouts)
            assert report.rewards[name].errors["exception"] > 0
            for rollout in rollouts:
                assert (rollout.rewards[name] is None) == (name in rollout.reward_errors)
    assert all((rollout.reward is None) == bool(rollout.reward_errors) for rollout in rollouts)


def test_a_rate_is_kept():
    rollouts = make_rollouts([str(number) for number in range(21)])
    with serving(lambda body: {"score": 1}) as server, make_scorer(http(server, rate=20)) as scorer:
        scorer.score(rollouts)
    assert len(server.times) == 21
    # They leave a second apart, the first and the last. The first may arrive late, the others not early.
    assert server.times[-1] - server.times[0] >= 0.5


# --- in a run

RECIPE = """\
name: {name}
seed: 0
output_dir: runs
model: {{path: model}}
data: {{train: {{task: arithmetic, size: 20}}}}
rollout: {{max_tokens: 6}}
rewards:
  - {{name: style, use: http, args: {{url: "{url}/score", timeout: {attempt}, retries: {retries}}}}}
  - {{name: length_penalty, weight: 0.1, args: {{max_tokens: 6, buffer: 6}}}}
reward_options: {{workers: 1}}
stages: [{{policy: {{steps: 2, prompts_per_step: 2, group_size: 4, save_steps: 1}}}}]
"""
PER_STEP = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("http")
    make_tiny_model(folder / "model")
    return folder


@pytest.fixture(autouse=True)
def _in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


def train(name, server, retries=1):
    """Exit code of a run that this server scores."""
    values = {"name": name, "url": server.url, "retries": retries, "attempt": ATTEMPT}
    Path(f"{name}.yaml").write_text(RECIPE.format(**values))
    return main(["train", f"{name}.yaml"])


def metrics(name):
    return [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]


def left_by(name):
    """What a run has made: rollouts with their rewards, and weights."""
    rollouts = [
        pq.read_table(path).select(["completion", "reward", "reward/style", "logprobs", "status"]).to_pylist()
        for path in sorted(Path("runs", name, "rollouts", "01-policy").iterdir())
    ]
    return rollouts, Path("runs", name, "models", "01-policy", "model.safetensors").read_bytes()


class Disturbed:
    """A rule: the server is away from the second step on, until `back` is called.

    With a seed it has faults before and after that, but at most two of them for a sample.
    """

    def __init__(self, away=True, seed=None):
        self.fault = flaky(seed) if seed is not None else lambda body: None
        self.faults = Counter()
        self.answered = 0
        self.leaves = away
        self.away = False

    def back(self):
        self.leaves = self.away = False

    def __call__(self, body):
        self.away = self.away or (self.leaves and self.answered == PER_STEP)
        if self.away:
            return 503
        sample = body["example_id"], body["completion"]
        act = self.fault(body) if self.faults[sample] < 2 else None
        if isinstance(act, int | str):
            self.faults[sample] += 1
            return act
        self.answered += 1
        return {"score": score_of(body["completion"])}


@pytest.fixture(scope="module")
def undisturbed(folder):
    here = Path.cwd()
    os.chdir(folder)
    with serving(Disturbed(away=False)) as server:
        assert train("undisturbed", server) == 0
    try:
        return left_by("undisturbed")
    finally:
        os.chdir(here)


def test_a_run_pauses_and_what_it_learns_is_the_same(undisturbed, monkeypatch, capsys):
    """An outage, and faults before and after it."""
    rule = Disturbed(seed=0)  # every kind of fault is among the first sixteen
    wait, waits = outage.Pause.wait, []

    def come_back_in_the_second_pause(self):
        waits.append(1)
        if len(waits) == 2:
            rule.back()
        wait(self)

    monkeypatch.setattr(outage, "FIRST_WAIT", 0.2)
    monkeypatch.setattr(outage.Pause, "wait", come_back_in_the_second_pause)
    with serving(rule) as server:
        assert train("disturbed", server, retries=2) == 0
    assert left_by("disturbed") == undisturbed
    lines = metrics("disturbed")
    counts = Counter()
    for line in lines:
        counts.update({key.rpartition("/")[2]: n for key, n in line.items() if "/style/counts/" in key})
    assert_counted(counts, server)
    assert [line.get("rewards/style/paused", 0) for line in lines] == [0, 1]
    assert 0.6 <= lines[1]["rewards/style/paused_seconds"] <= lines[1]["seconds/score"]
    assert not any("errors" in key for line in lines for key in line)
    said = Path("runs/disturbed/logs/run.log").read_text()
    assert said.count("Paused, as reward style is away: http://127.0.0.1") == 1
    assert said.count("Reward style answers again: going on after a pause of ") == 1
    assert "Paused, as reward style is away" in capsys.readouterr().out


def test_a_pause_that_is_stopped_and_one_that_is_too_long(undisturbed, monkeypatch, capsys):
    """Both end the run in good order, with one sentence, and it can be resumed."""
    rule = Disturbed()
    wait = outage.Pause.wait

    def stop_in_the_pause(self):
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        wait(self)

    with serving(rule) as server:
        with monkeypatch.context() as patch:
            patch.setattr(outage, "FIRST_WAIT", 300.0)
            patch.setattr(outage.Pause, "wait", stop_in_the_pause)
            assert train("stopped", server) == 128 + signal.SIGTERM
        assert "To go on: posttrain resume runs/stopped" in capsys.readouterr().err
        assert [line["step"] for line in metrics("stopped")] == [1]

        recipe = Path("runs/stopped/recipe.yaml")
        recipe.write_text(recipe.read_text().replace("max_outage: 3600.0", "max_outage: 0.5"))
        assert main(["resume", "runs/stopped"]) == 1
        (error,) = [line for line in capsys.readouterr().err.splitlines() if "away" in line]
        assert error.startswith("reward 'style' was away for ")
        assert "and reward_options.max_outage is 0.5 s: http://127.0.0.1:" in error
        assert "status 503" in error

        rule.back()
        assert main(["resume", "runs/stopped"]) == 0
    assert left_by("stopped") == undisturbed
