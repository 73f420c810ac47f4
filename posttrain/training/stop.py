"""Signals that ask a run to stop: SIGTERM, SIGINT, and SIGUSR1, which clusters send ahead of time."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from posttrain.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Turns the first signal into an orderly end; a second one has its default effect, at once.

    While training steps run (`deferring`) the signal is only noted in `received`, and whoever takes the steps
    ends after the current one. Anywhere else it raises `Stopped`. Outside the main thread, where Python
    allows no handlers, signals keep their effect.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Inside, a signal waits for the end of a training step."""
        self.check()
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def check(self) -> None:
        """Raises Stopped when a signal has been noted."""
        if self.received is not None:
            raise Stopped(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        if not self._deferred:
            raise Stopped(number)
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"Stopping after this step, with a checkpoint; a second signal stops at once.\n")
