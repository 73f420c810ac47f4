"""What a reward has to report besides its values: tokens used, retries, truncated inputs.

A reward calls `count` while it scores; the sums are in the step's metrics as `rewards/NAME/counts/KEY`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_counter: ContextVar[Counter[str] | None] = ContextVar("posttrain_reward_counts", default=None)


def count(key: str, amount: float = 1) -> None:
    """Add to a count of the call that is being scored; outside of one this does nothing.

    Values that are known from the cache count nothing: nothing was spent on them.
    """
    counter = _counter.get()
    if counter is not None:
        counter[key] += amount  # type: ignore[assignment]  # a Counter may hold any number


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Collect what is counted inside, in this thread or task and the tasks started from it."""
    counter: Counter[str] = Counter()
    token = _counter.set(counter)
    try:
        yield counter
    finally:
        _counter.reset(token)
