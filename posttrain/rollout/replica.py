"""One replica of a server engine: its address, and its process if it was started here."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp

from posttrain.errors import RolloutError
from posttrain.rollout import guard

LOG_LINES = 15
"""Lines of a replica's log that an error shows."""
STOP_SECONDS = 10.0
"""How long a replica may take to end by itself."""
TRIES = 5
"""How often a request is asked of a replica that is well but fails: with waits of 0.1 s, 0.2 s, 0.4 s, …"""
_RETRIED = (408, 425, 429)


class ReplicaLost(Exception):
    """The replica went away, or does not answer, while it was asked something."""

    def __init__(self, reason: str, *, timed_out: bool = False) -> None:
        super().__init__(reason)
        self.timed_out = timed_out


class Replica:
    """A `vllm serve` process and its HTTP interface. All coroutines run in the engine's event loop.

    Args:
        name: for messages.
        url: where it runs; None starts one here.
        command: of a replica started here, for a port.
        environment: of its process.
        log: where its output goes.
    """

    def __init__(
        self,
        name: str,
        *,
        url: str | None = None,
        command: Callable[[int], list[str]] | None = None,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        self.label = name
        self.url = (url or "").rstrip("/")
        self.command = command
        self.environment = environment
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        self.up = False
        self.in_flight = 0
        self.times_lost = 0
        self.restarts = 0
        self.repair: asyncio.Task[None] | None = None
        self.asked: set[asyncio.Task[Any]] = set()
        """Requests under way."""

    @property
    def name(self) -> str:
        """What it is and where it runs."""
        return f"{self.label} ({self.url})" if self.url else self.label

    def launch(self) -> None:
        """Start its process, in a process group of its own and on a free port of this machine."""
        assert self.command is not None
        assert self.log is not None
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-I", guard.__file__, str(os.getpid()), *self.command(port)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )

    async def wait_until_healthy(self, session: aiohttp.ClientSession, seconds: float) -> None:
        """Wait until a process that was launched answers.

        Raises:
            ReplicaLost: it ended, or did not answer in time; with the end of its log.
        """
        deadline = time.monotonic() + seconds
        while not await self.healthy(session, 5.0):
            if self.ended():
                raise ReplicaLost(f"it ended while it was started; {self.log_tail()}")
            if time.monotonic() > deadline:
                raise ReplicaLost(f"it was not ready after {seconds:g} s; {self.log_tail()}")
            await asyncio.sleep(0.2)

    async def healthy(self, session: aiohttp.ClientSession, seconds: float) -> bool:
        """Whether it says within `seconds` that it is well."""
        try:
            async with session.get(f"{self.url}/health", timeout=_within(seconds)) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    def ended(self) -> bool:
        """Whether its process, started here, has ended."""
        return self.process is not None and self.process.poll() is not None

    def abandon(self) -> None:
        """Take it out of use; requests under way end with `ReplicaLost`."""
        self.up = False
        self.times_lost += 1
        for task in list(self.asked):
            task.cancel()

    def kill(self) -> None:
        """End its process group at once."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def stop(self, deadline: float) -> None:
        """Wait for a process that was asked to end, up to `deadline` (monotonic), then kill it."""
        if self.process is not None:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(max(0.0, deadline - time.monotonic()))
            self.kill()

    def log_tail(self) -> str:
        """The last lines of its log, as part of a sentence."""
        if self.log is None or not self.log.exists():
            return "it has no log here"
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 20_000))
            lines = file.read().decode(errors="replace").splitlines()
        return "the end of its log:\n" + "\n".join(f"  {line}" for line in lines[-LOG_LINES:])

    async def post(
        self,
        session: aiohttp.ClientSession,
        path: str,
        body: dict[str, Any],
        seconds: float,
        tries: int = TRIES,
    ) -> dict[str, Any]:
        """Ask something and return the JSON answer; up to `tries` times where it may work the next time.

        Raises:
            ReplicaLost: it went away, was taken out of use, or did not answer in time.
            RolloutError: it refuses the request, or failed at it again and again.
        """
        for attempt in range(tries):
            status, text, answer = await self._post_once(session, path, body, seconds)
            if status == 200:
                return answer
            if attempt + 1 == tries or (status < 500 and status not in _RETRIED):
                break
            await asyncio.sleep(0.1 * 2**attempt * random.uniform(0.5, 1.5))
        raise RequestRefused(status, f"{self.name} answered {path} with {status}: {text[:500]}")

    async def get(self, session: aiohttp.ClientSession, path: str, seconds: float) -> dict[str, Any]:
        """The JSON answer to a plain question.

        Raises:
            RolloutError: there is none.
        """
        try:
            async with session.get(self.url + path, timeout=_within(seconds)) as answer:
                answer.raise_for_status()
                return await answer.json()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise RolloutError(f"{self.name} does not answer {path}: {error}") from error

    async def _post_once(
        self, session: aiohttp.ClientSession, path: str, body: dict[str, Any], seconds: float
    ) -> tuple[int, str, dict[str, Any]]:
        task = asyncio.ensure_future(_exchange(session, self.url + path, body, seconds))
        self.asked.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            raise ReplicaLost("it was taken out of use") from None
        except TimeoutError:
            raise ReplicaLost(f"it did not answer {path} within {seconds:g} s", timed_out=True) from None
        except (aiohttp.ClientError, OSError) as error:
            raise ReplicaLost(f"the connection broke: {error or type(error).__name__}") from None
        finally:
            self.asked.discard(task)


class RequestRefused(RolloutError):
    """A replica that is well answered with an error status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


async def _exchange(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], seconds: float
) -> tuple[int, str, dict[str, Any]]:
    async with session.post(url, json=body, timeout=_within(seconds)) as answer:
        text = await answer.text()
        json_answer = answer.status == 200 and answer.content_type == "application/json"
        return answer.status, text, (await answer.json() if json_answer else {})


def _within(seconds: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=seconds)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stop_all(replicas: list[Replica]) -> None:
    """End the processes that were started here: asked to first, killed after `STOP_SECONDS`."""
    deadline = time.monotonic() + STOP_SECONDS
    for replica in replicas:
        if replica.process is not None and replica.process.poll() is None:
            replica.process.terminate()
    for replica in replicas:
        replica.stop(deadline)
