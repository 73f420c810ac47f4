"""Several replicas as one: routing, heartbeats, restarts, and the same weights on all of them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from posttrain.errors import RolloutError
from posttrain.rollout.replica import TRIES, Replica, ReplicaLost, RequestRefused, stop_all

logger = logging.getLogger(__name__)

MAX_RESTARTS = 3
"""Restarts of one replica within one call of `complete`."""
API_KEY = "VLLM_API_KEY"
"""Environment variable with the key that replicas ask for, if they do."""

Load = Callable[[Replica], Awaitable[None]]
"""Gives a replica the weights of the current version and verifies them."""


class ReplicaPool:
    """Asks replicas, least loaded first, and keeps them alive. All coroutines run in one event loop.

    A replica that ends, refuses connections, or misses two looks at its health in a row is taken out of use
    and its requests go to the others. One that was started here is killed, started again, given the current
    weights and used again; one that was not is dropped.

    Args:
        replicas: started here (with a command) or running.
        limit: requests under way on one replica.
        timeout: seconds for one request.
        heartbeat: seconds after which a replica that hangs has been noticed.
        start_timeout: seconds for a start.
        board: file through which the process that starts replicas tells others of this machine where they
            run now; None when there are no others.
        owner: whether replicas with a command are started by this process; others wait for it to do so.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        *,
        limit: int,
        timeout: float,
        heartbeat: float,
        start_timeout: float,
        board: Path | None = None,
        owner: bool = True,
    ) -> None:
        self.replicas = list(replicas)
        self.limit, self.timeout = limit, timeout
        self.heartbeat, self.start_timeout = heartbeat, start_timeout
        self.board, self.owner = board, owner
        self.load: Load | None = None
        """None while the replicas serve the weights that they started with."""
        self.restartable = True
        """False when the current weights are kept nowhere: a lost replica then stays lost."""
        self.restarts = 0
        self._fatal: RolloutError | None = None
        self._changed = asyncio.Condition()
        self._watch: asyncio.Task[None] | None = None
        self._session: aiohttp.ClientSession | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        """The HTTP client. Proxies of the environment are not used: replicas are addressed directly."""
        if self._session is None:
            key = os.environ.get(API_KEY)
            self._session = aiohttp.ClientSession(
                # The server closes idle connections after five seconds.
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),
                headers={"Authorization": f"Bearer {key}"} if key else {},
                trust_env=False,
            )
        return self._session

    async def open(self) -> None:
        """Start the replicas that are to be started here, all at once, and begin to watch all of them.

        Raises:
            RolloutError: a replica cannot be started or reached.
        """
        mine = [replica for replica in self.replicas if replica.command is not None]
        for replica in mine:
            replica.launch()
        try:
            await _all(replica.wait_until_healthy(self.session, self.start_timeout) for replica in mine)
        except ReplicaLost as lost:
            raise RolloutError(f"a vllm_server replica cannot be started: {lost}") from None
        for replica in self.replicas:
            if not await replica.healthy(self.session, max(self.heartbeat, 5.0)):
                raise RolloutError(f"{replica.name} does not answer")
            replica.up = True
        self._publish()
        self._watch = asyncio.create_task(self._keep_watch())

    @property
    def urls(self) -> list[str]:
        """Where the replicas are that can be asked."""
        return [replica.url for replica in self.replicas if replica.up]

    def follow(self, urls: Sequence[str]) -> None:
        """Use the replicas that the leading process has given new weights, and no others."""
        if not self.owner:  # they may have been started again, elsewhere
            for replica, url in zip(self.replicas, urls, strict=True):
                replica.url, replica.up = url, True
        for replica in self.replicas:
            if replica.up and replica.url not in urls:
                logger.warning("%s was lost to the first process and is no longer used", replica.name)
                replica.up = False

    async def served_model(self) -> tuple[str, int]:
        """Name and context, in tokens, of the model that running replicas serve.

        Raises:
            RolloutError: they serve different models.
        """
        found: set[tuple[str, int]] = set()
        for replica in self.replicas:
            answer = await replica.get(self.session, "/v1/models", self.heartbeat)
            found.update(
                (card["id"], card["max_model_len"]) for card in answer["data"] if not card.get("parent")
            )
        if len(found) != 1:
            raise RolloutError(f"the replicas {self._names()} serve different models: {sorted(found)}")
        return found.pop()

    async def close(self) -> None:
        """End everything that was started here."""
        tasks = [self._watch, *(replica.repair for replica in self.replicas)]
        for task in tasks:
            if task is not None:
                task.cancel()
        await asyncio.gather(*(task for task in tasks if task is not None), return_exceptions=True)
        if self._session is not None:
            await self._session.close()
            self._session = None
        await asyncio.to_thread(stop_all, self.replicas)

    async def each(self, act: Load) -> None:
        """Do something with every replica, those that are just being started again included.

        Raises:
            RolloutError: it failed, or no replica is left.
        """
        await _all(self._act(replica, act) for replica in self.replicas)
        self._raise_fatal()

    async def _act(self, replica: Replica, act: Load) -> None:
        if replica.repair is not None:
            await replica.repair
        self._raise_fatal()
        for attempt in range(TRIES):
            try:
                if replica.up:
                    await act(replica)
                return
            except ReplicaLost as lost:
                await self._suspect(replica, lost)
                if attempt + 1 == TRIES:
                    await self._lose(replica, str(lost))
                if not replica.up and replica.repair is not None:
                    await replica.repair  # which ends with `load`
                    return

    async def complete(
        self,
        path: str,
        bodies: Sequence[dict[str, Any]],
        instead: Callable[[RequestRefused], dict[str, Any] | None] = lambda refused: None,
    ) -> list[dict[str, Any]]:
        """Post every body to some replica. Returns the answers in order.

        `instead` may give an answer in place of a refusal; otherwise the first refusal ends the call.

        Raises:
            RolloutError: a request is refused, a replica cannot be kept alive, or none is left.
        """
        answers: list[dict[str, Any]] = [{}] * len(bodies)
        waiting = iter(range(len(bodies)))
        for replica in self.replicas:
            replica.restarts = 0

        async def work() -> None:
            for index in waiting:
                try:
                    answers[index] = await self._ask(path, bodies[index])
                except RequestRefused as refused:
                    if (answer := instead(refused)) is None:
                        raise
                    answers[index] = answer

        await _all(work() for _ in range(min(len(bodies), self.limit * len(self.replicas))))
        return answers

    async def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        while True:
            replica = await self._least_loaded()
            replica.in_flight += 1
            try:
                return await replica.post(self.session, path, body, self.timeout)
            except ReplicaLost as lost:
                await self._suspect(replica, lost)
            finally:
                replica.in_flight -= 1
                await self._notify()

    async def _least_loaded(self) -> Replica:
        """A replica with room for a request, once there is one."""
        async with self._changed:
            while True:
                self._raise_fatal()
                free = [r for r in self.replicas if r.up and r.in_flight < self.limit]
                if free:
                    return min(free, key=lambda replica: replica.in_flight)
                await self._changed.wait()

    async def _suspect(self, replica: Replica, lost: ReplicaLost) -> None:
        """A request was lost: find out whether its replica was, too."""
        if not replica.up:
            return
        times_lost = replica.times_lost
        hung = lost.timed_out or replica.ended() or not await replica.healthy(self.session, self.heartbeat)
        if hung and replica.times_lost == times_lost:
            await self._lose(replica, str(lost))
        elif not hung:
            await asyncio.sleep(0.1)

    async def _keep_watch(self) -> None:
        missed: dict[Replica, int] = {}
        while True:
            await asyncio.sleep(self.heartbeat / 2)
            up = [replica for replica in self.replicas if replica.up]
            well = await asyncio.gather(*(r.healthy(self.session, self.heartbeat / 2) for r in up))
            for replica, fine in zip(up, well, strict=True):
                missed[replica] = 0 if fine else missed.get(replica, 0) + 1
                if replica.up and (replica.ended() or missed[replica] >= 2):
                    missed[replica] = 0
                    await self._lose(replica, f"it did not answer for {self.heartbeat:g} s")

    async def _lose(self, replica: Replica, reason: str) -> None:
        """Take a replica out of use and see to it that it comes back, if it can."""
        if not replica.up:
            return
        replica.abandon()
        if not self.owner or (replica.command is not None and self.restartable):
            replica.repair = asyncio.create_task(self._repair(replica, reason))
        else:
            logger.warning("%s is lost and no longer used: %s", replica.name, reason)
            await asyncio.to_thread(replica.kill)
            if not any(other.up for other in self.replicas):
                self._fatal = RolloutError(f"no replica is left of {self._names()}: {reason}")
        await self._notify()

    async def _repair(self, replica: Replica, reason: str) -> None:
        try:
            if self.owner:
                await self._restart(replica, reason)
            else:
                await self._wait_for_owner(replica)
        except RolloutError as error:
            self._fatal = error
        else:
            replica.up = True
        self._publish()
        await self._notify()

    async def _restart(self, replica: Replica, reason: str) -> None:
        """Start a replica again, with the current weights; again, if it is lost meanwhile."""
        while True:
            self._publish()
            replica.restarts += 1
            if replica.restarts > MAX_RESTARTS:
                text = f"{replica.name} was lost {replica.restarts} times: {reason}"
                raise RolloutError(f"{text}; {replica.log_tail()}")
            logger.warning("%s is started again: %s", replica.name, reason)
            self.restarts += 1
            await asyncio.to_thread(replica.kill)
            replica.launch()
            try:
                await replica.wait_until_healthy(self.session, self.start_timeout)
                if self.load is not None:
                    await self.load(replica)
                return
            except ReplicaLost as lost:
                reason = str(lost)

    async def _wait_for_owner(self, replica: Replica) -> None:
        """Wait until the process that started the replica says that it runs, with its weights, elsewhere."""
        assert self.board is not None
        logger.warning("waiting for %s to be started again", replica.name)
        for _ in range(int(self.start_timeout / 0.5)):
            await asyncio.sleep(0.5)
            posted = json.loads(self.board.read_text())
            if posted["error"]:
                raise RolloutError(posted["error"])
            url = posted["urls"][self.replicas.index(replica)]
            if url and (url != replica.url or await replica.healthy(self.session, self.heartbeat)):
                replica.url = url
                return
        raise RolloutError(f"{replica.name} was not started again within {self.start_timeout:g} s")

    def _publish(self) -> None:
        """Tell the other processes of this machine which replicas can be used."""
        if self.board is not None and self.owner:
            urls = [replica.url if replica.up else None for replica in self.replicas]
            beside = self.board.with_suffix(".new")
            beside.write_text(json.dumps({"urls": urls, "error": str(self._fatal or "")}))
            beside.replace(self.board)

    def _raise_fatal(self) -> None:
        if self._fatal is not None:
            raise self._fatal

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _names(self) -> str:
        return ", ".join(replica.url or replica.label for replica in self.replicas)


async def _all(coroutines: Iterable[Awaitable[None]]) -> None:
    """Run them together; the first error ends the others and is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
