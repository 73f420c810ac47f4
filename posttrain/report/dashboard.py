"""What a terminal shows of a running stage: its metrics so far, where time goes, the latest rollouts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from posttrain.redaction import redact
from posttrain.report.words import count, duration

HEALTH = (
    ("loss", "loss", "{:.4f}"),
    ("reward", "reward", "{:.3f}"),
    ("completions/mean_length", "length", "{:.1f}"),
    ("completions/truncated", "truncated", "{:.0%}"),
    ("groups/zero_variance", "zero-variance", "{:.0%}"),
    ("rewards/unscored", "unscored", "{:.1%}"),
    ("entropy", "entropy", "{:.3f}"),
    ("kl", "kl", "{:.4f}"),
    ("sampling/logprob_difference", "mismatch", "{:.1e}"),
    ("mean_token_accuracy", "token accuracy", "{:.3f}"),
    ("accuracy", "accuracy", "{:.1%}"),
    ("gap", "gap", "{:.3f}"),
)
PHASES = ("generate", "score", "update", "sync")
FIRST = ("reward", "completions/mean_length")
"""Metrics at the top of the table."""
TOKENS = {"generate": "tokens/sampled", "score": "tokens/sampled", "update": "tokens/trained"}
"""Which tokens a phase works on."""
BLOCKS = "▁▂▃▄▅▆▇█"
RECENT = 20
"""Lines of the log whose steps tell how long the rest will take."""
PROMPT_SHOWN, COMPLETION_SHOWN = 160, 400
"""Characters of a rollout: of the prompt its end, of the completion both ends."""


class Dashboard:
    """The state of one stage, and how it looks. Drawn by another thread than the one that tells it things."""

    def __init__(self, name: str, kind: str, clock: Callable[[], float] = time.monotonic):
        self.name = name
        self.kind = kind
        self.step = 0
        self.steps: int | None = None
        self.phase = ""
        self.history: dict[str, list[float]] = {}
        self.latest: Mapping[str, Any] = {}
        self.rollouts: Sequence[Mapping[str, Any]] = ()
        self._clock = clock
        self._times: list[tuple[int, float]] = []
        self._start = clock()

    def show(self, step: int, steps: int, metrics: Mapping[str, Any]) -> None:
        """A step is done, or with `phase` or `rollouts` in the metrics, something has happened in it."""
        self.steps = steps
        if "rollouts" in metrics:
            self.rollouts = metrics["rollouts"]
        elif "phase" in metrics:
            self.phase = str(metrics["phase"])
        else:
            self.step = step
            self.latest = metrics
            self._times = [*self._times[-RECENT:], (step, self._clock())]
            for key, _, _ in HEALTH:
                if key in metrics:
                    self.history.setdefault(key, []).append(float(metrics[key]))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The whole picture; what does not fit a low terminal is left out from the bottom."""
        parts = [
            part for part in (self._progress(), self._metrics(options.max_width), self._phases()) if part
        ]
        room = console.height - 14 - len(self.history)
        if self.rollouts and room > 4:
            parts.append(self._rollouts(options.max_width))
        yield Panel(
            Group(*parts), title=f"{self.name} ({self.kind})", title_align="left", border_style="blue"
        )

    def _progress(self) -> RenderableType:
        spent, times, left = self._clock() - self._start, self._times, ""
        if self.steps and len(times) > 1 and times[0][0] < self.step < self.steps:
            (first, begun), (last, ended) = times[0], times[-1]
            left = f", about {duration((ended - begun) / (last - first) * (self.steps - last))} left"
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        where = f"step {self.step} of {self.steps}" if self.steps and not self.phase else self.phase
        bar = ProgressBar(total=self.steps, completed=self.step, pulse=not self.steps or bool(self.phase))
        row.add_row(bar, Text(f"{where}  {duration(spent)}{left}".strip()))
        return row

    def _metrics(self, width: int) -> RenderableType | None:
        known = [entry for entry in HEALTH if entry[0] in self.history]
        if not known:
            return None
        known.sort(key=lambda entry: FIRST.index(entry[0]) if entry[0] in FIRST else len(FIRST))
        table = Table.grid(padding=(0, 2))
        for key, label, form in known:
            values = list(self.history[key])
            line = sparkline(values, max(10, min(60, width - 36)))
            table.add_row(
                Text(label, style="dim"), Text(form.format(values[-1]), style="bold"), Text(line, "cyan")
            )
        return table

    def _phases(self) -> RenderableType | None:
        """Seconds of the latest step by phase, and tokens per second and process in each."""
        metrics = self.latest
        seconds = {key[8:]: float(metrics[key]) for key in metrics if key.startswith("seconds/")}
        whole = sum(seconds.values())
        if not whole:
            return None
        table = Table.grid(padding=(0, 2))
        order = [phase for phase in PHASES if phase in seconds]
        for phase in order + [phase for phase in seconds if phase not in PHASES]:
            spent = seconds[phase]
            tokens = float(metrics.get(TOKENS.get(phase, ""), 0.0))
            rate = f"{count(tokens / spent)} tokens/s" if tokens and spent else ""
            bar = ProgressBar(total=whole, completed=spent, width=20, complete_style="green")
            table.add_row(Text(phase, style="dim"), f"{spent:.1f} s", f"{spent / whole:.0%}", bar, rate)
        sampled = float(metrics.get("tokens/sampled", 0.0))
        if sampled:
            table.add_row(
                Text("step", style="dim"), f"{whole:.1f} s", "", "", f"{count(sampled / whole)} tokens/s"
            )
        return table

    def _rollouts(self, width: int) -> RenderableType:
        parts: list[RenderableType] = []
        for rollout in self.rollouts:
            text = Text()
            reward = rollout["reward"]
            text.append(f"reward {reward:.3g}" if reward is not None else "unscored", "bold")
            text.append(f", {rollout['tokens']} tokens{', cut' if rollout['truncated'] else ''}\n", "dim")
            text.append(shown(rollout["prompt"], 0, PROMPT_SHOWN) + " ", "dim")
            text.append(shown(rollout["completion"], COMPLETION_SHOWN // 2, COMPLETION_SHOWN // 2))
            parts.append(text)
        return Group(Text(), *parts)


def shown(text: str, head: int, tail: int) -> str:
    """A text on one line: so many characters of its beginning and end, and none that steers a terminal."""
    line = " ".join(redact(text).split())
    if len(line) > head + tail:
        line = f"{line[:head]} … {line[len(line) - tail :]}".strip()
    return "".join(character if character.isprintable() else "·" for character in line)


def sparkline(values: Sequence[float], width: int) -> str:
    """A curve of at most `width` block characters, each the mean of its share of the values.

    What is not a finite number is a space, or left out of a mean.
    """
    size = min(width, len(values))
    means: list[float | None] = []
    for place in range(size):
        part = values[place * len(values) // size : (place + 1) * len(values) // size]
        finite = [value for value in part if abs(value) < float("inf")]
        means.append(sum(finite) / len(finite) if finite else None)
    known = [value for value in means if value is not None]
    if not known:
        return " " * size
    low, high = min(known), max(known)
    span = high - low
    return "".join(
        " " if value is None else BLOCKS[round((value - low) / span * 7) if span else 3] for value in means
    )
