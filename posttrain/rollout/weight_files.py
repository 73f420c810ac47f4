"""Weights on their way to the replicas of a server engine, as safetensors files in a folder of their own.

A folder is written beside, flushed to disk and renamed, so that under its name it is always whole. Its
checksum goes another way, with the request to load it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save

WEIGHTS_PATTERN = "*.safetensors"
SHARD_BYTES = 2**30
"""Size of one file; the trainer holds up to two of them in memory while it writes."""


def write_weights(folder: Path, weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Write `weights` to the new `folder`. Returns the checksum of their contents, taken before writing."""
    beside = folder.with_name(f".{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    digest = hashlib.sha256()
    for count, shard in enumerate(_shards(weights)):
        contents = save(shard)
        digest.update(contents)
        (beside / f"weights-{count:05d}.safetensors").write_bytes(contents)
    publish(beside, folder)
    return digest.hexdigest()


def publish(beside: Path, folder: Path) -> None:
    """Give a finished folder its name, once all of it is on disk."""
    for path in [*beside.rglob("*"), beside]:
        _sync_to_disk(path)
    beside.rename(folder)
    _sync_to_disk(folder.parent)


def checksum(folder: Path) -> str:
    """SHA-256 over the contents of the folder's weight files, in the order of their names.

    Raises:
        OSError: a file cannot be read, or there is none.
    """
    paths = sorted(folder.glob(WEIGHTS_PATTERN))
    if not paths:
        raise FileNotFoundError(f"there are no weights in {folder}")
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _shards(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    for name, weight in weights:
        # A copy: tied weights share memory, which the format does not allow.
        shard[name] = torch.empty(weight.shape, dtype=weight.dtype).copy_(weight.detach())
        if sum(held.nbytes for held in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def _sync_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
