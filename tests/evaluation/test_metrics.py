import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.evaluation.metrics import (
    bootstrap_interval,
    estimate,
    majority_at_k,
    majority_at_k_values,
    mean_values,
    paired_difference,
    pass_at_k,
    pass_at_k_values,
    wilson_interval,
)

outcomes = st.lists(st.booleans(), min_size=1, max_size=8)


def subsets_with_a_hit(samples, k):
    drawn = list(itertools.combinations(samples, k))
    return sum(any(subset) for subset in drawn) / len(drawn)


def plurality_credit(subset, worth):
    counts = {answer: subset.count(answer) for answer in subset if answer is not None}
    winners = [answer for answer, count in counts.items() if count == max(counts.values())]
    return sum(worth[answer] for answer in winners) / len(winners) if winners else 0.0


@given(outcomes, st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(samples, data):
    k = data.draw(st.integers(1, len(samples)))
    assert pass_at_k(len(samples), sum(samples), k) == pytest.approx(
        subsets_with_a_hit(samples, k), abs=1e-12
    )


@given(outcomes)
def test_pass_at_1_is_the_mean_and_pass_at_k_never_falls_with_k(samples):
    n, c = len(samples), sum(samples)
    curve = [pass_at_k(n, c, k) for k in range(1, n + 1)]
    assert curve[0] == pytest.approx(c / n)
    assert curve == sorted(curve)
    assert curve[-1] == (1.0 if c else 0.0)


def test_pass_at_k_is_stable_where_the_binomials_overflow():
    exact = 1 - math.comb(9999, 5000) / math.comb(10000, 5000)  # integers first: Python does not overflow
    assert pass_at_k(10000, 1, 5000) == pytest.approx(exact, rel=1e-9)


@settings(max_examples=200)
@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=8), st.data())
def test_majority_is_the_mean_over_all_subsets(votes, data):
    k = data.draw(st.integers(1, len(votes)))
    right = data.draw(st.sets(st.sampled_from(["a", "b", "c"])))
    drawn = list(itertools.combinations(votes, k))
    expected = np.mean([plurality_credit(list(s), {v: v in right for v in "abc"}) for s in drawn])
    values = majority_at_k_values([votes], [[vote in right for vote in votes]], k)
    assert values[0] == pytest.approx(expected, abs=1e-12)


def test_majority_ties_share_the_credit_and_abstentions_do_not_vote():
    votes = [["7", "7", "8", "8", "9"], ["7", None, None], [None, None, None]]
    correct = [[True, True, False, False, False], [True, False, False], [False, False, False]]
    assert majority_at_k_values([votes[0]], [correct[0]], 5)[0] == 0.5
    assert majority_at_k_values(votes[1:], correct[1:], 3).tolist() == [1.0, 0.0]


def test_majority_answer_is_worth_its_share_of_correct_samples():
    votes, correct = [["7", "7", "7", "8"]], [[True, True, False, False]]
    assert majority_at_k_values(votes, correct, 4)[0] == pytest.approx(2 / 3)


def test_majority_of_many_samples_stays_finite():
    assert majority_at_k([1500, 500], [1.0, 0.0], 0, 33) == pytest.approx(1.0, abs=1e-2)


def test_unscored_samples_are_left_out_of_their_problem():
    correct = [[True, None, False], [None, None, None], [True, True, None]]
    np.testing.assert_allclose(pass_at_k_values(correct, 1), [0.5, np.nan, 1.0])
    np.testing.assert_allclose(pass_at_k_values(correct, 3), [np.nan] * 3)
    votes = [["1", "1", "2"]] * 3
    np.testing.assert_allclose(majority_at_k_values(votes, correct, 2), [0.5, np.nan, 1.0])
    result = estimate(pass_at_k_values(correct, 2))
    assert (result.value, result.n, result.left_out) == (1.0, 2, 1)


def test_mean_values_leaves_out_what_is_missing():
    np.testing.assert_allclose(mean_values([[1.0, 3.0], [None, 4.0], [None]]), [2.0, 4.0, np.nan])


@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_all_wrong_or_all_right_still_has_an_interval(outcome):
    result = estimate(np.full(20, outcome))
    assert result.value == outcome
    assert result.low <= outcome <= result.high
    assert result.high - result.low == pytest.approx(0.1611, abs=1e-4)  # z² / (n + z²)


def test_wilson_interval_is_the_published_one():
    # Newcombe 1998, table I: 81 of 263, method 3.
    assert wilson_interval(81, 263, 0.95) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_nothing_scored_gives_no_value_and_valid_json():
    result = estimate(np.array([np.nan, np.nan]))
    assert math.isnan(result.value)
    assert (result.n, result.left_out) == (0, 2)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["value"] is None


def test_one_problem_says_nothing_about_the_spread():
    result = estimate(np.array([0.3]))
    assert result.value == 0.3
    assert math.isnan(result.low)
    assert math.isnan(result.high)


def test_bootstrap_is_seeded_and_agrees_with_the_normal_interval_on_many_problems():
    values = np.random.default_rng(0).gamma(2.0, 10.0, size=1000)
    low, high = bootstrap_interval(values, 0.95, seed=1)
    assert (low, high) == bootstrap_interval(values, 0.95, seed=1)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_wider_confidence_gives_a_wider_interval():
    values = np.random.default_rng(0).beta(1, 1, size=200)
    narrow, wide = estimate(values, 0.8), estimate(values, 0.99)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_paired_difference_uses_the_pairing():
    rng = np.random.default_rng(0)
    before = rng.beta(0.5, 0.5, size=300)
    after = np.clip(before + rng.normal(0.05, 0.02, size=300), 0, 1)
    before[0], after[1] = np.nan, np.nan
    result = paired_difference(before, after)
    assert (result.n, result.left_out) == (298, 2)
    assert result.value == pytest.approx(float(np.nanmean(after - before)))
    assert 0 < result.low < result.value < result.high
    separate = estimate(after)
    assert result.high - result.low < (separate.high - separate.low) / 5
    mirrored = paired_difference(after, before)
    assert (mirrored.low, mirrored.high) == pytest.approx((-result.high, -result.low), abs=1e-3)


def test_intervals_cover_a_known_accuracy():
    """500 evaluations of 500 problems of known mean accuracy: 95 % intervals hold it in about 95 %."""
    rng = np.random.default_rng(7)
    runs, problems, samples = 500, 500, 4
    single, several, paired = 0, 0, 0
    for run in range(runs):
        p = rng.beta(0.6, 0.9, size=problems)  # mean 0.4
        once = estimate((rng.random(problems) < p).astype(float))
        single += once.low <= 0.4 <= once.high
        means = rng.binomial(samples, p) / samples
        many = estimate(means, seed=run)
        several += many.low <= 0.4 <= many.high
        if run % 2 == 0:
            better = rng.binomial(samples, p + 0.5 * (1 - p)) / samples  # mean 0.7
            change = paired_difference(means, better, seed=run)
            paired += change.low <= 0.3 <= change.high
    for covered in (single / runs, several / runs, 2 * paired / runs):
        assert 0.92 <= covered <= 0.98
