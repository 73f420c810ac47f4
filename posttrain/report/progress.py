"""What a running recipe shows: a dashboard where there is a terminal, else one line a step."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live

from posttrain.errors import Stopped
from posttrain.redaction import redact
from posttrain.report.dashboard import HEALTH, PHASES, Dashboard


def health_line(metrics: Mapping[str, Any]) -> str:
    """The metrics of a step that say whether it is healthy, on one line."""
    parts = [f"{label} {form.format(float(metrics[key]))}" for key, label, form in HEALTH if key in metrics]
    seconds = [float(metrics[f"seconds/{phase}"]) for phase in PHASES if f"seconds/{phase}" in metrics]
    if seconds:
        parts.append(f"{sum(seconds):.1f} s")
    return "  ".join(parts)


class Progress:
    """Shows stages as they run and keeps the lines in `logs/run.log`; only the first rank shows anything.

    A terminal has a dashboard of the stage in place of the lines of its steps.
    """

    def __init__(self, log_dir: Path, *, enabled: bool = True):
        self.enabled = enabled
        self.log_dir = log_dir
        self.console = Console(highlight=False, soft_wrap=True)
        self._file: IO[str] | None = None
        self._live: Live | None = None
        self._dashboard: Dashboard | None = None
        self._last = ""

    def __enter__(self) -> Progress:
        if self.enabled:
            self.log_dir.mkdir(parents=True, exist_ok=True)
            self._file = (self.log_dir / "run.log").open("a", encoding="utf-8")
            _quiet_libraries()
            if self.console.is_terminal and not self.console.is_dumb_terminal:
                # Once a second: the processor is needed elsewhere.
                self._live = Live(
                    console=self.console, get_renderable=self._draw, refresh_per_second=1, transient=True
                )
                self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if self._file is not None:
            if isinstance(error, Stopped):
                self._file.write(f"   stopped by {error.signal}\n")
            self._file.close()

    def say(self, text: str) -> None:
        """One line on the terminal and in the log, without secrets."""
        self._keep(text)
        self._print(text)

    def stage(self, name: str, kind: str) -> Callable[[int, int, dict[str, Any]], None]:
        """Announce a stage. Returns what shows its steps."""
        self.say(f"── {name} ({kind})")
        self._dashboard = Dashboard(name, kind)
        self._last = ""
        return self._show

    def _show(self, step: int, steps: int, metrics: dict[str, Any]) -> None:
        if self._dashboard is not None:
            self._dashboard.show(step, steps, metrics)
        if self._live is not None:
            self._live.refresh()
        if "rollouts" in metrics:
            return
        if "phase" in metrics:
            self.say(f"   {metrics['phase']} …")
            return
        line = f"   step {step}/{steps}  {health_line(metrics)}"
        self._keep(line)
        if self._live is None:
            self._print(line)
        else:
            self._last = line

    def _draw(self) -> RenderableType:
        return self._dashboard or Group()

    def _keep(self, text: str) -> None:
        if self._file is not None:
            self._file.write(redact(text) + "\n")
            self._file.flush()

    def _print(self, text: str) -> None:
        if self._file is not None:
            self.console.print(redact(text), markup=False)
            sys.stdout.flush()

    def skipped(self, name: str) -> None:
        """The stage was finished by an earlier attempt at the run."""
        self.say(f"── {name} was finished before")

    def finished(self, name: str, summary: Mapping[str, Any], seconds: float) -> None:
        """The stage is done; show its results if it has any."""
        self._dashboard = None
        if self._last:  # the dashboard is gone: leave its last numbers
            self._print(self._last)
        if "evaluation" in summary:
            for metric, value in summary["evaluation"]["metrics"].items():
                self.say(f"   {metric_line(metric, value)}")
        self.say(f"   {name} took {seconds:.0f} s")


def metric_line(metric: str, value: Mapping[str, Any]) -> str:
    """A metric with its interval: shares in per cent, lengths in tokens."""
    scale, unit = (1.0, " tokens") if metric == "mean_length" else (100.0, " %")
    numbers = [None if value[key] is None else scale * float(value[key]) for key in ("value", "low", "high")]
    found, low, high = numbers
    if found is None:
        return f"{metric:<12}     –  no problem has a value"
    interval = f"[{low:.1f}, {high:.1f}]" if low is not None and high is not None else "unknown"
    return f"{metric:<12} {found:5.1f}{unit}  {value['confidence']:.0%} interval {interval}, n={value['n']}"


def _quiet_libraries() -> None:
    """Progress bars and chatter of other libraries would tear the display; warnings stay."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("trl").setLevel(logging.ERROR)
    logging.getLogger("deepspeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
