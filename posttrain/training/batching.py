"""The order in which rows are trained on when batches are made of rows of like length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BATCHES = 50
"""Batches that are sorted together: more would pad less and shuffle less."""


def grouped_order(lengths: Sequence[int], batch_size: int, rows: int, seed: int) -> list[int]:
    """Indices of `rows` rows, epoch after epoch, so that every `batch_size` of them are of like length.

    Every epoch is a new permutation. Of each `BATCHES` batches the rows are sorted by length and the batches
    shuffled, so that long and short ones alternate. Only the last batch may be smaller than the others.
    """
    rng = np.random.default_rng(seed)
    epochs = -(-rows // len(lengths))
    order = np.concatenate([rng.permutation(len(lengths)) for _ in range(epochs)])[:rows]
    known = np.asarray(lengths)
    found: list[int] = []
    for start in range(0, rows, BATCHES * batch_size):
        part = order[start : start + BATCHES * batch_size]
        tail = part[len(part) // batch_size * batch_size :]
        full = part[: len(part) - len(tail)]
        batches = full[np.argsort(known[full], kind="stable")].reshape(-1, batch_size)
        found += [int(index) for index in [*rng.permutation(batches).ravel(), *tail]]
    return found
