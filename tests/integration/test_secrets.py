"""Canaries in the environment of a whole run: they appear in nothing that it writes or prints."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers import make_tiny_model

from posttrain.cli import main

CANARIES = {
    "HF_TOKEN": "canary-hf-0b7e4d",
    "OPENAI_API_KEY": "canary-openai-93aa01",
    "WANDB_API_KEY": "canary-wandb-5d21fe",
    "STYLE_TOKEN": "canary-style-c0ffee",
    "DB_PASSWORD": "canary-db-777abc",
}
RECIPE = """
name: leaky
model: {{path: {model}}}
data:
  train: {{task: arithmetic, size: 20, split: train}}
  eval: {{task: arithmetic, size: 4, split: test}}
rollout: {{max_tokens: 6}}
rewards:
  - numeric_match
  - {{name: leaky, from: leaky.py, args: {{ask: DB_PASSWORD}}}}
  - name: style
    use: http
    args: {{url: "http://127.0.0.1:{port}/score", token_env: STYLE_TOKEN, retries: 0}}
reward_options: {{on_error: drop, workers: 1}}
report_to: [tensorboard]
stages:
  - policy: {{steps: 2, prompts_per_step: 2, group_size: 2, save_steps: 1, methods: ["failing.py:Failing"]}}
  - evaluate: {{}}
"""
REWARD = '''
import os

from posttrain import reward


@reward("leaky", deterministic=False)
def leaky(completion, example, ask):
    """Fails on every second completion, and tells what it should not."""
    if completion.token_ids[0] % 2:
        raise ValueError(f"login with {os.environ[ask]} and {os.environ['OPENAI_API_KEY']} was refused")
    return 1.0
'''
METHOD = """
import os

from posttrain.methods.base import Method


class Failing(Method):
    name = "failing"

    def extend(self, batch, context):
        if "LEAKY_FAILS" in os.environ:
            raise RuntimeError(f"no upload with {os.environ['HF_TOKEN']}")
        return batch
"""


class Echo(BaseHTTPRequestHandler):
    """Repeats the token in an error, once in two requests."""

    asked = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        Echo.asked += 1
        data = json.dumps({"score": 0.5}).encode()
        if Echo.asked % 2:
            data = f"bad token {self.headers['Authorization']}".encode()
        self.send_response(400 if Echo.asked % 2 else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "leaky.py").write_text(REWARD)
    (tmp_path / "failing.py").write_text(METHOD)
    path = tmp_path / "leaky.yaml"
    path.write_text(RECIPE.format(model=make_tiny_model(tmp_path / "model"), port=server.server_address[1]))
    yield path
    server.shutdown()
    server.server_close()


def leaks(text: str) -> list[str]:
    return [name for name, value in CANARIES.items() if value in text]


def contents(folder: Path) -> str:
    """Everything that the files of a folder hold, parquet read and the rest as bytes, and their names."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    tables = [str(pq.read_table(path).to_pylist()) for path in files if path.suffix == ".parquet"]
    return "\n".join([*map(str, files), *tables, *(path.read_bytes().decode("latin-1") for path in files)])


def test_canaries_are_in_nothing_that_a_run_writes_or_prints(recipe, monkeypatch, capfd, caplog):
    assert main(["train", str(recipe)]) == 0
    run = recipe.parent / "runs" / "leaky"
    written = contents(run)
    assert leaks(written) == []
    rows = [row for file in (run / "rollouts").rglob("*.parquet") for row in pq.read_table(file).to_pylist()]
    errors = " ".join(row["reward_errors"] for row in rows)
    assert "login with [DB_PASSWORD] and [OPENAI_API_KEY] was refused" in errors
    assert "bad token Bearer" in errors
    assert list(run.rglob("events.out.tfevents.*"))

    # The traceback of one that fails.
    monkeypatch.setenv("LEAKY_FAILS", "1")
    assert main(["train", str(recipe), "name=failing"]) == 1
    printed = "".join(capfd.readouterr()) + caplog.text
    assert "RuntimeError: no upload with [HF_TOKEN]" in printed
    assert leaks(printed) == []
    assert leaks(contents(recipe.parent / "runs" / "failing")) == []
