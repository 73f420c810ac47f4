"""Errors that a user can mend. The command line prints their text alone and exits with their code."""

from __future__ import annotations

import signal
from typing import ClassVar


class PosttrainError(Exception):
    """Something the user can put right; the message is one clear sentence that names the place."""

    exit_code: ClassVar[int] = 1


class RecipeError(PosttrainError):
    """A recipe, or an argument on the command line, is wrong. Nothing has been started or written."""

    exit_code: ClassVar[int] = 2


class DataError(PosttrainError):
    """A dataset cannot be read or a row of it cannot be used; the message names the file and the row."""


class RolloutError(PosttrainError):
    """A request that an engine cannot answer (empty or over-long prompt), or an engine that failed."""


class RewardError(PosttrainError):
    """A reward cannot be found or loaded, or failed where the recipe says `on_error: fail`."""


class RewardUnavailable(RewardError):
    """What a reward depends on, such as a server, is away. Raised by a reward while it scores, it pauses the
    run instead of failing the sample: the call is repeated until it is answered.
    """


class TrainingError(PosttrainError):
    """Training cannot go on: nothing to train, stale engine weights, non-finite loss."""


class GateFailed(PosttrainError):
    """A stage did not pass its gate (`advance_if`), so the later stages are not run."""

    exit_code: ClassVar[int] = 3


class Stopped(KeyboardInterrupt):
    """A signal ended the run in good order. Like Ctrl-C it is no `Exception`: nothing may swallow it."""

    def __init__(self, number: int, text: str = ""):
        super().__init__(text)
        self.number = number

    @property
    def signal(self) -> str:
        """`SIGTERM`, `SIGINT`, …"""
        return signal.Signals(self.number).name

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process that a signal ended: 130, 138, 143."""
        return 128 + self.number
