"""Processes that run tool calls in the background; one that hangs or dies is killed and replaced."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import wait

from posttrain.errors import PosttrainError, RolloutError
from posttrain.killable import KillableProcess
from posttrain.recipe.tools_schema import ToolsConfig
from posttrain.rollout.tools import Outcome
from posttrain.rollout.tools_worker import Ready, Reply, Task, main

LOAD_SECONDS = 120.0
MAX_LOSSES_AT_LOADING = 3


class _Worker:
    """One process and the task it has."""

    def __init__(self, config: ToolsConfig):
        self.timeout = config.timeout
        memory = int((config.memory_gib or 0) * 2**30)
        self._killable = KillableProcess(main, memory_limit=memory)
        self.connection = self._killable.connection
        self.loading = True
        self.task: tuple[int, Task] | None = None
        self.deadline = time.monotonic() + LOAD_SECONDS
        with contextlib.suppress(OSError):  # one that is dead already is noticed on reading
            self.connection.send(config)

    def start(self, key: int, task: Task) -> None:
        self.connection.send(task)
        self.task, self.deadline = (key, task), time.monotonic() + self.timeout

    def kill(self) -> int:
        """End the process and all it started; returns the exit code."""
        return self._killable.kill()


class ToolPool:
    """Runs tasks on `config.workers` processes, in no particular order."""

    def __init__(self, config: ToolsConfig):
        """Start the processes and wait until the first has loaded the tools.

        Raises:
            PosttrainError: they cannot be loaded.
        """
        self._config = config
        self._workers = [_Worker(config) for _ in range(config.workers)]
        self._queue: deque[tuple[int, Task]] = deque()
        self._lost_at_loading = 0
        try:
            while all(worker.loading for worker in self._workers):
                list(self._wait(LOAD_SECONDS))
        except BaseException:
            self.close()
            raise

    @property
    def busy(self) -> bool:
        """Whether there are tasks whose outcome has not been collected."""
        return bool(self._queue) or any(worker.task for worker in self._workers)

    def submit(self, key: int, task: Task) -> None:
        """Have a task done. `key` is the caller's name for it."""
        self._queue.append((key, task))
        self._hand_out()

    def collect(self, patience: float) -> list[tuple[int, Outcome]]:
        """The outcomes there are, by key; waits up to `patience` seconds for the first of them.

        Raises:
            RolloutError: a process that was replaced cannot load the tools any more.
        """
        end = time.monotonic() + patience
        found: list[tuple[int, Outcome]] = []
        while self.busy and not found:
            left = end - time.monotonic()
            found += self._wait(max(left, 0.0))
            self._hand_out()
            if left <= 0:
                break
        return found

    def discard(self) -> None:
        """Forget all tasks; processes that are at work on one are replaced."""
        self._queue.clear()
        for worker in list(self._workers):
            if worker.task is not None:
                self._replace(worker)

    def close(self) -> None:
        """End all processes. Closing twice is harmless."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _hand_out(self) -> None:
        """A conversation stays with a process, which has its environment, unless another would be idle."""
        count = len(self._workers)
        for index, worker in enumerate(list(self._workers)):
            if worker.loading or worker.task is not None or not self._queue:
                continue
            own = (at for at, (_, task) in enumerate(self._queue) if task.conversation % count == index)
            at = next(own, 0)
            try:
                worker.start(*self._queue[at])
            except OSError:  # it has died between two tasks
                self._replace(worker)
            else:
                del self._queue[at]

    def _wait(self, patience: float) -> Iterator[tuple[int, Outcome]]:
        """Read what the processes have to say, or act when the first of them is late."""
        busy = [worker for worker in self._workers if worker.loading or worker.task is not None]
        first = min(worker.deadline for worker in busy) - time.monotonic()
        ready = wait([worker.connection for worker in busy], max(min(first, patience), 0.0))
        for worker in busy:
            if worker.connection in ready:
                yield from self._receive(worker)
            elif time.monotonic() >= worker.deadline:
                yield from self._fail(worker, late=True)

    def _receive(self, worker: _Worker) -> Iterator[tuple[int, Outcome]]:
        try:
            reply: Reply = worker.connection.recv()
        except (EOFError, OSError):
            yield from self._fail(worker, late=False)
            return
        if isinstance(reply, PosttrainError):
            raise reply
        if isinstance(reply, Ready):
            worker.loading, self._lost_at_loading = False, 0
            return
        assert worker.task is not None
        key, worker.task = worker.task[0], None
        yield key, reply

    def _fail(self, worker: _Worker, late: bool) -> Iterator[tuple[int, Outcome]]:
        task, seconds = worker.task, self._config.timeout if late else 0.0
        code = self._replace(worker)
        if task is None:  # it was loading
            self._lost_at_loading += 1
            if late or self._lost_at_loading == MAX_LOSSES_AT_LOADING:
                cause = f"took longer than {LOAD_SECONDS:g} s" if late else f"ended the process ({code})"
                raise RolloutError(f"loading the tools {cause}")
            return
        if late:
            yield task[0], Outcome(f"Error: stopped after {seconds:g} s", "timeout", seconds)
        else:
            yield task[0], Outcome(f"Error: the tool ended its process ({code})", "died")

    def _replace(self, worker: _Worker) -> int:
        code = worker.kill()
        self._workers[self._workers.index(worker)] = _Worker(self._config)
        return code
