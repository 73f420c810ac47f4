"""Evaluation metrics with confidence intervals: pure functions of numpy arrays.

Every metric is first one value per problem, NaN for a problem that has to be left out, and then a mean over
problems. The intervals are over problems: they say what another draw of problems (and of samples of them)
would have given, not how the metric varies over training seeds.

    pass_at_k_values, majority_at_k_values, mean_values    samples of each problem -> one value per problem
    estimate                                               values -> Estimate
    paired_difference                                      values before, values after -> Estimate

An unscored sample (None) is never a wrong answer: it is left out of its problem's samples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
"""One value per problem; NaN where the problem is left out."""

RESAMPLES = 2000
"""Bootstrap resamples: the ends of a 95 % interval then vary by less than 2 % of its width with the seed."""


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` problems with its confidence interval; `left_out` problems had no value.

    With no problem the value is NaN; with fewer than two problems, where nothing is known about the
    spread, a value other than 0 or 1 has a NaN interval.
    """

    value: float
    low: float
    high: float
    confidence: float
    n: int
    left_out: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The fields for JSON, which has no NaN: None instead."""
        return {key: None if isinstance(x, float) and math.isnan(x) else x for key, x in asdict(self).items()}


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, c of them correct, hold a correct one.

    Equation 1 of Chen et al. 2021 (arXiv:2107.03374), 1 - C(n-c, k) / C(n, k), as a product that neither
    overflows nor cancels. Needs 0 <= c <= n and 1 <= k <= n.
    """
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def pass_at_k_values(correct: Sequence[Sequence[bool | None]], k: int) -> Values:
    """pass@k of each problem from its samples' outcomes; NaN with fewer than k scored samples."""
    values = np.full(len(correct), np.nan)
    for i, samples in enumerate(correct):
        scored = [bool(outcome) for outcome in samples if outcome is not None]
        if len(scored) >= k:
            values[i] = pass_at_k(len(scored), sum(scored), k)
    return values


def majority_at_k_values(
    votes: Sequence[Sequence[Hashable | None]], correct: Sequence[Sequence[bool | None]], k: int
) -> Values:
    """maj@k of each problem: expected accuracy of the most frequent answer among k of its samples.

    The expectation over all subsets of size k is exact (see `majority_at_k`). `votes` holds each sample's
    final answer in a canonical form; a sample without one (None) abstains. Answers that tie for the most
    votes share the credit; when all abstain, the vote is wrong. An answer is worth the share of its scored
    samples that are correct, which is 0 or 1 unless the score looks at more than the answer. NaN with
    fewer than k scored samples.
    """
    values = np.full(len(votes), np.nan)
    for i, (answers, outcomes) in enumerate(zip(votes, correct, strict=True)):
        scored = [(a, bool(c)) for a, c in zip(answers, outcomes, strict=True) if c is not None]
        if len(scored) < k:
            continue
        counts = Counter(answer for answer, _ in scored)
        hits = Counter(answer for answer, is_correct in scored if is_correct)
        abstained = counts.pop(None, 0)
        credits = [hits[answer] / count for answer, count in counts.items()]
        values[i] = majority_at_k(list(counts.values()), credits, abstained, k)
    return values


def majority_at_k(counts: Sequence[int], credits: Sequence[float], abstained: int, k: int) -> float:
    """Expected credit of the plurality answer among k samples drawn without replacement.

    `counts[a]` samples gave answer a, which is worth `credits[a]`; `abstained` more gave none. Exact: how
    often answers are drawn is independent binomial given their total (for any success probability; k / n
    keeps the numbers in range), so for every winning count m a recursion over answers collects the weight
    and the credit of all draws in which the largest count is m, by number of winners and samples used.
    """
    n = sum(counts) + abstained
    if k == n:
        top = max(counts, default=0)
        winners = [credit for count, credit in zip(counts, credits, strict=True) if count == top]
        return sum(winners) / len(winners) if winners else 0.0
    total = 0.0
    draws = [_binomial(count, k / n) for count in counts]
    silent = _binomial(abstained, k / n)[: k + 1]
    for m in range(1, k + 1):
        credit = _credit_at(draws, credits, m, k)
        shared = (credit[1:] / np.arange(1, len(credit))[:, None]).sum(0)
        total += float(shared[k - len(silent) + 1 :] @ silent[::-1])
    return total / float(_binomial(n, k / n)[k])


def _credit_at(draws: Sequence[Values], credits: Sequence[float], m: int, k: int) -> Values:
    """Weighted sum of the winners' credits, (winners, samples used), over draws whose largest count is m."""
    weight = np.zeros((k // m + 1, k + 1))
    credit = np.zeros_like(weight)
    weight[0, 0] = 1.0
    for draw, worth in zip(draws, credits, strict=True):
        new_weight, new_credit = np.zeros_like(weight), np.zeros_like(weight)
        for j in range(min(m, len(draw))):
            new_weight[:, j:] += draw[j] * weight[:, : k + 1 - j]
            new_credit[:, j:] += draw[j] * credit[:, : k + 1 - j]
        if len(draw) > m:
            new_weight[1:, m:] += draw[m] * weight[:-1, : k + 1 - m]
            new_credit[1:, m:] += draw[m] * (credit + worth * weight)[:-1, : k + 1 - m]
        weight, credit = new_weight, new_credit
    return credit


def _binomial(n: int, p: float) -> Values:
    """Probabilities of 0..n successes, for 0 < p < 1."""
    j = np.arange(n + 1)
    log_choose = math.lgamma(n + 1) - np.array([math.lgamma(i + 1) + math.lgamma(n - i + 1) for i in j])
    return np.exp(log_choose + j * math.log(p) + (n - j) * math.log1p(-p))


def mean_values(samples: Sequence[Sequence[float | None]]) -> Values:
    """Mean of each problem's samples that have a value; NaN where none has."""
    present = [[x for x in problem if x is not None] for problem in samples]
    return np.array([np.mean(problem) if problem else np.nan for problem in present], dtype=np.float64)


def estimate(values: Values, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """Mean over the problems that have a value, with its interval.

    Wilson's interval when every value is 0 or 1, else the bias-corrected and accelerated bootstrap over
    problems. Values that are all equal, and not 0 or 1, give an interval of no width.
    """
    present = values[~np.isnan(values)]
    n, left_out = len(present), int(np.isnan(values).sum())
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, confidence, 0, left_out)
    if np.isin(present, (0.0, 1.0)).all():
        low, high = wilson_interval(int(present.sum()), n, confidence)
    else:
        low, high = bootstrap_interval(present, confidence, seed)
    return Estimate(float(present.mean()), low, high, confidence, n, left_out)


def paired_difference(before: Values, after: Values, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """Mean of `after - before` over the same problems in the same order, by paired bootstrap.

    A problem that lacks either value is left out. Pairing takes the problems' difficulty out of the
    comparison, so the interval is narrower than the two separate ones suggest.
    """
    difference = after - before
    present = difference[~np.isnan(difference)]
    n, left_out = len(present), len(difference) - len(present)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, confidence, 0, left_out)
    low, high = bootstrap_interval(present, confidence, seed)
    return Estimate(float(present.mean()), low, high, confidence, n, left_out)


def wilson_interval(successes: int, n: int, confidence: float) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927): not empty at 0 and 1, never outside them."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p, z2 = successes / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def bootstrap_interval(values: Values, confidence: float, seed: int) -> tuple[float, float]:
    """BCa bootstrap interval of the mean (Efron 1987, equations 3.9 and 6.6); NaNs for a single value."""
    if len(values) < 2:
        return math.nan, math.nan
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) == 1:
        return float(distinct[0]), float(distinct[0])
    means = np.sort(_resampled_means(distinct, counts, np.random.default_rng(seed)))
    normal = NormalDist()
    mean = values.mean()
    below = ((means < mean).mean() + (means <= mean).mean()) / 2
    bias = normal.inv_cdf(min(max(below, 1 / RESAMPLES), 1 - 1 / RESAMPLES))
    deviation = values - mean
    acceleration = (deviation**3).sum() / (6 * (deviation**2).sum() ** 1.5)
    ends = []
    for tail in ((1 - confidence) / 2, (1 + confidence) / 2):
        z = bias + normal.inv_cdf(tail)
        ends.append(float(np.quantile(means, normal.cdf(bias + z / (1 - acceleration * z)))))
    return ends[0], ends[1]


def _resampled_means(distinct: Values, counts: NDArray[np.int64], rng: np.random.Generator) -> Values:
    """Means of RESAMPLES resamples, drawn as counts of the distinct values, in blocks that bound memory."""
    n = int(counts.sum())
    block = max(1, 2_000_000 // len(distinct))
    sizes = [min(block, RESAMPLES - start) for start in range(0, RESAMPLES, block)]
    return np.concatenate([rng.multinomial(n, counts / n, size=size) @ distinct for size in sizes]) / n
