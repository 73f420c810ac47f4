"""The servers of reward models, as the trainer sees them: which model they have, and whether they are there.

A model with a `path` has one server on this machine, whoever uses it: started when its first sample is
scored, shared by all stages, rewards and processes with equal settings (`posttrain.rewards.lease`), and ended
with the last of them. It is a process of its own session, since the end of the process that happened to start
it must not be that of the others' server.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from posttrain.errors import RewardError, RewardUnavailable
from posttrain.recipe.rewards_schema import RewardModelConfig
from posttrain.rewards.checkpoint import find_checkpoint
from posttrain.rewards.lease import LOOK_SECONDS, Room
from posttrain.rewards.model_reward import KIND
from posttrain.rewards.outage import Pause
from posttrain.rewards.registry import RewardInfo
from posttrain.rollout.guard import without_launcher

ANSWER_SECONDS = 20.0
"""Time for a server to say which model it has."""
START_SECONDS = 3600.0
"""Time for a server to load its model."""
IDLE_SECONDS = 30.0
"""How long a server stays without users: one that is killed may be started again at once."""
STOP_SECONDS = 10.0
"""Time for a server to end."""
STARTS, STARTS_WITHIN = 4, 600.0
"""How often a server may be started within so many seconds, before something is wrong with it."""
NOT_VERIFIED = "not verified"

_held: dict[Path, tuple[Room, int]] = {}
"""Servers that this process uses, by folder, with the open file of the lease."""
_keepers = 0


@contextmanager
def keep_servers() -> Iterator[None]:
    """Go on using the servers that are used inside until the outermost of these ends."""
    global _keepers
    _keepers += 1
    try:
        yield
    finally:
        _keepers -= 1
        if not _keepers:
            while _held:
                room, lease = _held.popitem()[1]
                room.leave(lease, STOP_SECONDS)


class ModelServers:
    """The servers of a scorer's reward models, by name.

    Args:
        infos: of all rewards; those without a model are left out.
        logs: where servers that are started here put their logs.
        pause: waits for servers at URLs that do not answer; None does not wait.

    Raises:
        RewardError: there is no such model, or its server does not answer.
    """

    def __init__(self, infos: Iterable[RewardInfo], logs: Path | None, pause: Pause | None):
        self._servers: dict[str, ModelServer] = {}
        self._kept = ExitStack()
        for info in infos:
            if info.model is not None:
                self._servers[info.name] = _reach(info, logs, pause)
        if self._servers:
            self._kept.enter_context(keep_servers())

    @property
    def infos(self) -> dict[str, RewardInfo]:
        """The rewards, with the versions and hashes of their models."""
        return {name: server.info for name, server in self._servers.items()}

    def ensure(self, names: Iterable[str], check: Callable[[], None]) -> None:
        """See to it that the servers of these rewards are there (`ModelServer.ensure`)."""
        for name in names:
            if name in self._servers:
                self._servers[name].ensure(check)

    def close(self) -> None:
        """Stop using the servers, unless something else in this process does."""
        self._kept.close()


def _reach(info: RewardInfo, logs: Path | None, pause: Pause | None) -> ModelServer:
    while True:
        try:
            server = ModelServer(info, logs)
        except RewardUnavailable as error:
            if pause is None:
                raise
            pause.note({info.name: str(error)})
            pause.wait()
        else:
            if pause is not None:
                pause.note({})
            return server


class ModelServer:
    """What answers for one reward model.

    Args:
        info: the reward, with its model.
        logs: where a server that is started here puts its log; None is a folder of its own.

    Raises:
        RewardError: there is no such model.
        RewardUnavailable: the server at a URL does not answer.
    """

    def __init__(self, info: RewardInfo, logs: Path | None):
        assert info.model is not None
        self._name = info.name
        self._config = RewardModelConfig.model_validate(info.model)
        self._starts: list[float] = []
        self._process: subprocess.Popen[bytes] | None = None
        self.info = replace(info, kind=KIND, place="")
        """The reward, with the version and hash of its model."""
        if self._config.url is not None:
            answer = self._ask()
            if answer is None:
                raise RewardUnavailable(f"reward model {self._name!r}: {self._config.url} does not answer")
            self.info = replace(self.info, **self._identity(answer))
            return
        try:
            self._checkpoint = find_checkpoint(self._config)
            self._checkpoint.head(self._config.head)
            self._stamp = self._checkpoint.stamp()
            self._room = Room.of(self._config, self._checkpoint)
        except RewardError as error:
            raise self._error(str(error)) from error
        file = re.sub(r"[^A-Za-z0-9_.-]+", "_", self._name)
        self._log = self._room.log if logs is None else logs / f"reward_model_{file}.log"
        self._log_start = 0
        self.info = replace(
            self.info,
            version=self._checkpoint.version(self._config),
            sha256=self._checkpoint.sha256(),
            deterministic=True,
        )

    def ensure(self, check: Callable[[], None]) -> None:
        """See to it that the server is there, with the model it had before; `check` may raise to end waiting.

        A server at a URL is waited for by its users.

        Raises:
            RewardError: it has another model now, or cannot be started.
        """
        if self._config.url is not None:
            answer = self._ask()
            if answer is not None:
                now = replace(self.info, **self._identity(answer))
                if now != self.info:
                    was, now_is = self.info.fingerprint, now.fingerprint
                    raise self._error(f"{self._config.url} has another model now: {now_is}, before {was}")
            return
        if self._checkpoint.stamp() != self._stamp:
            raise self._error(f"the files in {self._checkpoint.folder} were changed during the run")
        if self._room.folder not in _held:
            _held[self._room.folder] = (self._room, self._room.lease(check))
        if self._ask() is not None:
            return
        with self._room.starting(check):
            answer = self._wait(check)
        if answer["sha256"] != self.info.sha256:
            raise self._error(f"the files in {self._checkpoint.folder} were changed during the run")

    def _wait(self, check: Callable[[], None]) -> dict[str, Any]:
        """Wait for an answer; starts the server if there is none."""
        deadline = time.monotonic() + START_SECONDS
        starting = False
        while (answer := self._ask()) is None:
            check()
            if starting and self._process is not None and self._process.poll() is not None:
                raise self._error(f"its server did not start: {self._last_words()}")
            if not starting and not self._room.occupied():
                self._start()
                starting = True
            if time.monotonic() > deadline:
                raise self._error(f"its server did not answer within {START_SECONDS:g} s; see {self._log}")
            time.sleep(LOOK_SECONDS)
        return answer

    def _start(self) -> None:
        now = time.monotonic()
        self._starts = [at for at in self._starts if now - at < STARTS_WITHIN]
        if len(self._starts) == STARTS:
            raise self._error(
                f"its server has ended {STARTS} times in {now - self._starts[0]:.0f} s; see {self._log}"
            )
        self._starts.append(now)
        model = self._config.model_dump(mode="json")
        job = {"model": model, "room": str(self._room.folder), "idle": IDLE_SECONDS}
        with self._log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "posttrain.rewards.serve", json.dumps(job)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=without_launcher(os.environ),
                start_new_session=True,
            )

    def _last_words(self) -> str:
        """The last line that the process has printed."""
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), f"see {self._log}")

    def _ask(self) -> dict[str, Any] | None:
        """What the server says about itself; None if it does not answer."""
        config, headers, base = self._config, {}, ""
        connection: http.client.HTTPConnection
        if config.url is None:
            connection = _UnixConnection(self._room.socket)
        else:
            parts = urlsplit(config.url)
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            connection = kind(parts.hostname or "", parts.port, timeout=ANSWER_SECONDS)
            base = parts.path.rstrip("/")
            if config.token_env is not None:
                headers["Authorization"] = f"Bearer {os.environ.get(config.token_env, '')}"
        route = "/info" if config.served_by == "posttrain" else "/v1/models"
        with suppress(OSError, http.client.HTTPException, ValueError, TypeError):
            try:
                connection.request("GET", base + route, headers=headers)
                response = connection.getresponse()
                body = response.read()
                if response.status == 200:
                    return dict(json.loads(body))
                if response.status in (401, 403):
                    raise self._error(f"{config.url} refuses the token ({response.status}); see token_env")
            finally:
                connection.close()
        return None

    def _identity(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Version and hash of the model that a server at a URL says it has."""
        if self._config.served_by != "posttrain":
            models = ", ".join(str(model.get("id")) for model in answer.get("data", [])) or "a model"
            return {"version": f"{models}, {NOT_VERIFIED}", "sha256": "", "deterministic": False}
        if not isinstance(answer.get("sha256"), str) or not isinstance(answer.get("version"), str):
            raise self._error(f"{self._config.url} is no `posttrain rewards serve`")
        return {"version": answer["version"], "sha256": answer["sha256"], "deterministic": True}

    def _error(self, text: str) -> RewardError:
        return RewardError(f"reward model {self._name!r}: {text}")


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix domain socket."""

    def __init__(self, path: Path):
        super().__init__("localhost", timeout=ANSWER_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
