"""Batches of rows of like length: every row once an epoch, less padding, the same order for the same seed."""

import numpy as np
import pytest

from posttrain.training.batching import grouped_order


def padded(order, lengths, batch_size):
    """Tokens of all batches, each padded to its longest row."""
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)


@pytest.fixture
def lengths():
    return np.random.default_rng(0).integers(5, 100, 1003).tolist()


def test_every_row_once_an_epoch(lengths):
    order = grouped_order(lengths, 16, 2 * len(lengths), seed=1)
    assert sorted(order) == sorted([*range(len(lengths))] * 2)
    assert sorted(grouped_order(lengths, 16, len(lengths), seed=1)) == [*range(len(lengths))]


def test_a_part_of_an_epoch_has_no_row_twice(lengths):
    order = grouped_order(lengths, 16, 300, seed=1)
    assert len(order) == len(set(order)) == 300


def test_batches_are_nearly_free_of_padding(lengths):
    order = grouped_order(lengths, 16, len(lengths), seed=1)
    shuffled = np.random.default_rng(1).permutation(len(lengths)).tolist()
    assert padded(shuffled, lengths, 16) > 1.7 * sum(lengths)
    assert padded(order, lengths, 16) < 1.1 * sum(lengths)


def test_short_and_long_batches_alternate(lengths):
    order = grouped_order(lengths, 16, len(lengths), seed=1)
    longest = [max(lengths[index] for index in order[i : i + 16]) for i in range(0, len(order) - 16, 16)]
    assert abs(np.corrcoef(range(len(longest)), longest)[0, 1]) < 0.4


def test_the_order_follows_from_the_seed(lengths):
    assert grouped_order(lengths, 16, 500, seed=1) == grouped_order(lengths, 16, 500, seed=1)
    assert grouped_order(lengths, 16, 500, seed=1) != grouped_order(lengths, 16, 500, seed=2)
