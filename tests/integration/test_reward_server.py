"""The servers of reward models: `posttrain rewards serve`, and the one that runs share by themselves."""

from __future__ import annotations

import contextlib
import http.client
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from helpers import make_tiny_model
from rewards.scoring import make_rollouts
from rewards.tiny_reward_model import make_reward_model

from posttrain.cli import main
from posttrain.errors import RewardError, RewardUnavailable
from posttrain.recipe.schema import RewardModelConfig, RewardOptions, RewardSpec
from posttrain.rewards import model_server
from posttrain.rewards.checkpoint import find_checkpoint
from posttrain.rewards.lease import Room
from posttrain.rewards.model import RewardModel
from posttrain.rewards.model_reward import ModelReward
from posttrain.rewards.registry import RewardInfo
from posttrain.rewards.scorer import Scorer
from posttrain.rewards.serve import MAX_SAMPLES
from posttrain.rewards.serve import main as serve_shared

PAIRS = [(f"What is {n} + {n}?", "It is " + "so " * (n * 7 % 23) + str(2 * n)) for n in range(48)]
TOKEN = "tok-canary"
OPTIONS = "--port 0 --batch-tokens 2000 --max-length 200 --token-env SERVER_TOKEN"


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return make_reward_model(tmp_path_factory.mktemp("reward_model"))


@pytest.fixture(scope="module")
def direct(path):
    """Scores of the model in this process."""
    model = RewardModel(RewardModelConfig(path=str(path)))
    return lambda pairs: [score.value for score in model.score(pairs)]


@pytest.fixture(scope="module", autouse=True)
def runtime():
    """A folder for shared servers, whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", folder)
        patch.setattr(model_server, "IDLE_SECONDS", 1.0)
        yield Path(folder)
        left = [process.pid for process in servers()]
        assert left == [], "servers are left"


def servers() -> list[psutil.Process]:
    """The shared servers of this test's folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if "posttrain.rewards.serve" in command and os.environ["XDG_RUNTIME_DIR"] in command:
                found.append(process)
    return found


def wait_until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


# --- posttrain rewards serve ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(path):
    """Host and port of a server started from the command line; it ends in good order."""
    process = subprocess.Popen(
        [sys.executable, "-m", "posttrain", *f"rewards serve {path} {OPTIONS}".split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "SERVER_TOKEN": TOKEN},
    )
    try:
        line = process.stdout.readline()
        assert line.startswith(f"Serving {path} (sequence, float32 on "), process.stderr.read()
        yield re.search(r"at http://(127.0.0.1:\d+)$", line)[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()


def ask(server, route, body=None, token=TOKEN, method=None):
    """Status and answer of one request; `body` is bytes, or what JSON is made of."""
    connection = http.client.HTTPConnection(server, timeout=30)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body)
    connection.request(
        method or ("GET" if body is None else "POST"), route, data, {"Authorization": f"Bearer {token}"}
    )
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, json.loads(text) if text.startswith("{") else text


def samples(pairs):
    return {"samples": [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]}


def test_what_a_server_says_about_itself(server, path):
    assert ask(server, "/health", token="none") == (200, {"status": "ok"})
    status, info = ask(server, "/info")
    assert status == 200
    checkpoint = find_checkpoint(RewardModelConfig(path=str(path)))
    assert (info["model"], info["sha256"], info["revision"]) == (str(path), checkpoint.sha256(), None)
    assert (info["labels"], info["head"], info["max_length"]) == (["LABEL_0"], "sequence", 200)
    assert info["settings"]["batch_tokens"] == 2000


def test_many_clients_get_what_the_model_says_and_share_batches(server, direct):
    before = counts(server)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda pair: ask(server, "/score", samples([pair])), PAIRS))
    assert {status for status, _ in answers} == {200}
    assert [answer["scores"][0] for _, answer in answers] == pytest.approx(direct(PAIRS), abs=1e-5)
    status, answer = ask(server, "/score", samples(PAIRS))
    assert status == 200
    assert answer["scores"] == pytest.approx(direct(PAIRS), abs=1e-5)
    assert answer["errors"] == [None] * len(PAIRS)
    after = counts(server)

    def added(name):
        return after[f"posttrain_reward_{name}"] - before.get(f"posttrain_reward_{name}", 0)

    assert added('requests_total{path="/score",status="200"}') == len(PAIRS) + 1
    assert added("samples_total") == 2 * len(PAIRS)
    assert added("tokens_total") == 2 * sum(answer["tokens"]) == added("batch_tokens_total")
    assert added("batch_samples_sum") == 2 * len(PAIRS)
    assert added("batch_samples_count") < len(PAIRS)
    assert added('batch_samples_bucket{le="+Inf"}') == added("batch_samples_count")
    assert after["posttrain_reward_queue_samples"] == 0


def counts(server):
    status, text = ask(server, "/metrics")
    assert status == 200
    return {name: float(value) for name, value in re.findall(r"^([^#]\S*) (\S+)$", text, re.MULTILINE)}


def test_truncation_and_samples_that_cannot_be_scored(server):
    pairs = [("p" * 500, "yes"), ("short", "x" * 300), ("short", "yes")]
    status, answer = ask(server, "/score", samples(pairs))
    assert status == 200
    assert answer["truncated"] == [True, False, False]
    assert answer["tokens"][0] == 200
    assert [score is None for score in answer["scores"]] == [False, True, False]
    assert answer["errors"][1].startswith("the completion alone has 302 tokens")


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"body": b"{"}, 400, "the body is not valid JSON"),
        ({"body": [1]}, 422, "the body has to be"),
        ({"body": {"samples": []}}, 422, "the body has to be"),
        ({"body": {"samples": ["a"]}}, 422, r"samples\[0\] is not an object"),
        ({"body": {"samples": [{"prompt": "a"}]}}, 422, r"samples\[0\].completion is not a text"),
        (
            {"body": {"samples": [{"completion": "a", "prompt": [{"role": "user"}]}]}},
            422,
            "neither a text nor",
        ),
        ({"body": samples([("a", "b")] * (MAX_SAMPLES + 1))}, 413, "at most 4096"),
        ({"body": b" " * (65 * 2**20)}, 413, "more than 64 MiB"),
        ({"body": samples([("a", "b")]), "token": "wrong"}, 401, "the bearer token is missing or wrong"),
        ({"route": "/scores"}, 404, "there is no GET /scores; there are POST /score"),
        ({"method": "GET"}, 405, "there is no GET /score"),
    ],
)
def test_bad_requests_are_refused_in_a_sentence(server, request_, status, message):
    answered, answer = ask(server, **{"route": "/score", **request_})
    assert answered == status
    assert re.search(message, answer["error"])


def test_a_reward_at_a_url(server, path, direct, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    config = RewardModelConfig(url=f"http://{server}", token_env="MY_TOKEN")
    rollouts = make_rollouts([text for _, text in PAIRS[:6]] + ["x" * 300], group_size=7, prompt="p" * 190)
    with Scorer([RewardSpec(name="rm")], RewardOptions(workers=1), models={"rm": config}) as scorer:
        report = scorer.score(rollouts)
    info = scorer.infos["rm"]
    checkpoint = find_checkpoint(RewardModelConfig(path=str(path)))
    assert (info.kind, info.sha256, info.origin) == ("reward model", checkpoint.sha256(), f"http://{server}")
    assert rollouts[0].reward_versions == {"rm": info.fingerprint}
    assert [rollout.rewards["rm"] is None for rollout in rollouts] == [False] * 6 + [True]
    assert "the completion alone has" in rollouts[6].reward_errors["rm"]
    assert report.rewards["rm"].counts["truncated"] == 6
    monkeypatch.setenv("MY_TOKEN", "wrong")
    with pytest.raises(RewardError, match=r"refuses the token \(401\)"):
        Scorer([RewardSpec(name="rm")], RewardOptions(workers=1), models={"rm": config})


def test_what_cannot_be_served(path, server, capsys, tmp_path, monkeypatch):
    def refused(*arguments):
        code = main(["rewards", "serve", *map(str, arguments)])
        return code, capsys.readouterr().err

    port = server.rpartition(":")[2]
    taken = f"posttrain rewards serve: 127.0.0.1 port {port} cannot be used: Address already in use.\n"
    assert refused(path, "--port", port) == (2, taken)
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("busy")
        listener.listen()
        assert refused(path, "--socket", "busy") == (
            2,
            "posttrain rewards serve: another server answers at busy.\n",
        )
    code, message = refused("./nowhere", "--port", 0)
    assert code == 1
    assert message.startswith("there is no folder ./nowhere, and the hub does not give it")
    assert refused(path, "--label", 5, "--port", 0)[1].endswith("has no label 5; there are 0 (LABEL_0)\n")
    assert refused(path, "--batch-tokens", "many")[1].startswith("posttrain rewards serve: --batch-tokens: ")
    assert refused(path, "--head", "toke")[0] == 2


# --- shared servers ---------------------------------------------------------------------------------------

RECIPE = """
name: rewarded
output_dir: {out}
model: {{path: {model}}}
data:
  train: {{task: arithmetic, size: 40, split: train, args: {{max_terms: 3, min_terms: 3}}}}
  eval: {{task: arithmetic, size: 6, split: test, args: {{max_terms: 3, min_terms: 3}}}}
rollout: {{max_tokens: 8, max_model_len: 96}}
reward_models:
  quality: {{path: {reward_model}}}
rewards:
  - quality
  - {{name: twice, from: {out}/my_models.py}}
reward_options: {{workers: 1}}
stages:
  - policy: {{steps: 2, prompts_per_step: 3, group_size: 4, optimizer: {{learning_rate: 1e-3}}}}
  - evaluate: {{samples: 2, metrics: [pass@1], rewards: [quality]}}
"""
OWN = """
from posttrain import register_reward_model

register_reward_model("twice", path="{reward_model}")
"""


@pytest.fixture(scope="module")
def kept():
    """This process uses its servers until the stack is closed, whatever its runs and scorers do."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(model_server.keep_servers())
        yield stack


@pytest.fixture(scope="module")
def run(path, kept, tmp_path_factory):
    """A finished run of two stages with two rewards that are the same model, and the one server it had."""
    folder = tmp_path_factory.mktemp("run")
    policy = make_tiny_model(folder / "policy")
    places = {"out": folder, "model": policy, "reward_model": path}
    (folder / "rewarded.yaml").write_text(RECIPE.format(**places))
    (folder / "my_models.py").write_text(OWN.format(**places))
    assert servers() == []
    assert main(["train", str(folder / "rewarded.yaml")]) == 0
    (server,) = servers()
    return folder / "rewarded", server


def test_a_run_has_one_server_for_all_its_stages_and_rewards(run, path, direct):
    folder, server = run
    logs = "".join(log.read_text() for log in (folder / "logs").glob("reward_model_*.log"))
    assert logs.count("Serving") == 1
    assert f"Serving {path}, process {server.pid}\n" in logs
    assert os.getpgid(server.pid) == server.pid  # no signal for this process reaches it
    rooms = list(Path(os.environ["XDG_RUNTIME_DIR"]).glob("posttrain-*/*"))
    assert [room.stat().st_mode & 0o777 for room in (rooms[0].parent, *rooms)] == [0o700, 0o700]

    trained = read_rows(folder / "rollouts" / "01-policy")
    evaluated = read_rows(folder / "rollouts" / "02-evaluate")
    assert (len(trained), len(evaluated)) == (24, 12)
    rows = [*trained, *evaluated]
    scored = direct([(prompt_of(row["prompt"]), row["completion"]) for row in rows])
    assert [row["reward/quality"] for row in rows] == pytest.approx(scored, abs=1e-5)
    assert [row["reward/twice"] for row in trained] == pytest.approx(scored[:24], abs=1e-5)
    assert len(set(scored)) > 12
    (evaluation,) = json.loads((folder / "summary.json").read_text())["evaluations"]
    assert evaluation["counts"]["rewards/quality/counts/tokens"] > 0


def test_a_run_keeps_its_servers_between_stages(run, tmp_path, monkeypatch):
    # The servers of `run` are kept by this module, too, so it is looked at who keeps them.
    keepers = []
    outside = model_server._keepers
    text = (run[0].parent / "rewarded.yaml").read_text().replace("name: rewarded", "name: again")
    (tmp_path / "again.yaml").write_text(re.sub(r"rewards:\n(  - .*\n)+", "rewards: [quality]\n", text))
    monkeypatch.setattr("posttrain.recipe.run._run_stages", lambda *_: keepers.append(model_server._keepers))
    monkeypatch.setattr("posttrain.recipe.run._finish", lambda *_: None)
    assert main(["train", str(tmp_path / "again.yaml")]) == 0
    assert keepers == [outside + 1]
    assert model_server._keepers == outside


def test_what_is_listed(run, capsys):
    assert main(["rewards", "list", str(run[0] / "recipe.yaml")]) == 0
    lines = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    (quality,) = [line for line in lines if line[0] == "quality"]
    assert quality[1].startswith("local+")
    assert quality[2] == "reward model"
    assert quality[-1].endswith("reward_model0")


def test_a_run_keeps_which_model_it_was(run, path):
    folder, _ = run
    listed = {entry["name"]: entry for entry in json.loads((folder / "rewards.json").read_text())}
    config = RewardModelConfig(path=str(path))
    checkpoint = find_checkpoint(config)
    for name in ("quality", "twice"):
        assert listed[name]["sha256"] == checkpoint.sha256()
        assert listed[name]["version"] == checkpoint.version(config)
        assert (listed[name]["kind"], listed[name]["provenance"]) == ("reward model", str(path))
        assert listed[name]["model"]["path"] == str(path)
    fingerprint = f"{checkpoint.version(config)} sha256:{checkpoint.sha256()[:16]}"
    (versions,) = {row["reward_versions"] for row in read_rows(folder / "rollouts" / "01-policy")}
    assert json.loads(versions) == {"quality": fingerprint, "twice": fingerprint}


def read_rows(folder: Path) -> list[dict]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def prompt_of(rendered: str) -> str:
    """The user's message in a rendered prompt."""
    return re.search(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", rendered, re.DOTALL)[1]


def make_scorer(path: Path, say=print) -> Scorer:
    models = {"rm": RewardModelConfig(path=str(path))}
    return Scorer([RewardSpec(name="rm")], RewardOptions(workers=1), models=models, say=say)


def values_of(scorer: Scorer, pairs) -> list[float | None]:
    rollouts = make_rollouts([text for _, text in pairs])
    scorer.score(rollouts)
    return [rollout.rewards["rm"] for rollout in rollouts]


def test_a_server_that_is_killed_is_started_again(run, path, direct, monkeypatch):
    _, server = run
    lines: list[str] = []
    ensure = model_server.ModelServers.ensure

    def ensure_and_kill(self, names, check):
        ensure(self, names, check)
        monkeypatch.setattr(model_server.ModelServers, "ensure", ensure)
        server.kill()

    monkeypatch.setattr(model_server.ModelServers, "ensure", ensure_and_kill)
    monkeypatch.setattr("posttrain.rewards.model_reward.RETRIES", 1)
    with make_scorer(path, say=lines.append) as scorer:
        values = values_of(scorer, PAIRS)
    assert values == pytest.approx(direct([("What?", text) for _, text in PAIRS]), abs=1e-5)
    assert [line.split(",")[0].split(":")[0] for line in lines] == ["Paused", "Reward rm answers again"]
    assert [process.pid for process in servers()] != [server.pid]


def score_elsewhere(path: Path, folder: Path) -> None:
    """The life of another process that uses the model: it scores, and stays until it is killed."""
    with make_scorer(path) as scorer:
        (folder / "values").write_text(json.dumps(values_of(scorer, PAIRS[:4])))
        (folder / "scored").touch()
        time.sleep(300)


def test_the_last_of_its_users_ends_a_server(kept, run, path, direct, tmp_path):
    (server,) = servers()
    config = RewardModelConfig(path=str(path))
    room = Room.of(config, find_checkpoint(config))
    other = multiprocessing.get_context("fork").Process(target=score_elsewhere, args=(path, tmp_path))
    other.start()
    wait_until((tmp_path / "scored").exists, 60)
    expected = direct([("What?", text) for _, text in PAIRS[:4]])
    assert json.loads((tmp_path / "values").read_text()) == pytest.approx(expected, abs=1e-5)
    kept.close()  # this process uses it no more
    assert servers() == [server]
    other.kill()
    other.join()
    wait_until(lambda: not room.occupied())
    wait_until(lambda: servers() == [])

    # Without another user it ends at once, and who leaves waits for that.
    own = room.move_in()
    room.socket.touch()
    threading.Timer(1.0, os.close, (own,)).start()
    start = time.monotonic()
    room.leave(room.lease(lambda: None), 10.0)
    assert time.monotonic() - start >= 0.9
    assert not room.socket.exists()


def test_a_server_that_cannot_start_says_why(path, tmp_path, monkeypatch):
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho loading >&2\necho 'x cannot be loaded: it is broken' >&2\nexit 1\n")
    failing.chmod(0o755)
    other = shutil.copytree(path, tmp_path / "other")  # for which there is no server
    monkeypatch.setattr(model_server.sys, "executable", str(failing))
    with (
        model_server.keep_servers(),
        pytest.raises(
            RewardError, match=r"'rm': its server did not start: x cannot be loaded: it is broken$"
        ),
    ):
        server_of(other).ensure(lambda: None)


def server_of(path: Path) -> model_server.ModelServer:
    config = RewardModelConfig(path=str(path))
    return model_server.ModelServer(ModelReward(config).declare(RewardInfo("rm")), None)


def test_what_a_shared_server_says_when_it_cannot_start(path, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(path, broken)
    (broken / "model.safetensors").write_bytes(b"")
    config = RewardModelConfig(path=str(broken))
    room = Room.of(config, find_checkpoint(config))
    job = {"model": config.model_dump(mode="json"), "room": str(room.folder), "idle": 1}
    assert serve_shared(json.dumps(job)) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"{broken} cannot be loaded: ")


def test_files_that_change_during_a_run_are_refused(path, tmp_path):
    changing = tmp_path / "changing"
    shutil.copytree(path, changing)
    server = server_of(changing)
    (changing / "config.json").write_text((changing / "config.json").read_text() + "\n")
    with pytest.raises(RewardError, match=r"the files in .*changing were changed during the run"):
        server.ensure(lambda: None)


def test_another_model_at_a_url_is_refused(monkeypatch):
    answers = {"version": "1", "sha256": "aa" * 32}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps(answers).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        config = RewardModelConfig(url=f"http://127.0.0.1:{web.server_port}")
        server = model_server.ModelServer(ModelReward(config).declare(RewardInfo("rm")), None)
        assert (server.info.version, server.info.sha256) == ("1", "aa" * 32)
        server.ensure(lambda: None)
        answers["sha256"] = "bb" * 32
        with pytest.raises(RewardError, match=r"has another model now: 1 sha256:b+, before 1 sha256:a+"):
            server.ensure(lambda: None)
        answers.clear()
        with pytest.raises(RewardError, match="is no `posttrain rewards serve`"):
            server.ensure(lambda: None)
        web.shutdown()
    server.ensure(lambda: None)  # one that is away is waited for by who asks it
    with pytest.raises(RewardUnavailable, match="does not answer"):
        model_server.ModelServer(ModelReward(config).declare(RewardInfo("rm")), None)


def test_a_folder_that_others_can_look_into_is_refused(path, monkeypatch, tmp_path):
    open_to_all = tmp_path / f"posttrain-{os.getuid()}"
    open_to_all.mkdir()
    open_to_all.chmod(0o755)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(RewardError, match="has to be a folder of this user that nobody else can look into"):
        server_of(path)
    open_to_all.rmdir()
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    with pytest.raises(RewardError, match="is too long for a socket; set TMPDIR"):
        server_of(path)
