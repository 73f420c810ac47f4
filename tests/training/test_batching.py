"""Batches sorted by length: every row once an epoch, little padding, the batches random."""

import numpy as np
import pytest

from posttrain.training.batching import sorted_batches


def padded(order, lengths, size):
    """Tokens of all forward passes, each padded to its longest row."""
    parts = [order[i : i + size] for i in range(0, len(order), size)]
    return sum(len(part) * max(lengths[index] for index in part) for part in parts)


@pytest.fixture
def lengths():
    return np.random.default_rng(0).integers(5, 100, 1003).tolist()


def test_every_row_once_an_epoch(lengths):
    order = sorted_batches(lengths, 64, 2 * len(lengths), seed=1)
    assert sorted(order[: len(lengths) // 64 * 64]) == sorted(set(order[: len(lengths) // 64 * 64]))
    assert sorted(order) == sorted([*range(len(lengths))] * 2)


def test_micro_batches_have_less_padding(lengths):
    order = sorted_batches(lengths, 64, len(lengths), seed=1)
    assert padded(order, lengths, 64) > 1.8 * sum(lengths)
    assert padded(order, lengths, 8) < 1.15 * sum(lengths)


def test_batches_are_random_ones(lengths):
    order = sorted_batches(lengths, 64, 15 * 64, seed=1)
    means = np.asarray(lengths)[order].reshape(15, 64).mean(axis=1)
    spread = np.std(lengths) / 8  # of the mean of 64 random rows
    assert 0.5 * spread < means.std() < 1.6 * spread


def test_rows_are_sorted_within_a_batch(lengths):
    order = sorted_batches(lengths, 10, 25, seed=1)
    for start in (0, 10, 20):
        own = [lengths[index] for index in order[start : start + 10]]
        assert own == sorted(own)


def test_the_order_follows_from_the_seed(lengths):
    assert sorted_batches(lengths, 16, 500, seed=1) == sorted_batches(lengths, 16, 500, seed=1)
    assert sorted_batches(lengths, 16, 500, seed=1) != sorted_batches(lengths, 16, 500, seed=2)
