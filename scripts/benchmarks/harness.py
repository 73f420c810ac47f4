"""What every bench shares: taking turns, stopwatches, the record of a comparison, the machine it ran on."""

from __future__ import annotations

import gc
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "results" / "bench"
BENCHES = {
    "train-step": "train_step",
    "train-memory": "train_memory",
    "fork": "fork",
    "generate": "generate",
    "first-step": "first_step",
    "whole-step": "whole_step",
    "rewards": "rewards",
    "meta-gradient": "meta_gradient",
    "zip-rc": "zip_rc",
}
CUDA_BENCHES = ("train-step", "train-memory", "whole-step")
REPEATS = 5
MAX_LOAD = 1.5
"""Load average of the last minute above which nothing is measured."""

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How a bench is asked to run; `repeats` None is the bench's own number of pairs."""

    repeats: int | None = None
    device: str = "cpu"
    seed: int = 0

    def pairs(self, default: int = REPEATS) -> int:
        return self.repeats or default


@dataclass(frozen=True)
class Comparison:
    """Pairs of measurements: `ours[i]` and `theirs[i]` were taken one right after the other.

    `limit` is what the median of the paired ratios, ours ÷ theirs, must not exceed, and `at_least` what it
    must not fall below.
    """

    name: str
    theirs_is: str
    unit: str
    limit: float
    ours: Sequence[float]
    theirs: Sequence[float]
    shapes: dict[str, Any]
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    at_least: float = 0.0

    @property
    def ratios(self) -> list[float]:
        return [ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def holds(self) -> bool:
        return self.at_least <= self.ratio <= self.limit

    def record(self) -> dict[str, Any]:
        """What is written down of it."""
        return {
            "name": self.name,
            "theirs_is": self.theirs_is,
            "ratio": round(self.ratio, 4),
            "ratio_min": round(min(self.ratios), 4),
            "ratio_max": round(max(self.ratios), 4),
            "limit": self.limit,
            **({"at_least": self.at_least} if self.at_least else {}),
            "holds": self.holds,
            "unit": self.unit,
            "ours": round(statistics.median(self.ours), 4),
            "theirs": round(statistics.median(self.theirs), 4),
            "runs": {
                "ours": [round(value, 4) for value in self.ours],
                "theirs": [round(value, 4) for value in self.theirs],
            },
            "shapes": self.shapes,
            **({"note": self.note} if self.note else {}),
            **({"details": self.details} if self.details else {}),
        }


@dataclass(frozen=True)
class Sample(Generic[T]):
    """One run of one side: what it took, and what it computed."""

    value: float
    result: T


def alternate(
    ours: Callable[[], Sample[T]],
    theirs: Callable[[], Sample[T]],
    pairs: int,
    check: Callable[[T, T], None],
    warm_up: bool = True,
) -> tuple[list[float], list[float]]:
    """Run both sides in turns, ours first; the values of each.

    `check` gets what both sides computed, of every pair, and raises if they are not the same work. A warm-up
    pair is run and checked before, and not counted.
    """
    values: tuple[list[float], list[float]] = [], []
    for index in range(-1 if warm_up else 0, pairs):
        first, second = ours(), theirs()
        check(first.result, second.result)
        if index >= 0:
            values[0].append(first.value)
            values[1].append(second.value)
    return values


class Stopwatch:
    """CPU seconds of this process on a CPU, seconds of the device on a GPU; `seconds` after the block."""

    seconds: float

    def __init__(self, device: str = "cpu") -> None:
        self.cuda = device == "cuda"

    def __enter__(self) -> Stopwatch:
        gc.collect()
        self._start = self._now()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = self._now() - self._start

    def _now(self) -> float:
        if not self.cuda:
            return time.process_time()
        import torch

        torch.cuda.synchronize()
        return time.perf_counter()

    @property
    def unit(self) -> str:
        return "seconds" if self.cuda else "CPU seconds"


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call a module-level function in a process that is started for it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch computes on one thread inside the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def require(same: bool, what: str) -> None:
    """Stop a bench whose two sides did not do the same work."""
    if not same:
        raise AssertionError(f"the two sides did not compute the same: {what}")


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on, and how busy it was."""
    info = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads_used": int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": round(os.getloadavg()[0], 2),
    }
    if device == "cuda":
        import torch

        info["device"] = torch.cuda.get_device_name(0)
    return info


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def show(name: str, title: str, comparisons: Sequence[Comparison]) -> None:
    """Print the table of a bench."""
    print(f"\n{name}: {title.splitlines()[0]}")
    width = max(len(comparison.name) for comparison in comparisons)
    print(f"  {'':{width}}  {'ratio':>6}  {'lowest':>6}  {'highest':>7}  limit  {'ours':>9}  {'theirs':>9}")
    for comparison in comparisons:
        record = comparison.record()
        verdict = "" if comparison.holds else "  DOES NOT HOLD"
        print(
            f"  {comparison.name:{width}}  {record['ratio']:6.3f}  {record['ratio_min']:6.3f}  "
            f"{record['ratio_max']:7.3f}  {comparison.limit:5.2f}  {record['ours']:9.3f}  "
            f"{record['theirs']:9.3f}  {comparison.unit}{verdict}"
        )


def write(
    name: str,
    title: str,
    comparisons: Sequence[Comparison],
    settings: Settings,
    start: dict[str, Any],
    folder: Path | None = None,
) -> Path:
    """Write results/bench/NAME.json (NAME-cuda.json on a GPU), or NAME.json of another folder."""
    from posttrain.recipe.summary import versions
    from posttrain.training.record import write_json

    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{'' if settings.device == 'cpu' else '-' + settings.device}.json"
    result = {
        "bench": name,
        "measures": title.splitlines()[0],
        "holds": all(comparison.holds for comparison in comparisons),
        "comparisons": [comparison.record() for comparison in comparisons],
        "seed": settings.seed,
        "machine": start,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no", "--", "posttrain")),
        "versions": versions(),
    }
    write_json(path, result)
    return path


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.strip()
