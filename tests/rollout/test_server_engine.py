"""Routing, retries, restarts and weights of the server engine, on real processes with a stand-in for vLLM."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from fake_replica import BROKEN, BUSY_ONCE, NO_IDS, REFUSED, tokens_for
from helpers import make_tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.errors import RolloutError
from posttrain.recipe.schema import ServerConfig
from posttrain.rollout import guard
from posttrain.rollout.adapter_files import served_rank, why_merged
from posttrain.rollout.pool import MAX_RESTARTS, ReplicaPool
from posttrain.rollout.replica import TRIES, Replica, RequestRefused, free_port
from posttrain.rollout.types import Example, RolloutRequest, Sampling, derive_seed
from posttrain.rollout.vllm_server import VllmServerEngine
from posttrain.rollout.weight_files import checksum, write_weights

FAKE = [sys.executable, str(Path(__file__).parent / "fake_replica.py")]
PATH = "/v1/completions"


def bodies(count: int, first: int = 1) -> list[dict[str, Any]]:
    return [{"model": "base", "prompt": [first, 2], "seed": seed, "max_tokens": 4} for seed in range(count)]


def tokens(answers: list[dict[str, Any]]) -> list[list[int]]:
    return [answer["choices"][0]["token_ids"] for answer in answers]


def expected(count: int, weights: str = "initial") -> list[list[int]]:
    return [tokens_for(weights, body) for body in bodies(count)]


def started(folder: Path, index: int = 0, *options: str) -> Replica:
    return Replica(
        f"replica {index}",
        command=lambda port: [*FAKE, "--port", str(port), *options],
        environment=dict(os.environ),
        log=folder / f"{index}.log",
    )


def pool_of(*replicas: Replica, **options: Any) -> ReplicaPool:
    return ReplicaPool(
        replicas, **{"limit": 4, "timeout": 20.0, "heartbeat": 2.0, "start_timeout": 60.0, **options}
    )


def run(pool: ReplicaPool, act: Callable[[], Any]) -> Any:
    """Open the pool, await `act()`, close the pool; its processes are gone then, whatever happened."""

    async def whole() -> Any:
        pids: set[int] = set()
        try:
            await pool.open()
            pids = {process.pid for r in pool.replicas if r.process for process in family(r)}
            return await act()
        finally:
            await pool.close()
            assert not [pid for pid in pids if alive(pid)]

    return asyncio.run(whole())


def family(replica: Replica) -> list[psutil.Process]:
    assert replica.process is not None
    leader = psutil.Process(replica.process.pid)
    return [leader, *leader.children(recursive=True)]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def server_of(replica: Replica) -> psutil.Process:
    (server,) = psutil.Process(replica.process.pid).children()
    return server


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a replica that runs already."""
    port = free_port()
    log = tmp_path_factory.mktemp("running") / "headers"
    process = subprocess.Popen([*FAKE, "--port", str(port), "--log", str(log)])
    url = f"http://127.0.0.1:{port}"
    asyncio.run(wait_for(url))
    yield url
    process.kill()
    process.wait()


async def wait_for(url: str) -> None:
    pool = pool_of(Replica("it", url=url))
    try:
        await pool.replicas[0].wait_until_healthy(pool.session, 60.0)
    finally:
        await pool.close()


def test_answers_keep_their_order_and_busy_replicas_are_asked_again(running: str) -> None:
    pool = pool_of(Replica("it", url=running))
    answers = run(pool, lambda: pool.complete(PATH, [*bodies(20), *bodies(3, BUSY_ONCE)]))
    assert tokens(answers)[:20] == expected(20)
    assert tokens(answers)[20:] == [tokens_for("initial", body) for body in bodies(3, BUSY_ONCE)]


@pytest.mark.parametrize(
    ("first", "message"), [(REFUSED, "400: .*not liked"), (BROKEN, "500: .*cannot")], ids=["4xx", "5xx"]
)
def test_a_replica_that_is_well_but_fails_is_named(tmp_path: Path, first: int, message: str) -> None:
    log = tmp_path / "headers"
    pool = pool_of(started(tmp_path, 0, "--log", str(log)))
    with pytest.raises(RequestRefused, match=rf"replica 0 \(http://127.*\) answered {PATH} with {message}"):
        run(pool, lambda: pool.complete(PATH, bodies(1, first)))
    assert len(log.read_text().splitlines()) == (TRIES if first == BROKEN else 1)


def test_no_proxy_and_a_key(running: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    log = tmp_path / "headers"
    pool = pool_of(started(tmp_path, 0, "--log", str(log)))
    assert tokens(run(pool, lambda: pool.complete(PATH, bodies(1)))) == expected(1)
    assert log.read_text() == "Bearer secret\n"


def test_requests_go_to_the_least_loaded_replica(running: str, tmp_path: Path) -> None:
    log = tmp_path / "headers"
    slow = started(tmp_path, 0, "--slow", "0.5", "--log", str(log))
    pool = pool_of(slow, Replica("fast", url=running))
    assert tokens(run(pool, lambda: pool.complete(PATH, bodies(60)))) == expected(60)
    assert 4 <= len(log.read_text().splitlines()) < 30


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_lost_replica_is_started_again_and_its_requests_are_drawn_again(tmp_path: Path, fault: int) -> None:
    """The other replica goes on meanwhile; both serve the weights that were loaded before the fault."""
    replicas = [started(tmp_path, index, "--slow", "0.1") for index in (0, 1)]
    pool = pool_of(*replicas, heartbeat=2.0)
    weights = write_weights(tmp_path / "weights", [("w", torch.arange(3.0))])
    loads: list[str] = []

    async def load(replica: Replica) -> None:
        body = {"method": "load_weight_files", "args": [str(tmp_path / "weights"), weights]}
        await replica.post(pool.session, "/collective_rpc", body, 5.0)
        loads.append(replica.label)

    async def act() -> Any:
        pool.load = load
        await pool.each(load)
        victim = server_of(replicas[0])
        asyncio.get_running_loop().call_later(0.3, victim.send_signal, fault)
        answers = await pool.complete(PATH, bodies(120))
        if replicas[0].repair is not None:
            await replicas[0].repair
        assert not alive(victim.pid)
        return answers, await pool.complete(PATH, bodies(120))

    first, second = run(pool, act)
    assert tokens(first) == tokens(second) == expected(120, weights)
    assert pool.restarts == 1
    assert sorted(loads) == ["replica 0", "replica 0", "replica 1"]


def test_a_replica_that_dies_again_and_again_ends_the_call_with_its_log(tmp_path: Path) -> None:
    program = "import sys, time; print('no memory left'); sys.stdout.flush(); time.sleep(0.1); sys.exit(3)"
    replica = started(tmp_path)
    pool = pool_of(replica)

    async def act() -> None:
        replica.command = lambda port: [sys.executable, "-c", program]
        server_of(replica).kill()
        await pool.complete(PATH, bodies(1))

    with pytest.raises(RolloutError, match=r"(?s)was lost 4 times.*no memory left\n.*exit code 3"):
        run(pool, act)
    assert pool.restarts == MAX_RESTARTS


def test_a_failed_start_shows_the_log(tmp_path: Path) -> None:
    pool = pool_of(started(tmp_path, 0, "--nonsense"))
    with pytest.raises(RolloutError, match=r"(?s)cannot be started: it ended.*unrecognized arguments"):
        run(pool, lambda: pool.complete(PATH, []))


def test_a_running_replica_that_is_lost_is_dropped(running: str, tmp_path: Path) -> None:
    lost = started(tmp_path, 0, "--slow", "1.0")
    lost.launch()
    other = Replica("other", url=lost.url)
    pool = pool_of(other, Replica("it", url=running))

    async def act() -> Any:
        asyncio.get_running_loop().call_later(0.15, lost.kill)
        return await pool.complete(PATH, bodies(100))

    asyncio.run(wait_for(lost.url))
    assert tokens(run(pool, act)) == expected(100)
    assert pool.urls == [running]
    with pytest.raises(RolloutError, match=r"replica|other \(.*\) does not answer"):
        run(pool_of(Replica("other", url=lost.url)), lambda: pool.complete(PATH, []))


def test_none_left(tmp_path: Path) -> None:
    lost = started(tmp_path, 0, "--slow", "0.2")
    lost.launch()
    asyncio.run(wait_for(lost.url))
    pool = pool_of(Replica("other", url=lost.url))

    async def act() -> Any:
        asyncio.get_running_loop().call_later(0.1, lost.kill)
        return await pool.complete(PATH, bodies(4))

    with pytest.raises(RolloutError, match=f"no replica is left of {lost.url}"):
        run(pool, act)


def test_another_process_waits_until_the_owner_has_started_a_replica_again(tmp_path: Path) -> None:
    board = tmp_path / "board.json"
    replica = started(tmp_path, 0, "--slow", "0.05")
    owner = pool_of(replica, board=board)

    async def act() -> Any:
        other = pool_of(Replica("replica 0", url=replica.url), board=board, owner=False)
        try:
            await other.open()
            old = replica.url
            asyncio.get_running_loop().call_later(0.2, server_of(replica).kill)
            answers = await other.complete(PATH, bodies(60))
            assert other.replicas[0].url == replica.url != old
            return answers
        finally:
            await other.close()

    assert tokens(run(owner, act)) == expected(60)
    assert owner.restarts == 1


def test_replicas_end_with_a_killed_trainer(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    server = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    trainer = (
        "import os, subprocess, sys, time; subprocess.Popen([sys.executable, '-I', "
        f"{guard.__file__!r}, str(os.getpid()), sys.executable, '-c', {server!r}], start_new_session=True); "
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", trainer])
    deadline = time.monotonic() + 30
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    pid = int(pid_file.read_text())
    assert alive(pid)
    process.kill()
    process.wait()
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


class TestWeightFiles:
    def test_tied_and_strided_weights_and_shards(self, tmp_path: Path, monkeypatch: Any) -> None:
        from safetensors.torch import load_file

        monkeypatch.setattr("posttrain.rollout.weight_files.SHARD_BYTES", 100)
        base = torch.arange(24.0).reshape(4, 6)
        weights = {"a": base, "b": base, "c": base.T, "d": base[:, ::2].to(torch.bfloat16)}
        digest = write_weights(tmp_path / "v1", weights.items())
        files = sorted((tmp_path / "v1").iterdir())
        assert len(files) == 2
        assert digest == checksum(tmp_path / "v1")
        loaded = {name: weight for file in files for name, weight in load_file(file).items()}
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[name], weights[name]) for name in weights)
        assert not list(tmp_path.glob(".*"))

    def test_a_changed_byte_changes_the_checksum(self, tmp_path: Path) -> None:
        digest = write_weights(tmp_path / "v1", [("a", torch.ones(4))])
        (file,) = (tmp_path / "v1").iterdir()
        contents = bytearray(file.read_bytes())
        contents[-1] ^= 1
        file.write_bytes(contents)
        assert checksum(tmp_path / "v1") != digest

    def test_no_files(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no weights"):
            checksum(tmp_path)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def lora(path: Path, **options: Any) -> Any:
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})
    return get_peft_model(AutoModelForCausalLM.from_pretrained(path), config)


class TestAdapters:
    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({}, None),
            ({"use_rslora": True}, None),
            ({"use_dora": True}, "use_dora"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
            ({"r": 32}, "rank is above 16"),
            ({"rank_pattern": {"q_proj": 64}}, "rank is above 16"),
            ({"bias": "lora_only"}, "lora_bias"),
            ({"target_modules": ["q_proj", "embed_tokens"]}, "embeddings or the head"),
            ({"target_modules": ["q_proj", "lm_head"]}, "embeddings or the head"),
        ],
    )
    def test_what_vllm_serves(self, model_path: Path, options: dict[str, Any], reason: str | None) -> None:
        found = why_merged(lora(model_path, **options), 16)
        assert found is None if reason is None else reason in found

    def test_other_models(self, model_path: Path) -> None:
        assert "no adapter" in why_merged(AutoModelForCausalLM.from_pretrained(model_path), 16)
        assert "take no adapters" in why_merged(lora(model_path), None)

    @pytest.mark.parametrize(
        ("rank", "served"), [(None, None), (1, 1), (4, 8), (16, 16), (512, 512), (513, None)]
    )
    def test_served_rank(self, rank: int | None, served: int | None) -> None:
        assert served_rank(rank) == served


def test_two_training_processes_share_the_replicas_of_their_machine(model_path: Path) -> None:
    """The first starts them, sends weights once and starts a killed one again; the second follows it."""
    script = Path(__file__).parent / "replica_rank.py"
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(model_path)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=180)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()


class TestEngineOnARunningReplica:
    """What the engine sends; the stand-in's completions tell its weights and adapter apart."""

    @pytest.fixture
    def engine(self, running: str, model_path: Path, tmp_path: Path) -> Iterator[VllmServerEngine]:
        engine = self.build(model_path, tmp_path, running)
        yield engine
        engine.close()

    @staticmethod
    def build(model_path: Path, folder: Path, *urls: str) -> VllmServerEngine:
        server = ServerConfig(urls=list(urls), heartbeat=2.0, weights_dir=str(folder / "weights"))
        return VllmServerEngine(
            str(model_path), AutoTokenizer.from_pretrained(model_path), server=server, lora_rank=4
        )

    @staticmethod
    def ask(engine: VllmServerEngine, first: int = 1) -> list[tuple[int, ...]]:
        example = Example("one", "text")
        request = RolloutRequest((first, 2), example, "one", Sampling(max_tokens=4, n=3, seed=7))
        return [completion.token_ids for completion in engine.generate([request])[0]]

    @staticmethod
    def answer(weights: str, model: str = "base") -> list[tuple[int, ...]]:
        body = {"model": model, "prompt": [1, 2], "max_tokens": 4}
        return [tuple(tokens_for(weights, {**body, "seed": derive_seed(7, index)})) for index in range(3)]

    def test_weights_are_written_loaded_and_replaced(
        self, engine: VllmServerEngine, model_path: Path, tmp_path: Path
    ) -> None:
        assert engine.max_model_len == 64  # the server's
        model = AutoModelForCausalLM.from_pretrained(model_path)
        for version in (1, 2):
            with torch.no_grad():
                model.lm_head.weight += version
            engine.sync(model)
            assert engine.version == version
            (folder,) = (tmp_path / "weights").iterdir()
            assert self.ask(engine) == self.answer(checksum(folder))

    def test_adapters_are_merged_where_they_are_not_taken(
        self, engine: VllmServerEngine, model_path: Path, tmp_path: Path
    ) -> None:
        engine.sync(lora(model_path))
        (folder,) = (tmp_path / "weights").glob("weights-*-2")
        assert self.ask(engine) == self.answer(checksum(folder))

    def test_adapters_are_sent_without_the_base(self, model_path: Path, tmp_path: Path) -> None:
        replica = started(tmp_path, 0, "--lora")
        replica.launch()
        asyncio.run(wait_for(replica.url))
        engine = self.build(model_path, tmp_path, replica.url)
        try:
            for _ in range(2):
                engine.sync(lora(model_path))
                (adapter,) = (tmp_path / "weights").glob("adapter-*")
                assert {"adapter_config.json", "adapter_model.safetensors"} <= {
                    file.name for file in adapter.iterdir()
                }
                # Nobody knows what a running replica served before: the base is sent, once.
                (base,) = (tmp_path / "weights").glob("weights-*-1")
                assert self.ask(engine) == self.answer(checksum(base), adapter.name)
        finally:
            engine.close()
            replica.kill()

    def test_a_wrong_checksum(self, model_path: Path, tmp_path: Path) -> None:
        replica = started(tmp_path, 0, "--wrong")
        replica.launch()
        asyncio.run(wait_for(replica.url))
        engine = self.build(model_path, tmp_path, replica.url)
        try:
            with pytest.raises(RolloutError, match=rf"replica 0 \({replica.url}\) loaded other weights"):
                engine.sync(AutoModelForCausalLM.from_pretrained(model_path))
            assert engine.version == 0
        finally:
            engine.close()
            replica.kill()

    def test_a_server_without_token_ids(self, engine: VllmServerEngine) -> None:
        with pytest.raises(RolloutError, match="without token ids"):
            self.ask(engine, NO_IDS)

    def test_a_folder_that_cannot_be_written_to(self, running: str, model_path: Path, tmp_path: Path) -> None:
        (tmp_path / "weights").write_text("a file")
        engine = self.build(model_path, tmp_path, running)
        try:
            with pytest.raises(RolloutError, match="weights cannot be written"):
                engine.sync(AutoModelForCausalLM.from_pretrained(model_path))
        finally:
            engine.close()

    def test_nobody_there(self, model_path: Path, tmp_path: Path) -> None:
        url = f"http://127.0.0.1:{free_port()}"
        with pytest.raises(RolloutError, match=rf"replica 0 \({url}\) does not answer"):
            self.build(model_path, tmp_path, url)
