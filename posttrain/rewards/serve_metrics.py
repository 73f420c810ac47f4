"""What the server of a reward model counts, in Prometheus' text format."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

PREFIX = "posttrain_reward_"
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Upper ends of the histogram's classes, in samples."""


class Scored(Protocol):
    """What is counted of a score."""

    @property
    def tokens(self) -> int:
        """Tokens the model has seen."""

    @property
    def truncated(self) -> bool:
        """Whether the prompt was cut."""

    @property
    def error(self) -> str:
        """Why there is no value."""


class ServerMetrics:
    """Counts since the server was started. `waiting` samples have not been scored yet."""

    def __init__(self) -> None:
        self.waiting = 0
        self._requests: Counter[tuple[str, int]] = Counter()
        self._samples = self._tokens = self._truncated = self._failed = 0
        self._sizes: Counter[float] = Counter()
        self._batches = self._batched = self._batch_tokens = 0
        self._seconds = 0.0

    def answered(self, path: str, status: int) -> None:
        """A request was answered."""
        known = path if path in ("/score", "/info", "/health", "/metrics") else "other"
        self._requests[known, status] += 1

    def scored(self, scores: Sequence[Scored]) -> None:
        """The samples of a request were scored."""
        self._samples += len(scores)
        self._tokens += sum(score.tokens for score in scores)
        self._truncated += sum(score.truncated for score in scores)
        self._failed += sum(bool(score.error) for score in scores)

    @contextmanager
    def batch(self, tokens: int, samples: int) -> Iterator[None]:
        """The model scores a batch inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - start
            self._batches += 1
            self._batched += samples
            self._batch_tokens += tokens
            for size in BATCH_SIZES:
                self._sizes[size] += samples <= size

    def text(self) -> str:
        """The exposition."""
        lines: list[str] = []

        def add(name: str, kind: str, about: str, *values: tuple[str, float]) -> None:
            lines.append(f"# HELP {PREFIX}{name} {about}")
            lines.append(f"# TYPE {PREFIX}{name} {kind}")
            lines.extend(f"{PREFIX}{name}{suffix} {value:g}" for suffix, value in values)

        requests = [
            (f'{{path="{path}",status="{status}"}}', number)
            for (path, status), number in sorted(self._requests.items())
        ]
        add("requests_total", "counter", "Requests answered.", *requests)
        add("samples_total", "counter", "Samples asked for.", ("", self._samples))
        add("tokens_total", "counter", "Tokens of these samples.", ("", self._tokens))
        add("truncated_total", "counter", "Samples whose prompt was cut.", ("", self._truncated))
        add("failed_total", "counter", "Samples without a score.", ("", self._failed))
        add("queue_samples", "gauge", "Samples that wait.", ("", self.waiting))
        sizes = [(f'_bucket{{le="{size}"}}', self._sizes[size]) for size in BATCH_SIZES]
        rest = [('_bucket{le="+Inf"}', self._batches), ("_sum", self._batched), ("_count", self._batches)]
        add("batch_samples", "histogram", "Samples of the batches.", *sizes, *rest)
        add("batch_tokens_total", "counter", "Tokens of all batches.", ("", self._batch_tokens))
        add("batch_seconds_total", "counter", "Seconds that the model took.", ("", self._seconds))
        return "\n".join(lines) + "\n"
