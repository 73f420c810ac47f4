"""Weights to replicas on GPUs over NCCL, by vLLM's own weight transfer. Imports vLLM.

vLLM drives the exchange: it opens the group, announces names, types and shapes, and broadcasts. Given here
are the two things it asks for: where the weights come from, and how the replicas are told.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import torch
from vllm.distributed.weight_transfer import ParamMeta, WeightSource, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from posttrain.errors import RolloutError
from posttrain.rollout.pool import ReplicaPool
from posttrain.rollout.replica import ReplicaLost, free_port
from posttrain.rollout.weights import named_weights

Post = Callable[[str, list[dict[str, Any]]], None]
"""Posts to a path of every replica at once, to each its own body, and waits for the answers."""


class PolicySource(WeightSource):
    """The weights of a policy, adapters merged, as vLLM asks for them."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model = model
        self._device = device
        # A policy that is split over processes has to be put together for this, once.
        self._metadata = [
            ParamMeta(name, weight.dtype, tuple(weight.shape)) for name, weight in named_weights(model)
        ]

    def metadata(self) -> list[ParamMeta]:
        """Name, type and shape of every weight, in the order of iteration."""
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in named_weights(self.model):
            yield name, weight.to(self._device)


class ReplicaGroup:
    """What vLLM calls a weight-sync client, for several replicas at once.

    Args:
        post: reaches the replicas.
        workers: of each replica; they take the ranks after the trainer's in this order.
    """

    def __init__(self, post: Post, workers: Sequence[int]) -> None:
        self._post = post
        self._workers = list(workers)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Have the replicas join the group."""
        first = init_info["rank_offset"]
        offsets = [first + sum(self._workers[:index]) for index in range(len(self._workers))]
        bodies = [{"init_info": {**init_info, "rank_offset": offset}} for offset in offsets]
        self._post("/init_weight_transfer_engine", bodies)

    def start_weight_update(self) -> None:
        """Have the replicas get ready for new weights."""
        self._same("/start_weight_update", {})

    def update_weights(self, update_info: Any) -> None:
        """Have the replicas receive what is broadcast meanwhile."""
        self._same("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Have the replicas use the new weights."""
        self._same(
            "/finish_weight_update", {} if weight_version is None else {"weight_version": weight_version}
        )

    def _same(self, path: str, body: dict[str, Any]) -> None:
        self._post(path, [body] * len(self._workers))


class WeightTransfer:
    """Sends a policy's weights to every replica of a pool. They form one group, opened anew when one is lost.

    Args:
        pool: the replicas.
        source: the policy.
        seconds: that an answer of a replica may take.
    """

    def __init__(self, pool: ReplicaPool, source: PolicySource, seconds: float) -> None:
        self.source = source
        self._pool, self._seconds = pool, seconds
        self._urls: list[str] = []
        self._engine: Any = None

    async def send(self) -> None:
        """Send the weights as they are now; returns when every replica uses them.

        Raises:
            RolloutError: a replica failed or was lost meanwhile.
        """
        loop = asyncio.get_running_loop()
        replicas = [replica for replica in self._pool.replicas if replica.up]

        async def post_all(path: str, bodies: list[dict[str, Any]]) -> None:
            # Never asked twice: a worker that waits for a broadcast which does not come waits for ever.
            posts = (
                replica.post(self._pool.session, path, body, self._seconds, tries=1)
                for replica, body in zip(replicas, bodies, strict=True)
            )
            await asyncio.gather(*posts)

        def post(path: str, bodies: list[dict[str, Any]]) -> None:
            asyncio.run_coroutine_threadsafe(post_all(path, bodies), loop).result(self._seconds)

        try:
            if self._urls != self._pool.urls:
                answers = [
                    await r.get(self._pool.session, "/get_world_size", self._seconds) for r in replicas
                ]
                workers = [int(answer["world_size"]) for answer in answers]
                await asyncio.to_thread(self._open, self._pool.urls, workers, post)
            await asyncio.to_thread(self._engine.send_weights)
        except (ReplicaLost, TimeoutError) as error:
            raise RolloutError(f"a replica was lost while weights were sent over NCCL: {error}") from error

    def _open(self, urls: list[str], workers: Sequence[int], post: Post) -> None:
        if self._engine is not None:
            self._engine.shutdown()
            post("/shutdown_weight_transfer_engine", [{}] * len(workers))
        self._engine = WeightTransferTrainerFactory.trainer_init(
            trainer_info(urls, workers), client=ReplicaGroup(post, workers), source=self.source
        )
        self._urls = urls


def trainer_info(urls: Sequence[str], workers: Sequence[int]) -> NCCLTrainerInitInfo:
    """The group: this process, which sends, and every replica's workers."""
    return NCCLTrainerInitInfo(
        master_address=_address_towards(urls[0]),
        master_port=free_port(),
        world_size=1 + sum(workers),
        rank=0,
    )


def _address_towards(url: str) -> str:
    """This machine's address as the machine of `url` sees it."""
    place = urlsplit(url)
    with socket.create_connection((place.hostname or "", place.port or 80), timeout=10) as probe:
        return probe.getsockname()[0]
