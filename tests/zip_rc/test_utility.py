"""Order statistics, the sampling utility and the search, on numbers worked out by hand and against Monte
Carlo.
"""

from __future__ import annotations

import numpy as np
import pytest

from posttrain.zip_rc.grid import Grid
from posttrain.zip_rc.utility import (
    Prices,
    candidate_sets,
    expected_max,
    max_pmf,
    planned,
    search,
    utilities,
)

PAIR = Grid(first_id=0, reward_values=(0.0, 1.0), length_edges=(0, 4, 8, 16))
A = [[0.10, 0.10, 0.10], [0.20, 0.30, 0.20]]
B = [[0.05, 0.15, 0.40], [0.05, 0.10, 0.25]]
JOINTS = np.array([A, B])
MEAN = 8.05
BOTH = np.array([[True, False], [False, True], [True, True]])


def random_joints(count, grid, seed):
    rng = np.random.default_rng(seed)
    cells = rng.dirichlet(np.full(grid.size, 0.4), count)
    return cells.reshape(count, grid.reward_bins, grid.length_bins)


def test_the_largest_of_two():
    assert expected_max(np.array([0.0, 1.0]), np.array([[0.4, 0.6], [0.5, 0.5]])) == pytest.approx(0.8)
    pmfs = np.array([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]])
    assert max_pmf(pmfs) == pytest.approx([0.08, 0.48, 0.44])
    assert expected_max(np.array([0.0, 0.5, 1.0]), pmfs) == pytest.approx(0.68)
    lengths = np.array([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]])
    midpoints = np.array([128.0, 384.0, 768.0])
    assert max_pmf(lengths) == pytest.approx([0.10, 0.46, 0.44])
    assert expected_max(midpoints, lengths) == pytest.approx(527.36)
    assert (lengths @ midpoints).sum() == pytest.approx(780.8)


def test_bounds_of_the_largest():
    pmfs = random_joints(6, PAIR, 1).sum(axis=1)
    means = pmfs @ PAIR.lengths
    values = [expected_max(PAIR.lengths, pmfs[:count]) for count in range(1, 7)]
    assert values == sorted(values)
    alike = np.tile(pmfs[:1], (8, 1))
    gains = np.diff([expected_max(PAIR.lengths, alike[:count]) for count in range(1, 9)])
    assert (gains > 0).all()
    assert (np.diff(gains) < 0).all()  # every further sample of one forecast adds less
    assert means.max() <= values[-1] <= means.sum()
    points = np.eye(3)[[0, 2, 1]]
    assert expected_max(PAIR.lengths, points) == 12.0


def test_more_samples_of_one_forecast():
    """U(K) = 1 - 0.7^K - 0.05 K is largest at 6 samples; without a price of compute all are used."""
    grid = Grid(first_id=0, reward_values=(0.0, 1.0), length_edges=(0, 2))
    joints = np.tile([[[0.7], [0.3]]], (8, 1, 1))
    first = np.tril(np.ones((8, 8), bool))
    [found] = utilities(joints, first, grid, Prices(0.05, 0.0), reference=1.0)
    expected = [0.25, 0.41, 0.507, 0.5599, 0.58193, 0.582351, 0.567646, 0.542352]
    assert found == pytest.approx(expected, abs=1e-6)
    assert search(joints, grid, Prices(0.05, 0.0), reference=1.0).keep.sum() == 6
    assert search(joints, grid, Prices(0.0, 0.05), reference=1.0).keep.sum() == 8


@pytest.mark.parametrize(
    ("alpha", "beta", "expected"),
    [
        (0.1, 0.1, [0.6180, 0.2820, 0.6836]),
        (1.0, 0.1, [0.6180, None, 0.6200]),
        (1.0, 0.4, [0.3720, None, 0.0200]),
    ],
)
def test_two_samples(alpha, beta, expected):
    found = utilities(JOINTS, BOTH, PAIR, Prices.of(alpha, beta), MEAN)[0]
    for value, wanted in zip(found, expected, strict=True):
        assert wanted is None or value == pytest.approx(wanted, abs=5e-5)


def test_two_samples_and_the_decision():
    both, alone = np.array([True, True]), np.array([True, False])
    for alpha, beta, keep in ((0.1, 0.1, both), (1.0, 0.1, both), (1.0, 0.4, alone)):
        choice = search(JOINTS, PAIR, Prices.of(alpha, beta), MEAN)
        assert (choice.keep == keep).all()
        assert choice.utility >= utilities(JOINTS, keep[None], PAIR, Prices.of(alpha, beta), MEAN)[0, 0]


def test_plans_give_up_what_is_long():
    rewards, lengths = planned(JOINTS)
    assert rewards[0] @ PAIR.rewards == pytest.approx([0.7, 0.4])
    assert lengths[0] @ PAIR.lengths == pytest.approx([6.6, 9.5])
    assert rewards[2, 0] @ PAIR.rewards == pytest.approx(0.5)
    assert lengths[2, 0] == pytest.approx([0.3, 0.4, 0.3])
    assert rewards[1, 0] == pytest.approx([0.8, 0.2])
    assert lengths[1, 0] == pytest.approx([0.3, 0.7, 0.0])
    # At the last bin only the reward suffers; the lower edge is charged, 8 tokens in place of 12.
    alone = np.array([[True, False]])
    found = utilities(JOINTS, alone, PAIR, Prices.of(0.1, 0.1), MEAN)[:, 0]
    assert found[2] == pytest.approx(0.5 - 0.1 * (0.3 * 2 + 0.4 * 6 + 0.3 * 8) / MEAN)
    assert found[1] == pytest.approx(0.2 - 0.1 * (0.3 * 2 + 0.7 * 4) / MEAN)


def test_plans_keep_all_mass():
    grid = Grid(first_id=0, reward_values=(0.0, 0.3, 1.0), length_edges=(0, 1, 5, 20, 30))
    joints = random_joints(5, grid, 2)
    rewards, lengths = planned(joints)
    assert rewards.sum(-1) == pytest.approx(np.ones((4, 5)))
    assert lengths.sum(-1) == pytest.approx(np.ones((4, 5)))
    assert lengths[3] == pytest.approx(lengths[0])  # the last bin alone: nothing is longer
    assert (np.diff(rewards[1:, :, 0], axis=0) <= 1e-12).all()


def test_finished_samples_compete_and_cost_nothing():
    prices = Prices.of(0.5, 0.1)
    empty = np.zeros((1, 2), bool)
    assert utilities(JOINTS, empty, PAIR, prices, MEAN, finished=0.65) == pytest.approx(np.full((3, 1), 0.65))
    # max(V, 0.65) of A: 0.3 · 0.65 + 0.7.
    alone = np.array([[True, False]])
    without = utilities(JOINTS, alone, PAIR, prices, MEAN)[0, 0]
    with_finished = utilities(JOINTS, alone, PAIR, prices, MEAN, finished=0.65)[0, 0]
    assert with_finished - without == pytest.approx(0.3 * 0.65)


def test_nothing_goes_on_only_when_something_is_finished():
    dear = Prices(10.0, 0.0)
    assert search(JOINTS, PAIR, dear, MEAN).keep.tolist() == [True, False]
    assert search(JOINTS, PAIR, dear, MEAN, [0.2]).keep.tolist() == [False, False]
    assert search(JOINTS, PAIR, dear, MEAN, [0.2]).utility == pytest.approx(0.2)
    free = search(JOINTS, PAIR, Prices(0.0, 0.0), MEAN, [1.0])
    assert free.keep.all()  # of equal utilities the larger set


def test_utilities_against_monte_carlo():
    grid = Grid(first_id=0, reward_values=(0.0, 0.25, 0.5, 1.0), length_edges=(0, 4, 8, 16, 40))
    joints = random_joints(4, grid, 3)
    chosen, bound, finished, draws = np.array([True, False, True, True]), 2, 0.3, 200_000
    rng = np.random.default_rng(0)
    rewards, lengths = [], []
    for joint in joints[chosen]:
        cells = rng.choice(grid.size, draws, p=joint.ravel())
        reward, bins = grid.rewards[cells // grid.length_bins], cells % grid.length_bins
        rewards.append(np.where(bins < bound, reward, 0.0))
        lengths.append(np.where(bins < bound, grid.lengths[bins], grid.length_edges[bound]))
    value = np.maximum(np.max(rewards, axis=0), finished).mean()
    cost = 0.2 * np.sum(lengths, axis=0).mean() / 10 + 0.05 * np.max(lengths, axis=0).mean() / 10
    found = utilities(joints, chosen[None], grid, Prices(0.2, 0.05), 10.0, finished)[bound, 0]
    assert found == pytest.approx(value - cost, abs=5e-3)


def test_candidates_are_prefixes_of_two_orders():
    # A is shorter and better than B: every candidate that has B alone would be dominated, and there is none.
    sets = {tuple(row) for row in candidate_sets(JOINTS, PAIR).tolist()}
    assert sets == {(False, False), (True, False), (True, True)}
    short_and_bad = np.array([[0.8, 0.0, 0.1], [0.1, 0.0, 0.0]])
    sets = {tuple(row) for row in candidate_sets(np.array([A, short_and_bad]), PAIR).tolist()}
    assert sets == {(False, False), (True, False), (False, True), (True, True)}


def test_search_is_nearly_exhaustive():
    """On random forecasts the two orders miss little of what all sets have."""
    grid = Grid(first_id=0, reward_values=(0.0, 0.5, 1.0), length_edges=(0, 4, 8, 16, 40))
    every = ((np.arange(1, 32)[:, None] >> np.arange(5)) & 1).astype(bool)
    losses = []
    for seed in range(50):
        joints = random_joints(5, grid, seed)
        prices = Prices.of(0.5, 0.05)
        best = utilities(joints, every, grid, prices, 10.0).max()
        choice = search(joints, grid, prices, 10.0)
        found = utilities(joints, choice.keep[None], grid, prices, 10.0)[choice.bound or 0, 0]
        assert choice.utility == pytest.approx(found)
        losses.append(best - choice.utility)
    assert min(losses) > -1e-9
    assert max(losses) < 0.02
