"""The order in which rows are trained on when a batch's micro-batches are made of rows of like length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def sorted_batches(lengths: Sequence[int], batch_size: int, rows: int, seed: int) -> list[int]:
    """Indices of `rows` rows, epoch after epoch, every `batch_size` of them sorted by length.

    Every epoch is a new permutation, so the batches are random ones, as they would be without sorting.
    """
    rng = np.random.default_rng(seed)
    epochs = -(-rows // len(lengths))
    order = np.concatenate([rng.permutation(len(lengths)) for _ in range(epochs)])[:rows]
    known = np.asarray(lengths)
    batches = [order[start : start + batch_size] for start in range(0, rows, batch_size)]
    return [int(index) for batch in batches for index in batch[np.argsort(known[batch], kind="stable")]]
