"""Charts of self-predictions: how often problems are solved, by how often the model said it would."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from posttrain.report.run_folder import Run, Stage
from posttrain.report.series import rounded

LEVEL = "masa/level/"
SHARE = 0.1
"""Share of a stage's steps that a line of its calibration stands for."""

Bins = dict[int, tuple[float, float]]
"""By predicted level: number of problems and their mean true pass rate."""


def calibration_charts(run: Run) -> list[dict[str, Any]]:
    """A chart of the evaluations with metric `meta`, and one of each policy stage with self-predictions."""
    charts = []
    told = {e["stage"]: e["meta"] for e in run.summary.get("evaluations") or [] if e.get("meta")}
    if told:
        lines = {stage: _of_evaluation(found) for stage, found in told.items()}
        charts.append(_chart("Evaluations", lines, next(iter(told.values()))["levels"]))
    for stage in run.stages:
        lines = {
            f"first {SHARE:.0%}": _of_steps(stage, early=True),
            f"last {SHARE:.0%}": _of_steps(stage, early=False),
        }
        if all(lines.values()):
            charts.append(
                _chart(stage.name, lines, max(8, *(level for bins in lines.values() for level in bins)))
            )
    return charts


def _of_evaluation(found: Mapping[str, Any]) -> Bins:
    return {entry["level"]: (entry["problems"], entry["truth"]) for entry in found["bins"]}


def _of_steps(stage: Stage, *, early: bool) -> Bins:
    """Of the first or last steps of a stage, from its metrics."""
    span = max(1, math.ceil(SHARE * stage.steps))
    totals: dict[int, list[float]] = {}
    for name, series in stage.metrics.items():
        if not (name.startswith(LEVEL) and name.endswith("/problems")):
            continue
        level = int(name.split("/")[2])
        truths = stage.metrics[f"{LEVEL}{level}/truth"]
        for step, problems, truth in zip(series.steps, series.values, truths.values, strict=True):
            if (step <= span) if early else (step > stage.steps - span):
                total = totals.setdefault(level, [0.0, 0.0])
                total[0] += problems
                total[1] += problems * truth
    return {level: (count, solved / count) for level, (count, solved) in sorted(totals.items())}


def _chart(name: str, lines: Mapping[str, Bins], levels: int) -> dict[str, Any]:
    ideal = {
        "label": "calibrated",
        "x": list(range(levels + 1)),
        "raw": _values(place / levels for place in range(levels + 1)),
    }
    drawn = [
        {"label": label, "x": list(bins), "raw": _values(truth for _, truth in bins.values())}
        for label, bins in lines.items()
    ]
    parts = [
        f"{label}: " + ", ".join(f"{level} predicted, {truth:.0%} true" for level, (_, truth) in bins.items())
        for label, bins in lines.items()
    ]
    return {
        "title": f"Calibration: {name}",
        "about": f"True pass rate, by how many of {levels} attempts the model said it would get right.",
        "form": "percent",
        "wide": False,
        "lines": [{**line, "smooth": []} for line in (*drawn, ideal)],
        "unit": f"of {levels} predicted",
        "summary": "; ".join(parts),
    }


def _values(values: Iterable[float]) -> list[float | None]:
    return rounded(np.array(list(values), float))
