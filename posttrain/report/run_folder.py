"""Reading a run folder: summary, recipe, metrics by stage, and where each stage's rollouts are.

A run that was stopped, or is still going, lacks some of its files; they read as empty. A file that is
there and cannot be read is an error that names it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from posttrain.errors import PosttrainError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """A metric over steps. NaN where it was not a number."""

    steps: Array
    values: Array


@dataclass
class Stage:
    """What is known of one stage: seconds by phase, metrics by name, files of every rank by step.

    `supervised` are the files of texts that a policy stage trains on beside its rollouts.
    """

    name: str
    kind: str
    seconds: float | None = None
    phases: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, Series] = field(default_factory=dict)
    rollouts: dict[int, list[Path]] = field(default_factory=dict)
    supervised: dict[int, list[Path]] = field(default_factory=dict)
    samples: Path | None = None

    @property
    def steps(self) -> int:
        """The last step of the stage that was logged; 0 if it logs none."""
        return int(max((series.steps[-1] for series in self.metrics.values()), default=0))

    def values(self, metric: str) -> Array:
        """The finite values of a metric, in step order; empty when it was not logged."""
        series = self.metrics.get(metric)
        return np.array([]) if series is None else series.values[np.isfinite(series.values)]


@dataclass
class Run:
    """A run folder's content."""

    path: Path
    summary: dict[str, Any]
    recipe: dict[str, Any]
    recipe_text: str
    stages: list[Stage]
    started: float | None
    ended: float | None

    @property
    def name(self) -> str:
        """The run's name, or its folder's where no file tells it."""
        return str(self.summary.get("name") or self.recipe.get("name") or self.path.resolve().name)

    @property
    def finished(self) -> bool:
        """Whether the run wrote its summary, which it does last."""
        return bool(self.summary)

    def stage(self, name: str) -> Stage | None:
        """The stage of that name."""
        return next((stage for stage in self.stages if stage.name == name), None)


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        PosttrainError: `path` is no run folder, or a file in it is damaged.
    """
    if not any((path / name).is_file() for name in ("summary.json", "recipe.yaml", "metrics.jsonl")):
        raise PosttrainError(
            f"{path} is not a run folder: it has no summary.json, recipe.yaml or metrics.jsonl"
        )
    summary = _read_summary(path / "summary.json")
    recipe_text = _read_text(path / "recipe.yaml")
    lines = list(_read_lines(path / "metrics.jsonl"))
    times = [line["time"] for line in lines if isinstance(line.get("time"), int | float)]
    return Run(
        path=path,
        summary=summary,
        recipe=_parse_recipe(path / "recipe.yaml", recipe_text),
        recipe_text=recipe_text,
        stages=_stages(path, summary, lines),
        started=min(times, default=None),
        ended=max(times, default=None),
    )


def number(value: Any) -> float:
    """A number of a JSON file as float. None and the strings written for NaN and infinity become NaN."""
    return float(value) if isinstance(value, int | float) else math.nan


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads(_read_text(path) or "{}")
    except json.JSONDecodeError as error:
        raise PosttrainError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(summary, dict):
        raise PosttrainError(f"{path} is not a JSON object")
    return summary


def _parse_recipe(path: Path, text: str) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PosttrainError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    return recipe if isinstance(recipe, dict) else {}


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file. A last line that a kill cut short is left out."""
    lines = _read_text(path).split("\n")
    for i, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if i == len(lines):
                return
            raise PosttrainError(f"{path}, line {i} is not valid JSON: {error}") from error
        if not isinstance(record, dict) or "stage" not in record or "step" not in record:
            raise PosttrainError(f"{path}, line {i} is not a metrics record with stage and step")
        yield record


def _stages(path: Path, summary: Mapping[str, Any], lines: list[dict[str, Any]]) -> list[Stage]:
    """All stages any file tells of: in the summary's order, else by name, which begins with their number."""
    stages: dict[str, Stage] = {}
    for entry in summary.get("stages") or []:
        phases = {name: number(seconds) for name, seconds in (entry.get("phases") or {}).items()}
        stages[entry["stage"]] = Stage(entry["stage"], entry["kind"], entry.get("seconds"), phases)
    known = set(stages)
    for line in lines:
        stages.setdefault(line["stage"], Stage(line["stage"], str(line.get("kind", "policy"))))
    folders = sorted(p for p in (path / "rollouts").glob("*") if p.is_dir())
    for folder in folders:
        kind = "evaluate" if (folder / "samples.parquet").is_file() else "policy"
        stage = stages.setdefault(folder.name, Stage(folder.name, kind))
        stage.samples = folder / "samples.parquet" if (folder / "samples.parquet").is_file() else None
        stage.rollouts = _files_by_step(folder, "step")
        stage.supervised = _files_by_step(folder, "supervised")
    for stage in stages.values():
        stage.metrics = _series([line for line in lines if line["stage"] == stage.name])
    late = sorted(
        (stage for name, stage in stages.items() if name not in known), key=lambda stage: stage.name
    )
    return [stages[name] for name in stages if name in known] + late


def _files_by_step(folder: Path, kind: str) -> dict[int, list[Path]]:
    files: dict[int, list[Path]] = {}
    for path in sorted(folder.glob(f"{kind}-*.parquet")):
        if match := re.fullmatch(rf"{kind}-(\d+)(-\d+)?", path.stem):
            files.setdefault(int(match[1]), []).append(path)
    return dict(sorted(files.items()))


def _series(lines: list[dict[str, Any]]) -> dict[str, Series]:
    """Metrics by name. A step logged twice, as after a resume, counts as logged last."""
    by_step = {int(line["step"]): line for line in lines}
    names = dict.fromkeys(
        key for line in lines for key in line if key not in ("stage", "kind", "step", "time")
    )
    series = {}
    for name in names:
        points = [(step, line[name]) for step, line in sorted(by_step.items()) if line.get(name) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            series[name] = Series(np.array(steps, float), np.array([number(value) for value in values]))
    return series
