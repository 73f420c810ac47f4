"""Curves for drawing: smoothed and thinned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from posttrain.report.panels import HEALTH, LEARNING, LOSS, OPTIMISER, SUPERVISED, Chart, method_groups
from posttrain.report.run_folder import Array, Series, Stage

MAX_POINTS = 500
"""Points of a curve in the report: more than a chart has pixels for."""
MIN_SMOOTHED = 8
"""A curve of fewer points is drawn as it is."""


ELSEWHERE = ("seconds/", "tokens/", "masa/level/")
"""Metrics that other parts of the report show."""


def stage_charts(stage: Stage) -> list[dict[str, Any]]:
    """The charts of one training stage, for drawing: groups of a title and non-empty charts.

    Metrics without a chart of their own, such as those of methods, get one each under "Other metrics".
    """
    groups = SUPERVISED if stage.kind == "sft" else _policy_groups(stage)
    named = {metric for _, charts in groups for chart in charts for metric, _ in chart.lines}
    rest = [metric for metric in stage.metrics if metric not in named and not metric.startswith(ELSEWHERE)]
    other = tuple(Chart(metric, "", ((metric, metric),), "fine") for metric in rest)
    drawn = [
        {"title": title, "charts": _drawable(stage, charts)}
        for title, charts in (*groups, ("Other metrics", other))
    ]
    return [group for group in drawn if group["charts"]]


def _policy_groups(stage: Stage) -> tuple[tuple[str, tuple[Chart, ...]], ...]:
    """The charts of a policy stage; each reward has a line of its own when there are several."""
    means = [name for name in stage.metrics if name.startswith("rewards/") and name.endswith("/mean")]
    lines = tuple((name, name.removeprefix("rewards/").removesuffix("/mean")) for name in means)
    each = Chart("Each reward", "Mean of each reward function, unweighted.", lines)
    learning = (LEARNING[0], each, *LEARNING[1:]) if len(means) > 1 else LEARNING
    return (
        ("Learning", learning),
        *method_groups(stage),
        ("Health", HEALTH),
        ("Optimisation", (*OPTIMISER, LOSS)),
    )


def _drawable(stage: Stage, charts: Iterable[Chart]) -> list[dict[str, Any]]:
    drawn = []
    for chart in charts:
        lines = [
            {"label": label, **curve(stage.metrics[metric])}
            for metric, label in chart.lines
            if np.isfinite(stage.values(metric)).any()
        ]
        if lines:
            drawn.append(
                {
                    "title": chart.title,
                    "about": chart.about,
                    "form": chart.form,
                    "wide": chart.wide,
                    "lines": lines,
                    "summary": _in_words(chart, stage),
                }
            )
    return drawn


def _in_words(chart: Chart, stage: Stage) -> str:
    """What a screen reader says instead of the picture."""
    parts = []
    for metric, label in chart.lines:
        values = stage.values(metric)
        if len(values):
            parts.append(
                f"{label} from {values[0]:.4g} to {values[-1]:.4g}, lowest {values.min():.4g}, "
                f"highest {values.max():.4g}"
            )
    return f"{chart.title} over {stage.steps} steps: {'; '.join(parts)}."


def curve(series: Series) -> dict[str, list[float | None]]:
    """Steps, raw values and smoothed values of a series, thinned to MAX_POINTS. None stands for NaN."""
    raw = np.where(np.isfinite(series.values), series.values, np.nan)
    smoothed = smooth(raw)
    thin = np.unique(np.linspace(0, len(raw) - 1, min(len(raw), MAX_POINTS)).round().astype(int))
    return {
        "x": series.steps[thin].astype(int).tolist(),
        "raw": rounded(raw[thin]),
        "smooth": rounded(smoothed[thin]) if len(raw) >= MIN_SMOOTHED else [],
    }


def smooth(values: Array) -> Array:
    """Gaussian-weighted running mean over about a fifteenth of the run, gaps left out.

    Centred: unlike an exponential average it does not show a change later than it happened.
    """
    sigma = max(1.0, len(values) / 30)
    reach = min(int(3 * sigma), len(values) - 1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    present = np.isfinite(values)

    def blur(x: Array) -> Array:
        return np.convolve(x, kernel)[reach : reach + len(x)]

    weight = blur(present.astype(float))
    result = np.full(len(values), np.nan)
    np.divide(blur(np.where(present, values, 0.0)), weight, out=result, where=weight > 1e-9)
    return result


def rounded(values: Array, digits: int = 5) -> list[float | None]:
    """Significant digits enough for a picture, None for what is not a number."""
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values]
