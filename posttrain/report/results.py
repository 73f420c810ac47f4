"""What came out: the evaluations as columns, their metrics as rows, and the change from before to after."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.evaluation.metrics import Estimate
from posttrain.evaluation.samples import is_of_samples
from posttrain.evaluation.table import Comparison, compare
from posttrain.report.rollouts import evaluation_problems
from posttrain.report.run_folder import Run, number
from posttrain.report.words import amount, metric_name, percent, points


@dataclass(frozen=True)
class Cell:
    """One metric of one evaluation. `left`, `width` and `dot` place its interval on the row's bar, in %."""

    value: str
    interval: str
    left: float
    width: float
    dot: float


@dataclass(frozen=True)
class Row:
    """A metric over the evaluations; `change` is "" where there is nothing to compare."""

    metric: str
    cells: list[Cell | None]
    change: str
    change_interval: str
    verdict: str


@dataclass(frozen=True)
class Results:
    """The table of evaluations, and the columns that are before and after."""

    stages: list[str]
    before: int
    after: int
    rows: list[Row]
    problems: str
    moved: str
    paired: bool
    confidence: str
    headline: Headline | None


@dataclass(frozen=True)
class Headline:
    """The one number the run is about. `before` is None when only one evaluation was made."""

    metric: str
    before: Cell | None
    after: Cell
    change: str
    verdict: str


def to_estimate(entry: Mapping[str, Any] | None) -> Estimate | None:
    """An estimate as the summary holds it."""
    if not entry or math.isnan(number(entry.get("value"))):
        return None
    value, low, high, confidence = (number(entry.get(key)) for key in ("value", "low", "high", "confidence"))
    return Estimate(value, low, high, confidence, int(entry.get("n") or 0))


def results(run: Run) -> Results | None:
    """The run's evaluations side by side; None where there are none."""
    evaluations = run.summary.get("evaluations") or []
    if not evaluations:
        return None
    columns = [{k: to_estimate(v) for k, v in (e.get("metrics") or {}).items()} for e in evaluations]
    metrics = list(dict.fromkeys(name for column in columns for name in column))
    before, after = _before_and_after(run, columns)
    compared = _compared(run, evaluations[before]["stage"], evaluations[after]["stage"], metrics, columns)
    rows = [
        metric_row(name, [column.get(name) for column in columns], before, after, compared)
        for name in metrics
    ]
    main = (run.summary.get("accuracy_after") or {}).get("metric") or next(
        (m for m in metrics if m != "mean_length"), None
    )
    last = evaluations[after]
    each = "sample each" if last["samples"] == 1 else "samples each"
    confidences = {e.confidence for column in columns for e in column.values() if e is not None}
    confidence = " or ".join(percent(c, 0) for c in sorted(confidences))
    return Results(
        stages=[evaluation["stage"] for evaluation in evaluations],
        before=before,
        after=after,
        rows=rows,
        problems=f"{last['problems']:,} problems, {last['samples']:,} {each}",
        moved=moved(compared.get(main) if main else None, "before"),
        paired=bool(compared),
        confidence=confidence,
        headline=_headline(main, metrics, rows, before, after, confidence),
    )


def _before_and_after(run: Run, columns: list[dict[str, Estimate | None]]) -> tuple[int, int]:
    """Which evaluations the summary's accuracy_before and accuracy_after are; else the first and the last."""

    def find(key: str, order: range, default: int) -> int:
        entry = run.summary.get(key) or {}
        for i in order:
            estimate = columns[i].get(entry.get("metric", ""))
            if estimate is not None and estimate.value == number(entry.get("value")):
                return i
        return default

    last = len(columns) - 1
    after = find("accuracy_after", range(last, -1, -1), last)
    return find("accuracy_before", range(after), 0), after


def _compared(
    run: Run, before: str, after: str, metrics: list[str], columns: list[dict[str, Estimate | None]]
) -> dict[str, Comparison]:
    """The paired change of each metric, where the rollouts of both evaluations are of the same problems."""
    first, last = run.stage(before), run.stage(after)
    if first is None or last is None or first is last:
        return {}
    confidence = next((e.confidence for column in columns for e in column.values() if e is not None), 0.95)
    metrics = [metric for metric in metrics if is_of_samples(metric)]
    return compare(evaluation_problems(first), evaluation_problems(last), metrics, confidence)


def metric_row(
    metric: str,
    estimates: list[Estimate | None],
    before: int,
    after: int,
    compared: Mapping[str, Comparison],
) -> Row:
    """A metric of several evaluations; `before` and `after` say between which the change is."""
    is_share = metric != "mean_length"
    scale = 1.0 if is_share else 1.1 * max((_top(e) for e in estimates if e is not None), default=1.0) or 1.0
    cells = [None if e is None else _cell(e, is_share, scale) for e in estimates]
    first, last = estimates[before], estimates[after]
    change, interval, verdict = "", "", "none"
    if metric in compared:
        difference = compared[metric].difference
        change = _difference(difference.value, is_share)
        if not math.isnan(difference.low):
            interval = f"{_difference(difference.low, is_share)} to {_difference(difference.high, is_share)}"
            verdict = "up" if difference.low > 0 else "down" if difference.high < 0 else "unclear"
    elif before != after and first is not None and last is not None:
        change = _difference(last.value - first.value, is_share)
    return Row(metric, cells, change, interval, verdict)


def _top(estimate: Estimate) -> float:
    return estimate.value if math.isnan(estimate.high) else estimate.high


def _difference(value: float, is_share: bool) -> str:
    return points(value) if is_share else amount(value, signed=True)


def _cell(estimate: Estimate, is_share: bool, scale: float) -> Cell:
    write = percent if is_share else amount
    known = not math.isnan(estimate.low)
    low, high = (estimate.low, estimate.high) if known else (estimate.value, estimate.value)
    return Cell(
        value=write(estimate.value),
        interval=f"{write(low)} to {write(high)}".replace(" % to", " to") if known else "",
        left=100 * low / scale,
        width=100 * (high - low) / scale,
        dot=100 * estimate.value / scale,
    )


def _headline(
    main: str | None, metrics: list[str], rows: list[Row], before: int, after: int, confidence: str
) -> Headline | None:
    if main not in metrics:
        return None
    row = rows[metrics.index(main)]
    last = row.cells[after]
    if last is None:
        return None
    first = row.cells[before] if before != after else None
    return Headline(metric_name(main), first, last, _change_in_words(row, first, confidence), row.verdict)


def _change_in_words(row: Row, before: Cell | None, confidence: str) -> str:
    if before is None:
        return ""
    if not row.change_interval:
        return f"{row.change} points"
    chance = ", no more than chance may give" if row.verdict == "unclear" else ""
    return f"{row.change} points{chance} ({confidence} interval {row.change_interval})"


def moved(comparison: Comparison | None, than: str) -> str:
    """How many problems rose and fell in a metric; "" without a comparison."""
    if comparison is None:
        return ""
    same = comparison.difference.n - comparison.rose - comparison.fell
    return (
        f"Problem by problem: {comparison.rose:,} answered better than {than}, {comparison.fell:,} worse, "
        f"{same:,} the same."
    )
