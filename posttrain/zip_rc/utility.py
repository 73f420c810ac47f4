"""What it is worth to go on with samples: order statistics of forecasts, the sampling utility, the search.

Manvi et al., "Zero-Overhead Introspection for Adaptive Test-Time Compute" (arXiv:2512.01457). A forecast is
the joint distribution over the final reward and the remaining length of one unfinished sample; the samples of
a prompt are taken as independent given their forecasts. Everything here is a pure function of numpy arrays.

Shapes: n unfinished samples, R reward bins, L length bins, S sets of samples, P = L plans. Plan 0 keeps a set
to its end; plan B > 0 keeps it until length bin B and gives up what is longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from posttrain.zip_rc.grid import Grid

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

TIE = 1e-12
"""Utilities this close are equal."""
_TINY = 1e-300  # stands for 0 in a logarithm: its product with any probability is 0


@dataclass(frozen=True)
class Prices:
    """What one average sample costs, in units of reward: its tokens, and the time they take one after
    another.
    """

    compute: float
    latency: float

    @classmethod
    def of(cls, alpha: float, beta: float) -> Prices:
        """`beta` is the price of cost, `alpha` the share of compute in it; the rest is latency."""
        return cls(beta * alpha, beta * (1.0 - alpha))


@dataclass(frozen=True)
class Choice:
    """Which of the unfinished samples to go on with (n,), until which length bin, and the utility of that."""

    keep: Mask
    bound: int | None
    utility: float


def max_pmf(pmfs: Floats) -> Floats:
    """Distribution of the largest of independent variables over one ascending support: (n, B) -> (B,)."""
    return np.diff(pmfs.cumsum(axis=-1).prod(axis=0), prepend=0.0)


def expected_max(values: Floats, pmfs: Floats) -> float:
    """Mean of the largest of n >= 1 independent variables with distributions (n, B) over `values` (B,).

    P(max <= x) is the product of the single P(X_i <= x). At least the largest single mean, at most the sum
    for values that are not negative.
    """
    return float(max_pmf(pmfs) @ values)


def planned(joints: Floats) -> tuple[Floats, Floats]:
    """Reward (P, n, R) and length (P, n, L) distributions of samples (n, R, L) under every plan.

    What is at least as long as the plan's bin is given up: it earns the lowest reward and has that bin's
    length.
    """
    count, values, plans = joints.shape
    rewards, lengths = np.empty((plans, count, values)), np.empty((plans, count, plans))
    rewards[0], lengths[0] = joints.sum(axis=2), joints.sum(axis=1)
    given_up = lengths[0, :, ::-1].cumsum(axis=1)[:, ::-1].T  # (P, n): mass at and above each bin
    rewards[1:] = np.moveaxis(joints.cumsum(axis=2)[:, :, :-1], 2, 0)
    rewards[1:, :, 0] += given_up[1:]
    bins = np.arange(plans)
    lengths[1:] = lengths[0] * (bins < bins[1:, None])[:, None, :]
    lengths[bins[1:], :, bins[1:]] = given_up[1:]
    return rewards, lengths


def _plan_costs(grid: Grid) -> Floats:
    """What length bins cost under each plan, (P, L): their midpoints, the plan's own bin its lower edge."""
    costs = np.tile(grid.lengths, (grid.length_bins, 1))
    bins = np.arange(1, grid.length_bins)
    costs[bins, bins] = np.array(grid.length_edges)[bins]
    return costs


def utilities(
    joints: Floats,
    sets: Mask,
    grid: Grid,
    prices: Prices,
    reference: float,
    finished: float = 0.0,
) -> Floats:
    """Sampling utility of every set under every plan: (P, S).

        U(S, B) = E[max V] - prices.compute · Σ E[L] / reference - prices.latency · E[max L] / reference

    over the samples of S given up at B. Lengths are remaining ones: what was spent is spent. A sample that is
    given up at bin B costs the lower edge of B, which makes its cost the expectation of min(L, edge).

    Args:
        joints: forecasts of the unfinished samples (n, R, L).
        sets: the sets (S, n); an empty one is worth what is finished.
        grid: rewards and lengths that the bins stand for.
        prices: of one average sample.
        reference: tokens of one average sample, above 0.
        finished: expected reward of the best finished sample; it competes for the maximum and costs nothing.
    """
    return _Plans(joints, grid).utilities(sets, prices, reference, finished)


class _Plans:
    """What `utilities` needs of samples (n, R, L) whatever the sets are."""

    def __init__(self, joints: Floats, grid: Grid) -> None:
        rewards, lengths = planned(joints)
        self._rewards = grid.rewards
        self._costs = _plan_costs(grid)
        self._log_rewards = _log_cdf(rewards)
        self._log_lengths = _log_cdf(lengths)
        self._tokens = (lengths * self._costs[:, None, :]).sum(axis=2)

    def utilities(self, sets: Mask, prices: Prices, reference: float, finished: float) -> Floats:
        """See the function of this name."""
        chosen = sets.astype(np.float64)
        best = _expected_max_of(np.maximum(self._rewards, finished), chosen @ self._log_rewards)
        longest = _expected_max_of(self._costs[:, None, :], chosen @ self._log_lengths)
        total = self._tokens @ chosen.T
        value = best - (prices.compute * total + prices.latency * longest) / reference
        return np.where(sets.any(axis=1), value, finished)


def _log_cdf(pmfs: Floats) -> Floats:
    return np.log(np.maximum(pmfs.cumsum(axis=-1), _TINY))


def _expected_max_of(values: Floats, log_cdf: Floats) -> Floats:
    """Expectation (...) over ascending `values` (..., B), of the logarithm of a distribution function (...,
    B).
    """
    below = np.exp(log_cdf)
    # Summed by parts: Σ x_b (F_b - F_(b-1)) = x_B F_B - Σ F_b (x_(b+1) - x_b).
    return values[..., -1] * below[..., -1] - (below[..., :-1] * np.diff(values)).sum(axis=-1)


def candidate_sets(joints: Floats, grid: Grid) -> Mask:
    """Sets worth a look, (S, n): the k shortest together with the j best, for all k and j.

    By ascending expected length and by descending expected reward; samples that are equal keep their order.
    The first set is the empty one.
    """
    count = len(joints)
    by_length = _ranks(joints.sum(axis=-2) @ grid.lengths)
    by_reward = _ranks(-(joints.sum(axis=-1) @ grid.rewards))
    sizes = np.arange(count + 1)
    sets = (by_length < sizes[:, None])[:, None, :] | (by_reward < sizes[:, None])[None, :, :]
    sets = sets.reshape(-1, count)
    _, first = np.unique(sets @ (1 << np.arange(count)), return_index=True)
    return sets[np.sort(first)]


def _ranks(values: Floats) -> NDArray[np.int64]:
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ranks


def search(
    joints: Floats,
    grid: Grid,
    prices: Prices,
    reference: float,
    finished: Sequence[float] = (),
) -> Choice:
    """The set of unfinished samples (n, R, L), n >= 1, and the plan with the highest utility.

    Over `candidate_sets` and all plans. Of equal utilities the larger set wins, then the one found first;
    samples that were left out and would not lower the utility are taken in. While nothing is finished the
    empty set does not count, so that a prompt always gets an answer.

    Args:
        joints: forecasts of the unfinished samples.
        grid: rewards and lengths that the bins stand for.
        prices: of one average sample.
        reference: tokens of one average sample, above 0.
        finished: expected rewards of the finished samples.
    """
    best = max(finished, default=0.0)
    sets = candidate_sets(joints, grid)
    if not finished:
        sets = sets[1:]
    forecasts = _Plans(joints, grid)
    found = forecasts.utilities(sets, prices, reference, best)
    highest = found.max()
    plans, places = np.nonzero(found >= highest - TIE)
    at = int(np.argmax(sets[places].sum(axis=1)))  # the first of the largest
    plan, keep = int(plans[at]), sets[places[at]]
    utility = float(found[plan, places[at]])
    while not keep.all():
        wider = keep | np.eye(len(keep), dtype=bool)[~keep]
        values = forecasts.utilities(wider, prices, reference, best)[plan]
        if values.max() < utility - TIE:
            break
        keep, utility = wider[values.argmax()], float(values.max())
    return Choice(keep, plan or None, utility)
