"""The process in which reward functions run, and which may be killed at any time.

It is a fresh interpreter (not a fork of a process with threads and CUDA) that imports only what its rewards
need. It is given a socket and a few bytes of shared memory:

    parent → worker   first the sources of the rewards, then jobs
    worker → parent   first `Ready` with the rewards' declarations, or an error; then the units that are done
    shared memory     number of units of the job that have been started, to know the culprit when this is gone
"""

from __future__ import annotations

import asyncio
import faulthandler
import math
import mmap
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import NamedTuple

from posttrain.errors import PosttrainError, RewardError
from posttrain.killable import confine
from posttrain.rewards.calling import BoundReward, Outcome, Result, Sample, describe, load_reward
from posttrain.rewards.registry import RewardInfo, RewardSource

DEFAULT_CONCURRENCY = 32
"""Calls of an async reward under way at once, where it declares nothing."""
LOAD_SECONDS = 300.0
"""Time to import the rewards; long, as imports compete with everything else at the start of a run."""
PROGRESS_BYTES = 4
FLUSH_SECONDS = 0.005
"""Results of fast rewards travel together for so long: a message wakes the parent and costs more than one."""
NO_SOCKET = 75
"""Exit code when the socket is closed: by the parent, or by a reward some time ago."""
ORPHAN_GRACE = 3.0
"""Seconds after its time-out at which a unit ends the process by itself, if no parent did so before."""


@dataclass(frozen=True)
class Job:
    """Units (single samples or batches) of one reward, to be scored in order.

    Those of an async reward are started in order, as many at once as its concurrency allows. Once a unit
    finds that what the reward depends on is away, those that have not started yet are not tried.
    `ids` are the caller's names for the units.
    """

    reward: int
    units: list[list[Sample]]
    ids: list[int]
    step: int | None

    def budget(self, info: RewardInfo) -> float:
        """Seconds that one unit may take."""
        return info.timeout * max(map(len, self.units))

    def part(self, indices: Iterable[int]) -> Job:
        """A job of some of the units."""
        chosen = list(indices)
        return replace(self, units=[self.units[i] for i in chosen], ids=[self.ids[i] for i in chosen])


class Loaded(NamedTuple):
    """A reward that is loaded: what it declares, whether it is async, and whether it can tell the step."""

    info: RewardInfo
    concurrent: bool
    sees_step: bool


class Ready(NamedTuple):
    """All rewards are loaded."""

    rewards: list[Loaded]


class Done(NamedTuple):
    """A unit of the current job has been scored."""

    unit: int
    result: Result


Reply = Ready | PosttrainError | list[Done]


def main(socket: int, memory: int, memory_limit: int) -> None:
    """Serve jobs over inherited descriptors until the parent closes the socket or ends.

    `memory_limit` is in bytes; 0 is none.
    """
    connection = Connection(socket)
    progress = mmap.mmap(memory, PROGRESS_BYTES)
    confine(memory_limit)
    try:
        sources: list[RewardSource] = connection.recv()
        _expire_after(LOAD_SECONDS)
        try:
            rewards = [load_reward(source) for source in sources]
        except PosttrainError as error:
            connection.send(error)
            os._exit(0)
        connection.send(Ready([Loaded(r.info, r.concurrent, r.sees_step) for r in rewards]))
        faulthandler.cancel_dump_traceback_later()
        with asyncio.Runner() as runner:
            while True:
                job: Job = connection.recv()
                reward = rewards[job.reward]
                if reward.concurrent:
                    runner.run(_run_concurrently(reward, job, connection, progress))
                else:
                    _run(reward, job, connection, progress)
                faulthandler.cancel_dump_traceback_later()
    except (EOFError, OSError):
        os._exit(NO_SOCKET)
    except Exception as error:
        connection.send(RewardError(f"a reward worker failed: {describe(error)}"))
    os._exit(0)  # whatever threads a reward has started must not keep the process alive


def _run(reward: BoundReward, job: Job, connection: Connection, progress: mmap.mmap) -> None:
    process = os.getpid()
    last_resort = _LastResort(job.budget(reward.info))
    done = _Outbox(connection)
    away = ""
    for index, samples in enumerate(job.units):
        _note_started(progress, index)
        last_resort.arm()
        result = _not_tried(samples, away) if away else reward(samples, job.step)
        if os.getpid() != process:
            os._exit(0)  # a fork made by the reward came back out of it
        away = away or result.unavailable
        done.add(Done(index, result))
    done.flush()


async def _run_concurrently(
    reward: BoundReward, job: Job, connection: Connection, progress: mmap.mmap
) -> None:
    last_resort = _LastResort(job.budget(reward.info))
    done = _Outbox(connection, asyncio.get_running_loop())
    units = iter(enumerate(job.units))  # shared: who has finished a unit takes the next, so none waits
    away = ""

    async def run_units() -> None:
        nonlocal away
        for index, samples in units:
            _note_started(progress, index)
            last_resort.arm()
            result = _not_tried(samples, away) if away else await reward.call_async(samples, job.step)
            away = away or result.unavailable
            done.add(Done(index, result))

    at_once = min(concurrency(reward.info), len(job.units))
    await asyncio.gather(*(run_units() for _ in range(at_once)))
    done.flush()


def _note_started(progress: mmap.mmap, index: int) -> None:
    progress[:] = (index + 1).to_bytes(PROGRESS_BYTES, sys.byteorder)


class _Outbox:
    """Results on their way to the parent. One leaves at once, those that follow within FLUSH_SECONDS wait for
    the end of that time: for the next result, or, given a loop, for a timer.
    """

    def __init__(self, connection: Connection, loop: asyncio.AbstractEventLoop | None = None):
        self._connection = connection
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: list[Done] = []
        self._flushed = -math.inf

    def add(self, done: Done) -> None:
        self._waiting.append(done)
        if time.perf_counter() - self._flushed > FLUSH_SECONDS:
            self.flush()
        elif self._loop is not None and self._timer is None:
            self._timer = self._loop.call_later(FLUSH_SECONDS, self.flush)

    def flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting:
            self._connection.send(self._waiting)
            self._waiting, self._flushed = [], time.perf_counter()


def concurrency(info: RewardInfo) -> int:
    """Units of an async reward that are under way at once."""
    return info.concurrency or DEFAULT_CONCURRENCY


def _not_tried(samples: list[Sample], away: str) -> Result:
    return Result([Outcome(None, "unavailable", away)] * len(samples))


class _LastResort:
    """Ends the process when a unit takes much longer than it may and there is no parent left to do so."""

    def __init__(self, budget: float):
        self._seconds = budget + ORPHAN_GRACE
        self._armed = -math.inf

    def arm(self) -> None:
        """A unit starts now."""
        now = time.perf_counter()
        if now - self._armed > ORPHAN_GRACE / 2:
            _expire_after(self._seconds)
            self._armed = now


def _expire_after(seconds: float) -> None:
    # Works without the interpreter lock, so also while a regular expression backtracks for ever.
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
