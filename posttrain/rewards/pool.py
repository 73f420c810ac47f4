"""A pool of worker processes that survives whatever reward functions do."""

from __future__ import annotations

import contextlib
import mmap
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import wait

from posttrain.errors import PosttrainError, RewardError
from posttrain.killable import KillableProcess
from posttrain.rewards.calling import Outcome, Result, timeout_outcome
from posttrain.rewards.registry import RewardSource
from posttrain.rewards.worker import (
    FLUSH_SECONDS,
    LOAD_SECONDS,
    NO_SOCKET,
    PROGRESS_BYTES,
    Job,
    Loaded,
    Ready,
    Reply,
    main,
)

ASYNC_GRACE = 0.5
"""Async rewards time themselves out; the process is killed only if they block and do not get to it."""

EXIT_SECONDS = 0.5
MAX_KILLS_AT_LOADING = 3
CHECK_SECONDS = 0.25
"""How often a caller's `check` is called at least."""

Deliver = Callable[[int, int, Result], None]
"""Takes a reward's number, the id of a unit, and what the unit gave."""


class _Worker:
    """One process and the job it has."""

    def __init__(self, sources: Sequence[RewardSource], memory_limit: int):
        with tempfile.TemporaryFile() as memory:
            memory.truncate(PROGRESS_BYTES)
            self._progress = mmap.mmap(memory.fileno(), PROGRESS_BYTES)
            self._killable = KillableProcess(main, [memory.fileno()], memory_limit)
        self.process, self.connection = self._killable.process, self._killable.connection
        self.rewards: list[Loaded] = []
        self.job: Job | None = None
        self.pending: list[int] = []
        self.budget = 0.0
        """Seconds that a unit of the job may take."""
        self.deadline = time.monotonic() + LOAD_SECONDS
        with contextlib.suppress(OSError):  # one that is dead already is noticed on reading
            self.connection.send(list(sources))

    @property
    def loading(self) -> bool:
        return not self.rewards

    def start(self, job: Job) -> None:
        self._progress[:] = bytes(PROGRESS_BYTES)
        self.connection.send(job)
        self.job, self.pending = job, list(range(len(job.units)))
        self.budget = job.budget(self.rewards[job.reward].info)
        self._set_deadline(job)

    def finish(self, units: Iterable[int]) -> None:
        assert self.job is not None
        for unit in units:
            self.pending.remove(unit)
        if not self.pending:
            self.job = None
        else:
            self._set_deadline(self.job)

    def concurrent(self, job: Job) -> bool:
        return self.rewards[job.reward].concurrent

    def suspects(self, job: Job, known: bool) -> list[int]:
        """The units one of which was the end of the process; `known`: it was still doing its job then."""
        newest = int.from_bytes(self._progress[:], sys.byteorder) - 1
        if self.concurrent(job):  # units start in order, so later ones have not been started
            return [unit for unit in self.pending if unit <= newest] or self.pending[:1]
        if not known:
            return self.pending
        return [newest if newest in self.pending else self.pending[0]]

    def _set_deadline(self, job: Job) -> None:
        grace = ASYNC_GRACE if self.concurrent(job) else FLUSH_SECONDS
        self.deadline = time.monotonic() + self.budget + grace

    def died_running(self) -> bool:
        """Whether the process died of the unit that was running; it may have lost its socket before."""
        try:
            return self.process.wait(EXIT_SECONDS) != NO_SOCKET
        except subprocess.TimeoutExpired:
            return False

    def kill(self) -> int:
        """End the process and all it started; returns the exit code, that of its own end if it had one."""
        return self._killable.kill()


class WorkerPool:
    """Runs jobs on a fixed number of processes; one that hangs or dies is killed and replaced.

    Only the unit that was running then is an error, the others of its job go on in another process. Where it
    is not known which one that was, because async units run at once or because the process has lost its
    socket and went on, those it may have been run one by one.

    The jobs of an async reward always go to the same process, one at a time: its connections, its limits and
    what it knows about a server are in one place.
    """

    def __init__(self, sources: Sequence[RewardSource], size: int, memory_gib: float | None = None):
        """Start the processes and wait until the first has loaded all rewards.

        `memory_gib` is what each of them may allocate; None sets no limit.

        Raises:
            PosttrainError: a reward cannot be loaded.
        """
        self._sources = list(sources)
        self._memory_limit = int((memory_gib or 0) * 2**30)
        self._rewards: list[Loaded] = []
        self._workers = [_Worker(self._sources, self._memory_limit) for _ in range(size)]
        self._queue: deque[Job] = deque()
        self._kills_at_loading = 0
        try:
            while all(worker.loading for worker in self._workers):
                self._wait(_ignore)
        except BaseException:
            self.close()
            raise

    @property
    def rewards(self) -> list[Loaded]:
        """One for each source."""
        return self._rewards

    def run(self, jobs: Sequence[Job], deliver: Deliver, check: Callable[[], None] = lambda: None) -> None:
        """Run jobs, and deliver every unit's result exactly once, in any order.

        `check` is called every CHECK_SECONDS or more often, and may raise to end it all.

        Raises:
            RewardError: a new worker could not load the rewards.
        """
        # Async jobs first: there is one worker for each of them, the others may have any other job.
        self._queue.extend(sorted(jobs, key=lambda job: not self._rewards[job.reward].concurrent))
        try:
            while self._queue or any(worker.job for worker in self._workers):
                check()
                self._hand_out()
                self._wait(deliver)
        except BaseException:
            self._queue.clear()
            for worker in self._workers:
                if worker.job is not None:
                    self._replace(worker)
            raise

    def close(self) -> None:
        """End all processes. Closing twice is harmless."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _hand_out(self) -> None:
        for worker in list(self._workers):
            if worker.loading or worker.job is not None:
                continue
            place = next((at for at, job in enumerate(self._queue) if self._may_start(worker, job)), None)
            if place is None:
                continue
            try:
                worker.start(self._queue[place])
            except OSError:  # it has died or got stuck between two jobs
                self._replace(worker)
            else:
                del self._queue[place]

    def _may_start(self, worker: _Worker, job: Job) -> bool:
        """Whether this is the worker for a job, and the reward's concurrency allows another job."""
        info, concurrent, _ = self._rewards[job.reward]
        if concurrent:
            asynchronous = [number for number, loaded in enumerate(self._rewards) if loaded.concurrent]
            home = asynchronous.index(job.reward) % len(self._workers)
            return worker is self._workers[home]
        running = sum(w.job is not None and w.job.reward == job.reward for w in self._workers)
        return info.concurrency is None or running < info.concurrency

    def _wait(self, deliver: Deliver) -> None:
        """Read what the workers have to say, or act when the first of them is late."""
        busy = [worker for worker in self._workers if worker.loading or worker.job is not None]
        patience = min(worker.deadline for worker in busy) - time.monotonic()
        ready = wait([worker.connection for worker in busy], min(max(patience, 0.0), CHECK_SECONDS))
        for worker in busy:
            if worker.connection in ready:
                self._receive(worker, deliver)
            elif time.monotonic() >= worker.deadline:
                self._fail(worker, deliver, late=True)

    def _receive(self, worker: _Worker, deliver: Deliver) -> None:
        try:
            reply: Reply = worker.connection.recv()
        except (EOFError, OSError):
            self._fail(worker, deliver, late=False)
            return
        if isinstance(reply, PosttrainError):
            raise reply
        if isinstance(reply, Ready):
            self._check_unchanged(reply.rewards)
            worker.rewards = reply.rewards
            self._kills_at_loading = 0
            return
        assert worker.job is not None
        job = worker.job
        for done in reply:
            deliver(job.reward, job.ids[done.unit], done.result)
        worker.finish(done.unit for done in reply)

    def _fail(self, worker: _Worker, deliver: Deliver, late: bool) -> None:
        """Replace a worker that hangs or has died, and settle its job."""
        job = worker.job
        known = late or worker.died_running()
        code = self._replace(worker)
        if job is None:  # it was loading; a signal may be the system's, short of memory
            self._kills_at_loading += 1
            if code < 0 and not late and self._kills_at_loading < MAX_KILLS_AT_LOADING:
                return
            names = ", ".join(source.name for source in self._sources)
            cause = f"took longer than {LOAD_SECONDS:g} s" if late else f"ended the process ({_reason(code)})"
            raise RewardError(f"loading the rewards {names} {cause}")
        suspects = worker.suspects(job, known)
        rest = [unit for unit in worker.pending if unit not in suspects]
        if rest:
            self._queue.appendleft(job.part(rest))
        if len(suspects) > 1:
            self._queue.extendleft(job.part([unit]) for unit in suspects)
            return
        if late:
            seconds = worker.budget
            outcome = timeout_outcome(seconds)
        else:
            seconds = 0.0
            outcome = Outcome(None, "died", f"ended the process ({_reason(code)})")
        (culprit,) = suspects
        deliver(job.reward, job.ids[culprit], Result([outcome] * len(job.units[culprit]), seconds))

    def _check_unchanged(self, rewards: list[Loaded]) -> None:
        """Refuse code that was edited since the first process loaded it: values would not be comparable."""
        for first, now in zip(self._rewards, rewards, strict=False):
            if first.info.sha256 != now.info.sha256:
                place = now.info.place or now.info.origin
                raise RewardError(
                    f"the code of reward {now.info.name!r} ({place}) was changed during the run"
                )
        self._rewards = rewards

    def _replace(self, worker: _Worker) -> int:
        code = worker.kill()
        self._workers[self._workers.index(worker)] = _Worker(self._sources, self._memory_limit)
        return code


def _reason(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}, {signal.strsignal(-code)}"


def _ignore(reward: int, unit: int, result: Result) -> None:
    """Takes no results: there are none while the workers load."""
