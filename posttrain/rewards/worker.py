"""The process in which reward functions run, and which may be killed at any time.

It is a fresh interpreter (not a fork of a process with threads and CUDA) that imports only what its rewards
need. Messages over one socket:

    parent → worker   first the sources of the rewards, then jobs
    worker → parent   first "ready" with the rewards' declarations, or an error; then one message for every
                      finished unit of a job, so that the parent knows which one is running
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import NamedTuple

from posttrain.errors import PosttrainError, RewardError
from posttrain.rewards.calling import BoundReward, Outcome, Sample, describe, load_reward
from posttrain.rewards.registry import RewardInfo, RewardSource

ORPHAN_GRACE = 3.0
"""Seconds after its time-out at which a unit ends the process by itself, if no parent did so before."""


@dataclass(frozen=True)
class Job:
    """Units (single samples or batches) of one reward, to be scored in order, or at once if it is async.

    `ids` are the caller's names for the units.
    """

    reward: int
    units: list[list[Sample]]
    ids: list[int]
    step: int | None

    def part(self, indices: Iterable[int]) -> Job:
        """A job of some of the units."""
        chosen = list(indices)
        return replace(self, units=[self.units[i] for i in chosen], ids=[self.ids[i] for i in chosen])


class Ready(NamedTuple):
    """All rewards are loaded. For each: what it declares, and whether it is async."""

    rewards: list[tuple[RewardInfo, bool]]


class Done(NamedTuple):
    """The outcomes of one unit of the current job, and the seconds it took."""

    unit: int
    outcomes: list[Outcome]
    seconds: float


Reply = Ready | PosttrainError | Done


def main(descriptor: int) -> None:
    """Serve jobs over an inherited socket until the parent closes it or ends."""
    connection = Connection(descriptor)
    try:
        sources: list[RewardSource] = connection.recv()
        try:
            rewards = [load_reward(source) for source in sources]
        except PosttrainError as error:
            connection.send(error)
            os._exit(0)
        connection.send(Ready([(reward.info, reward.concurrent) for reward in rewards]))
        with asyncio.Runner() as runner:
            while True:
                job: Job = connection.recv()
                _run(rewards[job.reward], job, connection, runner)
                faulthandler.cancel_dump_traceback_later()
    except (EOFError, ConnectionError):
        pass
    except Exception as error:
        connection.send(RewardError(f"a reward worker failed: {describe(error)}"))
    os._exit(0)  # whatever threads a reward has started must not keep the process alive


def _run(reward: BoundReward, job: Job, connection: Connection, runner: asyncio.Runner) -> None:
    if reward.concurrent:
        _expire_after(max(map(len, job.units)) * reward.info.timeout)
        runner.run(_run_concurrently(reward, job, connection))
        return
    process = os.getpid()
    for index, samples in enumerate(job.units):
        _expire_after(len(samples) * reward.info.timeout)
        start = time.perf_counter()
        outcomes = reward(samples, job.step)
        if os.getpid() != process:
            os._exit(0)  # a fork made by the reward came back out of it
        connection.send(Done(index, outcomes, time.perf_counter() - start))


async def _run_concurrently(reward: BoundReward, job: Job, connection: Connection) -> None:
    async def run_unit(index: int, samples: list[Sample]) -> None:
        start = time.perf_counter()
        outcomes = await reward.call_async(samples, job.step)
        connection.send(Done(index, outcomes, time.perf_counter() - start))

    await asyncio.gather(*(run_unit(index, samples) for index, samples in enumerate(job.units)))


def _expire_after(seconds: float) -> None:
    # Works without the interpreter lock, so also while a regular expression backtracks for ever.
    faulthandler.dump_traceback_later(seconds + ORPHAN_GRACE, exit=True, file=sys.stderr)
