from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.recipe.schema import LossKind
from posttrain.training.advantages import (
    BatchStats,
    batch_moments,
    compute_advantages,
    decoupled_rewards,
    default_scale,
    group_advantages,
    leave_one_out,
    reinforce_pp_baseline,
    zero_variance,
)

# Two groups, interleaved: a = (1, 0, 0, 1), b = (3, 0); mean 1/2 and 3/2.
REWARDS = np.array([1.0, 3.0, 0.0, 0.0, 0.0, 1.0])
GROUPS = ["a", "b", "a", "b", "a", "a"]
CENTRED = np.array([0.5, 1.5, -0.5, -1.5, -0.5, 0.5])


def test_group_scale():
    # std of a: sqrt(4 · 0.25 / 3) = 0.577350; of b: sqrt(2 · 2.25 / 1) = 2.121320
    divisor = np.array([0.577350, 2.121320, 0.577350, 2.121320, 0.577350, 0.577350]) + 1e-4
    np.testing.assert_allclose(group_advantages(REWARDS, GROUPS), CENTRED / divisor, rtol=1e-5)


def test_batch_scale():
    # all rewards: mean 5/6, squared deviations 11 - 6 · 25/36 = 6.833333, std sqrt(6.833333 / 5) = 1.169045
    np.testing.assert_allclose(
        group_advantages(REWARDS, GROUPS, "batch"), CENTRED / (1.169045 + 1e-4), rtol=1e-5
    )


def test_no_scale():
    np.testing.assert_array_equal(group_advantages(REWARDS, GROUPS, "none"), CENTRED)


def test_leave_one_out():
    # a: 1 - (0+0+1)/3 = 2/3, 0 - (1+0+1)/3 = -2/3; b: 3 - 0, 0 - 3
    np.testing.assert_allclose(leave_one_out(REWARDS, GROUPS), [2 / 3, 3, -2 / 3, -3, -2 / 3, 2 / 3])


def test_reinforce_pp():
    # centred: mean 0, squared deviations 4 · 0.25 + 2 · 2.25 = 5.5, std sqrt(5.5 / 5) = 1.048809
    np.testing.assert_allclose(reinforce_pp_baseline(REWARDS, GROUPS), CENTRED / (1.048809 + 1e-4), rtol=1e-5)


def test_what_each_loss_divides_by():
    expected = {"dr_grpo": "none", "rloo": "none", "reinforce_pp": "batch"}
    assert {kind: default_scale(kind) for kind in get_args(LossKind)} == {
        kind: expected.get(kind, "group") for kind in get_args(LossKind)
    }


@pytest.mark.parametrize("kind", get_args(LossKind))
def test_dispatch(kind):
    advantages = compute_advantages(kind, None, REWARDS, GROUPS)
    if kind == "rloo":
        expected = leave_one_out(REWARDS, GROUPS)
    elif kind == "reinforce_pp":
        expected = reinforce_pp_baseline(REWARDS, GROUPS)
    else:
        expected = group_advantages(REWARDS, GROUPS, default_scale(kind))
    np.testing.assert_array_equal(advantages, expected)


def test_dispatch_of_a_scale_that_is_not_the_papers():
    np.testing.assert_allclose(
        compute_advantages("rloo", "batch", REWARDS, GROUPS),
        np.array([2 / 3, 3, -2 / 3, -3, -2 / 3, 2 / 3]) / (1.169045 + 1e-4),
        rtol=1e-5,
    )
    np.testing.assert_array_equal(
        compute_advantages("reinforce_pp", "group", REWARDS, GROUPS), group_advantages(REWARDS, GROUPS)
    )


def test_equal_rewards_give_exactly_zero():
    # 0.1 + 0.1 + 0.1 is not 0.3, so a mean of three tenths is not a tenth either.
    rewards, groups = np.array([0.1, 0.1, 0.1, 0.1 + 0.2, 0.3, 1.0, 0.0]), ["x"] * 3 + ["y"] * 2 + ["z"] * 2
    for kind in get_args(LossKind):
        for scale in ("group", "batch", "none"):
            assert (compute_advantages(kind, scale, rewards, groups)[:5] == 0.0).all()
    assert zero_variance(rewards, groups) == {"x", "y"}


def test_groups_of_one_and_no_rollouts():
    for kind in get_args(LossKind):
        np.testing.assert_array_equal(compute_advantages(kind, None, np.array([5.0]), ["a"]), [0.0])
        assert compute_advantages(kind, None, np.array([]), []).shape == (0,)
    assert zero_variance(np.array([5.0, 1.0, 2.0]), ["a", "b", "b"]) == {"a"}
    assert zero_variance(np.array([]), []) == set()


batches = st.lists(
    st.tuples(st.floats(-100, 100, allow_subnormal=False), st.integers(0, 4)), min_size=1, max_size=30
)


@given(batches)
def test_finite_centred_and_ordered(batch):
    rewards, groups = np.array([r for r, _ in batch]), [g for _, g in batch]
    for kind in get_args(LossKind):
        advantages = compute_advantages(kind, None, rewards, groups)
        assert np.isfinite(advantages).all()
        for group in set(groups):
            members = [i for i, g in enumerate(groups) if g == group]
            assert math.isclose(advantages[members].sum(), 0.0, abs_tol=1e-6 * (1 + np.abs(advantages).sum()))
            order = np.argsort(rewards[members], kind="stable")
            assert (np.diff(advantages[members][order]) >= -1e-9).all()


@given(batches, st.randoms(use_true_random=False))
def test_order_of_rollouts_does_not_matter(batch, random):
    order = list(range(len(batch)))
    random.shuffle(order)
    rewards, groups = np.array([r for r, _ in batch]), [g for _, g in batch]
    for kind in get_args(LossKind):
        expected = compute_advantages(kind, None, rewards, groups)[order]
        actual = compute_advantages(kind, None, rewards[order], [groups[i] for i in order])
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-9)


@settings(max_examples=50)
@given(batches, st.integers(1, 4))
def test_ranks_that_own_whole_groups_agree_with_one_process(batch, world):
    rewards, groups = np.array([r for r, _ in batch]), [g for _, g in batch]
    ranks = [[i for i, g in enumerate(groups) if g % world == rank] for rank in range(world)]
    for kind in get_args(LossKind):
        expected = compute_advantages(kind, "batch", rewards, groups)
        moments = sum(batch_moments(kind, rewards[own], [groups[i] for i in own]) for own in ranks)
        stats = BatchStats.from_moments(moments)
        for own in ranks:
            actual = compute_advantages(kind, "batch", rewards[own], [groups[i] for i in own], stats)
            np.testing.assert_allclose(actual, expected[own], rtol=1e-6, atol=1e-9)


def test_batch_stats():
    stats = BatchStats.from_moments(batch_moments("grpo", REWARDS, GROUPS))
    assert math.isclose(stats.mean, REWARDS.mean())
    assert math.isclose(stats.std, REWARDS.std(ddof=1))
    assert BatchStats.from_moments(np.zeros(3)) == BatchStats(0.0, 0.0)


# --- normalise, then sum (GDPO)


def test_rewards_normalised_by_themselves():
    # a: (1, 0) and (10, 30), both ± 0.707107 after division; the second counts half.
    # b: the first reward is 2 for both and says nothing, the second applies to one alone, too.
    values = np.array([[1.0, 10.0], [0.0, 30.0], [2.0, 5.0], [2.0, np.nan]])
    total = decoupled_rewards(values, np.array([1.0, 0.5]), ["a", "a", "b", "b"])
    first, second = 0.5 / (0.707107 + 1e-4), 10.0 / (14.142136 + 1e-4)
    np.testing.assert_allclose(total, [first - 0.5 * second, -first + 0.5 * second, 0.0, 0.0], rtol=1e-5)


def test_statistics_leave_out_what_does_not_apply():
    # (1, -, 3): mean 2, std sqrt(2); the one in the middle has the other reward alone: (0, 3, 3), std sqrt(3)
    values = np.array([[1.0, 0.0], [np.nan, 3.0], [3.0, 3.0]])
    total = decoupled_rewards(values, np.array([1.0, 1.0]), ["a"] * 3)
    expected = [-1 / 1.414214 - 2 / 1.732051, 1 / 1.732051, 1 / 1.414214 + 1 / 1.732051]
    np.testing.assert_allclose(total, expected, rtol=2e-4)


def trl_normalize_then_sum(rewards_per_func, weights, num_generations):
    """`GRPOTrainer._generate_and_score_completions` of trl 1.16, branch `normalize_then_sum`."""

    def nanstd(values, **options):  # `trl.trainer.utils.nanstd`
        squares = (values - torch.nanmean(values, **{**options, "keepdim": True})) ** 2
        count = torch.sum(~torch.isnan(values), **options)
        return torch.sqrt(torch.nanmean(squares, **options) * count / (count - 1))

    grouped = rewards_per_func.view(-1, num_generations, rewards_per_func.shape[1])
    mean_k = torch.nanmean(grouped, dim=1, keepdim=True)
    std_k = nanstd(grouped, dim=1, keepdim=True)
    reward_k = ((grouped - mean_k) / (std_k + 1e-4)).view(-1, rewards_per_func.shape[1])
    rewards = (reward_k * weights.unsqueeze(0)).nansum(dim=1)
    return (rewards - torch.nanmean(rewards)) / (nanstd(rewards) + 1e-4)


@pytest.mark.parametrize("missing", [0.0, 0.2])
@pytest.mark.parametrize("ranks", [1, 3])
def test_normalise_then_sum_equals_trl(missing, ranks):
    generator = np.random.default_rng(7)
    values = generator.choice([0.0, 0.5, 1.0], (24, 3)) * [1.0, 100.0, 0.01]
    values[generator.random(values.shape) < missing] = np.nan
    weights = np.array([1.0, 0.5, -2.0])
    groups = np.repeat(np.arange(6), 4)
    expected = trl_normalize_then_sum(torch.tensor(values), torch.tensor(weights), 4).numpy()

    parts = [slice(rank * 24 // ranks, (rank + 1) * 24 // ranks) for rank in range(ranks)]
    totals = [decoupled_rewards(values[part], weights, groups[part]) for part in parts]
    moments = sum(
        batch_moments("reinforce_pp", total, groups[part]) for total, part in zip(totals, parts, strict=True)
    )
    stats = BatchStats.from_moments(moments)
    found = [
        compute_advantages("reinforce_pp", "batch", total, groups[part], stats)
        for total, part in zip(totals, parts, strict=True)
    ]
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-9)
    assert np.abs(expected).max() > 1
