"""The joint grid over final reward and remaining length, and the slice of the vocabulary it lives in.

Manvi et al., "Zero-overhead introspection for adaptive test-time compute" (arXiv 2512.01457): ids that are
never read or written get logits whose softmax is p(reward, remaining length | prefix). Shapes: R reward bins,
L length bins, T positions. Imports nothing but numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from posttrain.errors import DataError

Array = NDArray[np.float64]

CONFIG_KEY = "zip_rc"
"""Attribute of a model's configuration that holds the grid."""
VALUES = tuple(k / 6 for k in range(7))
"""Reward levels of a final head: estimated values in seven bins."""
OUTCOMES = (0.0, 1.0)
"""Reward levels of the first head: right or wrong."""


@dataclass(frozen=True)
class Grid:
    """Cell (b, l) is reward bin b and length bin l; its token id is `first_id + b * length_bins + l`.

    Attributes:
        first_id: first token id of the slice.
        reward_values: [R] what each reward bin stands for, ascending in [0, 1].
        length_edges: [L + 1] tokens, ascending from 0. Bin l is [edges[l], edges[l + 1]); the last one takes
            all above, too.

    Raises:
        DataError: the values do not make a grid.
    """

    first_id: int
    reward_values: tuple[float, ...]
    length_edges: tuple[int, ...]

    def __post_init__(self) -> None:
        values, edges = np.array(self.reward_values), np.array(self.length_edges)
        if self.first_id < 0:
            raise DataError(f"a ZIP-RC grid cannot begin at token id {self.first_id}")
        if len(values) < 2 or (np.diff(values) <= 0).any() or values[0] < 0 or values[-1] > 1:
            raise DataError(
                f"reward values of a ZIP-RC grid ascend within [0, 1], two at least: {self.reward_values}"
            )
        if len(edges) < 2 or edges[0] != 0 or (np.diff(edges) <= 0).any():
            raise DataError(f"length edges of a ZIP-RC grid ascend from 0: {self.length_edges}")

    @property
    def reward_bins(self) -> int:
        """R."""
        return len(self.reward_values)

    @property
    def length_bins(self) -> int:
        """L."""
        return len(self.length_edges) - 1

    @property
    def size(self) -> int:
        """Cells, which is token ids: R * L."""
        return self.reward_bins * self.length_bins

    @property
    def ids(self) -> tuple[int, ...]:
        """[R * L] token ids of the cells, one reward bin after the other."""
        return tuple(range(self.first_id, self.first_id + self.size))

    @property
    def reward_edges(self) -> tuple[float, ...]:
        """[R + 1] between the values, and the outermost values themselves. A value on an edge goes up."""
        values = self.rewards
        return (float(values[0]), *((values[1:] + values[:-1]) / 2).tolist(), float(values[-1]))

    @cached_property
    def rewards(self) -> Array:
        """[R] `reward_values` as an array."""
        return np.array(self.reward_values, dtype=np.float64)

    @cached_property
    def lengths(self) -> Array:
        """[L] what each length bin stands for: its midpoint."""
        edges = np.array(self.length_edges, dtype=np.float64)
        return (edges[1:] + edges[:-1]) / 2

    def reward_bin(self, reward: ArrayLike) -> NDArray[np.int64]:
        """Bins of rewards, which are clipped to the outermost values first."""
        return np.searchsorted(np.array(self.reward_edges[1:-1]), np.asarray(reward), side="right")

    def length_bin(self, remaining: ArrayLike) -> NDArray[np.int64]:
        """Bins of remaining lengths; whatever is beyond the last edge is in the last bin."""
        return np.searchsorted(np.array(self.length_edges[1:-1]), np.asarray(remaining), side="right")

    def cells(self, reward: ArrayLike, remaining: ArrayLike) -> NDArray[np.int64]:
        """Cells b * L + l of rewards and remaining lengths, broadcast against each other."""
        return self.reward_bin(reward) * self.length_bins + self.length_bin(remaining)

    def joint(self, logprobs: ArrayLike) -> Array:
        """Forecasts [..., R, L] from logits or log-probs [..., R * L] of the slice: their softmax.

        A constant added to all cells of a position changes nothing, so that raw logits, log-probs over the
        vocabulary and log-probs over the slice give the same.
        """
        values = np.asarray(logprobs, dtype=np.float64)
        weights = np.exp(values - values.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return weights.reshape(*values.shape[:-1], self.reward_bins, self.length_bins)

    def to_config(self) -> dict[str, Any]:
        """What a model's configuration keeps, JSON-compatible."""
        return {
            "first_id": self.first_id,
            "reward_values": list(self.reward_values),
            "length_edges": list(self.length_edges),
        }

    @classmethod
    def from_config(cls, config: Any) -> Grid:
        """Take back what `to_config` gave.

        Raises:
            DataError: it is something else.
        """
        try:
            values = tuple(float(value) for value in config["reward_values"])
            edges = tuple(int(edge) for edge in config["length_edges"])
            return cls(int(config["first_id"]), values, edges)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{CONFIG_KEY} in the model's config.json is no grid: {config!r}") from error


def grid_of(config: Any) -> Grid | None:
    """The grid in a model's configuration; None for a model without forecasts.

    Raises:
        DataError: there is one, but malformed.
    """
    stored = getattr(config, CONFIG_KEY, None)
    return None if stored is None else Grid.from_config(stored)


def reward_marginal(joint: Array) -> Array:
    """Distribution [..., R] over rewards of a joint [..., R, L]."""
    return joint.sum(axis=-1)


def length_marginal(joint: Array) -> Array:
    """Distribution [..., L] over remaining lengths of a joint [..., R, L]."""
    return joint.sum(axis=-2)


def expected_reward(grid: Grid, joint: Array) -> Array:
    """Mean reward [...] of joints [..., R, L]."""
    return reward_marginal(joint) @ grid.rewards


def expected_length(grid: Grid, joint: Array) -> Array:
    """Mean remaining length [...] of joints [..., R, L], in tokens."""
    return length_marginal(joint) @ grid.lengths


def labels(grid: Grid, reward: float, tokens: int) -> NDArray[np.int64]:
    """Cells [T] of every position of a finished rollout of T tokens.

    Position t is the one whose ordinary logits predict token t of the completion. Its remaining length counts
    the tokens after that one, T - 1 - t, which is 0 where the end of sequence is predicted (as in the
    official code; the paper's text counts one more). Every position has the rollout's reward.
    """
    return grid.cells(reward, np.arange(tokens - 1, -1, -1))


def value_label(expected_rewards: ArrayLike, last: int) -> float:
    """The value of a finished answer: the mean expected reward [T] over its `last` positions, within [0, 1].

    This, not the raw outcome, is what the final head forecasts: the answer is picked by it, and given the
    prefixes those of several samples are nearly independent.
    """
    values = np.asarray(expected_rewards, dtype=np.float64)
    return float(np.clip(values[-last:].mean(), 0.0, 1.0))


def quantile_edges(lengths: Sequence[int], bins: int) -> tuple[int, ...]:
    """Length edges that put about as many positions of rollouts of these lengths into each bin.

    Fewer bins where the rollouts are too short for that many different edges.

    Raises:
        DataError: there are no rollouts.
    """
    if not lengths or min(lengths) < 1:
        raise DataError("length edges at quantiles need rollouts of one token at least")
    remaining = np.concatenate([np.arange(length) for length in lengths])
    inner = np.quantile(remaining, np.arange(1, bins) / bins, method="higher")
    edges = sorted({0, *inner.astype(int).tolist(), max(lengths)})
    return tuple(edges)
