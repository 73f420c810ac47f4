"""The way of a policy's weights to the replicas of a server engine, and the proof that they arrived."""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.errors import RolloutError
from posttrain.rollout.adapter_files import adapter_weights, why_merged, write_adapter
from posttrain.rollout.pool import ReplicaPool
from posttrain.rollout.replica import Replica, RequestRefused
from posttrain.rollout.serve import WORKER_EXTENSION
from posttrain.rollout.weight_files import write_weights
from posttrain.rollout.weights import named_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Files:
    """A folder of safetensors files and the SHA-256 of their contents."""

    folder: Path
    checksum: str


@dataclass(frozen=True)
class Package:
    """What replicas need for one version: base weights, unless they serve them already, and an adapter."""

    base: Files | None = None
    adapter: Files | None = None
    transferred: bool = False
    """The base weights come over NCCL instead."""


class AdaptersRefused(Exception):
    """A running replica was not started with LoRA: adapters have to be merged."""


class Delivery:
    """Writes weights to files and has every replica load them, compare the checksum and forget its cache.

    The files of the current version stay until the next one: a replica that is started again needs them.

    Args:
        pool: the replicas.
        folder: for the files; trainer and replicas see it under the same path.
        base_served: whether the replicas have the weights of the model that adapters are trained on.
        max_rank: of the adapters that replicas take; None: none.
        transfers: send whole weights over NCCL, not as files. A replica that is lost then stays lost.
        seconds: that a replica may take to load.
        model_name: under which the replicas serve the base.
    """

    def __init__(
        self,
        pool: ReplicaPool,
        folder: Path,
        *,
        base_served: bool,
        max_rank: int | None,
        transfers: bool,
        seconds: float,
        model_name: str,
    ) -> None:
        self._pool, self._folder, self._seconds = pool, folder, seconds
        self._base_served, self._max_rank = base_served, max_rank
        self._transfers = transfers
        self._transfer: Any = None
        self._base_name = self.model_name = model_name
        self._package = Package()
        self._count = 0
        self._id = uuid.uuid4().hex[:8]

    def gather(self, model: Any, *, keep: bool) -> Package:
        """Write what the replicas need for `model`. Every process calls this, since the model may be split
        over them; only where `keep` is true anything is written.

        Raises:
            RolloutError: the folder cannot be written to.
        """
        self._count += 1
        reason = why_merged(model, self._max_rank)
        if reason is not None:
            self._base_served = False
            if self._count == 1 and hasattr(model, "peft_config"):
                logger.warning("adapters are merged before they are sent: %s", reason)
            if self._transfers:
                return self._prepare_transfer(model, keep)
            return Package(base=self._write_base(named_weights(model), keep))
        base = self._package.base
        if not self._base_served:
            base = self._write_base(named_weights(model, merge=False), keep)
            self._base_served = True
        weights = adapter_weights(model)
        if not keep:
            return Package()
        folder = self._folder / f"adapter-{self._id}-{self._count}"
        try:
            return Package(base, Files(folder, write_adapter(folder, model, weights)))
        except OSError as error:
            raise RolloutError(f"adapters cannot be written to {self._folder}: {error}") from error

    def _prepare_transfer(self, model: Any, keep: bool) -> Package:
        from posttrain.rollout.transfer import PolicySource, WeightTransfer

        if self._transfer is None:
            device = torch.device("cuda", torch.cuda.current_device())
            self._transfer = WeightTransfer(self._pool, PolicySource(model, device), self._seconds)
        self._transfer.source.model = model
        if not keep:
            for _ in named_weights(model):  # while the leading process sends
                pass
        return Package(transferred=True)

    def _write_base(self, weights: Iterator[tuple[str, torch.Tensor]], keep: bool) -> Files | None:
        folder = self._folder / f"weights-{self._id}-{self._count}"
        try:
            return Files(folder, write_weights(folder, weights)) if keep else None
        except OSError as error:
            raise RolloutError(f"weights cannot be written to {self._folder}: {error}") from error
        finally:
            for _ in weights:  # the other processes wait until all of them have been put together
                pass

    def merge_from_now_on(self) -> None:
        """Send no more adapters."""
        self._max_rank = None

    async def deliver(self, package: Package) -> str:
        """Bring every replica to a version. Returns the name to ask for it by.

        Raises:
            RolloutError: a replica did not load what was written; or none is left.
            AdaptersRefused: a replica that runs already takes no adapters.
        """
        old, new_base = self._package, package.base if package.base != self._package.base else None
        self._package = package
        self._pool.restartable = not package.transferred
        if package.transferred:
            await self._transfer.send()
        self._pool.load = lambda replica: self._load(replica, package)
        await self._pool.each(lambda replica: self._load(replica, Package(new_base, package.adapter)))
        self.model_name = self._base_name if package.adapter is None else package.adapter.folder.name
        if old.adapter is not None:
            name = old.adapter.folder.name
            await self._pool.each(lambda replica: self._unload(replica, name))
        for files in (old.base, old.adapter):
            if files is not None and files not in (package.base, package.adapter):
                shutil.rmtree(files.folder, ignore_errors=True)
        return self.model_name

    async def _load(self, replica: Replica, package: Package) -> None:
        if package.base is not None:
            await self._verified(replica, "load_weight_files", package.base)
        if package.adapter is not None:
            await self._verified(replica, "check_files", package.adapter)
            folder = package.adapter.folder
            body = {"lora_name": folder.name, "lora_path": str(folder), "load_inplace": True}
            try:
                await replica.post(self._pool.session, "/v1/load_lora_adapter", body, self._seconds)
            except RequestRefused as refused:
                if refused.status == 404 and replica.command is None:
                    raise AdaptersRefused(str(refused)) from refused
                raise
        answer = await replica.post(self._pool.session, "/reset_prefix_cache", {}, self._seconds)
        if answer.get("success") is not True:
            raise RolloutError(f"{replica.name} kept prefixes of the old weights in its cache after a sync")

    async def _verified(self, replica: Replica, method: str, files: Files) -> None:
        """Have every worker of a replica do something with files, and compare what it found in them."""
        body = {"method": method, "args": [str(files.folder), files.checksum]}
        try:
            answer = await replica.post(self._pool.session, "/collective_rpc", body, self._seconds)
        except RequestRefused as refused:
            hint = f"; it needs VLLM_SERVER_DEV_MODE=1 and --worker-extension-cls {WORKER_EXTENSION}"
            raise RolloutError(f"{refused}{hint if replica.command is None else ''}") from refused
        results = answer.get("results") or [{}]
        found = {result.get("checksum") if isinstance(result, dict) else None for result in results}
        if found != {files.checksum}:
            raise RolloutError(f"{replica.name} loaded other weights than were written to {files.folder}")

    async def _unload(self, replica: Replica, name: str) -> None:
        try:
            await replica.post(
                self._pool.session, "/v1/unload_lora_adapter", {"lora_name": name}, self._seconds
            )
        except RequestRefused as refused:
            if refused.status != 404:  # a replica that was started again never had it
                raise
