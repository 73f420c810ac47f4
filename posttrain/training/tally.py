"""Sums and counts of a step's metrics, mergeable over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class Tally:
    """Running means, totals and maxima by name."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}
        self.totals: dict[str, float] = {}
        self.maxima: dict[str, float] = {}

    def mean(self, name: str, value: float, weight: float = 1.0) -> None:
        """Add `weight` values with the mean `value`."""
        total, count = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (total + value * weight, count + weight)

    def total(self, name: str, value: float) -> None:
        """Add to a total."""
        self.totals[name] = self.totals.get(name, 0.0) + value

    def maximum(self, name: str, value: float) -> None:
        """Keep the larger value."""
        self.maxima[name] = max(self.maxima.get(name, value), value)

    @classmethod
    def merged(cls, tallies: Iterable[Tally]) -> Tally:
        """The tally of all ranks together."""
        merged = cls()
        for tally in tallies:
            for name, (total, count) in tally.sums.items():
                merged.mean(name, total / count if count else 0.0, count)
            for name, value in tally.totals.items():
                merged.total(name, value)
            for name, value in tally.maxima.items():
                merged.maximum(name, value)
        return merged

    def values(self) -> dict[str, float]:
        """One number per name; a mean of nothing is left out."""
        means = {name: total / count for name, (total, count) in self.sums.items() if count}
        return means | self.totals | self.maxima

    def state(self) -> dict[str, Any]:
        """Everything it holds, as JSON-compatible values."""
        return {"sums": self.sums, "totals": self.totals, "maxima": self.maxima}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        self.sums = {name: (total, count) for name, (total, count) in state["sums"].items()}
        self.totals = dict(state["totals"])
        self.maxima = dict(state["maxima"])

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Tally:
        """The tally that `state` was taken of."""
        tally = cls()
        tally.load(state)
        return tally
