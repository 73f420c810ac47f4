"""docs/rewards.md, followed by a reader: every block is run in the order in which it stands there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import make_tokenizer

from posttrain.recipe.load import load_recipe
from posttrain.rewards.scorer import Scorer
from posttrain.rollout.types import Completion, Example, Rollout, RolloutRequest, Sampling

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "rewards.md"
ELSEWHERE = "# in another terminal\n"
STAND_INS = (8701, 8702, 8704)
"""Ports of the servers that a reader has: a score, a judge, vLLM."""


class StandIn(BaseHTTPRequestHandler):
    """What those servers answer, each on the routes it has."""

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/score":
            assert self.headers["Authorization"] == "Bearer secret"
            assert set(sent) == {"prompt", "completion", "answer", "columns", "example_id"}
            self._answer({"score": 0.5})
        elif self.path == "/v1/chat/completions":
            assert "Rate how clearly the steps are explained." in sent["messages"][0]["content"]
            message = {"role": "assistant", "content": "The steps are clear.\nScore: 7"}
            usage = {"prompt_tokens": 100, "completion_tokens": 10}
            self._answer({"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage})
        else:
            assert self.path == "/classify"
            self._answer({"data": [{"probs": [-0.25]}], "usage": {"prompt_tokens": 5}})

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self._answer({"data": [{"id": "reward-model", "max_model_len": 128}]})

    def _answer(self, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder as a reader has it: the clone's data, a reward model, servers, and `posttrain` in the PATH."""
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "reward-model")
    config = Qwen2Config(
        vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, num_labels=1, pad_token_id=tokenizer.pad_token_id, max_position_embeddings=128,
    )  # fmt: skip
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path / "reward-model")
    (tmp_path / "data").symlink_to(ROOT / "data")
    command = tmp_path / "bin" / "posttrain"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m posttrain "$@"\n')
    command.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setenv("STYLE_TOKEN", "secret")
    servers = [ThreadingHTTPServer(("127.0.0.1", port), StandIn) for port in STAND_INS]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path
    for server in servers:
        server.shutdown()
        server.server_close()


def bash(script: str) -> str:
    done = subprocess.run(
        ["bash", "-e", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}"
    return done.stdout


def in_another_terminal(script: str) -> subprocess.Popen[bytes]:
    """Start a server that listens at the port in the script, and wait until it is ready."""
    process = subprocess.Popen(["bash", "-c", f"exec {script.strip()}"])
    (port,) = re.findall(r"--port (\d+)", script)
    for _ in range(600):
        assert process.poll() is None, script
        try:
            urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
            return process
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{script} is not ready")


def install(pyproject: str) -> None:
    """What an installer makes of the entry points of a pyproject.toml."""
    folder = Path("my_rewards-1.0.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: my-rewards\nVersion: 1.0\n")
    lines = pyproject.replace('[project.entry-points."posttrain.rewards"]', "[posttrain.rewards]")
    (folder / "entry_points.txt").write_text(lines.replace('"', ""))


def write(code: str) -> None:
    """A file whose name is the first line, or what it goes on with."""
    name, _, continued = code.partition("\n")[0].removeprefix("# ").partition(", ")
    with Path(name).open("a" if continued else "w") as file:
        file.write(code if not continued else "\n\n" + code)


def score(recipes: list[Path]) -> dict[str, set[float | None]]:
    """The values of all rewards that the fragments of recipes list, on two completions."""
    specs, models = {}, {}
    for path in recipes:
        recipe = load_recipe(path).recipe
        models |= recipe.reward_models
        specs |= {spec.name: spec for spec in recipe.rewards}
    tests = [{"call": "square(3)", "expected": 9}]
    text = "```python\ndef square(x):\n    return x * x\n```"
    example = Example("row", [{"role": "user", "content": "What is 40+2?"}], "42", {"tests": tests})
    request = RolloutRequest((1,), example, "group", Sampling(64, n=2))
    rollouts = [Rollout(request, Completion((1, 2), (0.0,) * 2, "stop", text), at, 0) for at in range(2)]
    options = load_recipe("my.yaml").recipe.reward_options.model_copy(update={"workers": 1, "max_outage": 0})
    plain = [spec.model_copy(update={"weight": 1.0, "only_if": None}) for spec in specs.values()]
    with Scorer(plain, options, models=models) as scorer:
        report = scorer.score(rollouts)
    assert report.error_lines == []
    return {name: {rollout.rewards[name] for rollout in rollouts} for name in specs}


def checks(table: str) -> list[tuple[str, str]]:
    """Verdict and name of each check that `posttrain rewards test` prints."""
    return re.findall(r"^  (ok|FAIL|-) +(\w+(?: \w+)?)  ", table, flags=re.MULTILINE)


def test_the_page(reader: Path) -> None:
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    (shown,) = re.findall(r"^```\n(concise, .*?)^```$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    outputs: list[str] = []
    fragments: list[Path] = []
    servers: list[subprocess.Popen[bytes]] = []
    try:
        for language, code in blocks:
            if language == "bash" and code.startswith(ELSEWHERE):
                servers.append(in_another_terminal(code.removeprefix(ELSEWHERE)))
            elif language == "bash":
                outputs.append(bash(code))
            elif language == "toml":
                install(code)
            elif code.startswith("# "):
                write(code)
            else:
                assert language == "yaml", code
                fragments.append(reader / f"fragment-{len(fragments)}.yaml")
                fragments[-1].write_text(f"extends: my.yaml\n{code}")
                load_recipe(fragments[-1])
        values = score(fragments)
    finally:
        for server in servers:
            server.terminate()
            server.wait(30)
    tested, trained, rescored, listed = outputs
    assert checks(tested.partition("concise, version 1")[2]) == checks(shown)
    assert "my_rewards.py:5" in trained
    assert "Report:" in trained
    (line, *_) = (json.loads(line) for line in Path("runs/my-run/metrics.jsonl").read_text().splitlines())
    assert 0 <= line["rewards/concise/mean"] <= 1
    assert "concise" in Path("runs/my-run/report.html").read_text()
    assert "16 equal, 0 different" in rescored
    assert "entry point my_rewards" in listed
    assert values.pop("few_words") == {0.0}
    assert values.pop("ends_well") == values.pop("looked_up") == values.pop("exact_match") == {0.0}
    assert values.pop("shortest") == values.pop("code") == {1.0}
    assert values.pop("style") == {0.5}
    assert values.pop("helpful") == {(7 - 1) / (10 - 1)}
    assert values.pop("pooled") == {-0.25}
    assert values.pop("taste") == values.pop("served") == values.pop("flavour") != {None}
    assert set(values) == {"concise", "trl.rewards:think_format_reward"}
