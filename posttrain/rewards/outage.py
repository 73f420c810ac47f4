"""Waiting for what rewards depend on: a run pauses rather than learn from what it could not score."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from posttrain.errors import RewardError

FIRST_WAIT = 1.0
"""Seconds before the first repetition; it doubles with each."""
LONGEST_WAIT = 60.0
CHECK_SECONDS = 0.25
"""How often it is looked whether the run is to stop."""


class Pause:
    """The waiting of one call of the scorer, for one or more rewards at a time.

    Args:
        limit: seconds that a reward is waited for.
        say: takes lines about who is away, and who is back.
        check: raises to end the pause.
    """

    def __init__(self, limit: float, say: Callable[[str], None], check: Callable[[], None]):
        self.seconds: dict[str, float] = {}
        """How long rewards that are back have been waited for, by name."""
        self._limit = limit
        self._say = say
        self._check = check
        self._since: dict[str, float] = {}
        self._wait = FIRST_WAIT

    def note(self, away: Mapping[str, str]) -> None:
        """All calls have been made (again); `away` says of each reward without an answer what it waits for.

        Raises:
            RewardError: one of them has been away for longer than the limit.
        """
        now = time.monotonic()
        for name in [name for name in self._since if name not in away]:
            self.seconds[name] = seconds = now - self._since.pop(name)
            self._say(f"Reward {name} answers again: going on after a pause of {seconds:.1f} s.")
        for name, why in away.items():
            if name not in self._since:
                self._since[name] = now
                self._say(f"Paused, as reward {name} is away: {why}. Waiting for at most {self._limit:g} s.")
            elif now - self._since[name] >= self._limit:
                raise RewardError(
                    f"reward {name!r} was away for {now - self._since[name]:.0f} s, and "
                    f"reward_options.max_outage is {self._limit:g} s: {why}"
                )

    def wait(self) -> None:
        """Wait before the next repetition: longer each time, and not beyond the limit."""
        until = min(time.monotonic() + self._wait, min(self._since.values()) + self._limit)
        self._wait = min(2 * self._wait, LONGEST_WAIT)
        while (left := until - time.monotonic()) > 0:
            self._check()
            time.sleep(min(left, CHECK_SECONDS))
        self._check()
