"""Whether a run goes on: an evaluation against an earlier one of the same problems, by paired bootstrap.

Pairing takes the problems' difficulty out of the comparison. The interval is that of
`posttrain.evaluation.metrics.paired_difference`; the gate `METRIC > STAGE` is passed when all of it is above
0 (or above the margin). A stage that is no better than its baseline so passes in (1 - confidence) / 2 of all
cases, 2.5 % at 95 %. With few problems hardly any passes: of ten that are solved or not, two more are no
evidence (the interval goes from 0 to 0.5), and six more are (0.3 to 0.9).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from posttrain.evaluation.metrics import Estimate, paired_difference
from posttrain.evaluation.samples import Problem, problem_values
from posttrain.recipe.gate_schema import StageGate

Outcome = dict[str, Any]
"""A decision as JSON: `gate`, `baseline` (a stage), `passed`, `reason`, and a list of rows `table`."""


def holds(gate: StageGate, difference: Estimate) -> bool:
    """Whether the whole interval of a difference is where the gate wants it; an unknown one never is."""
    return difference.low > gate.margin if gate.sign == ">" else difference.high < gate.margin


def decide(
    gate: StageGate,
    baseline: str,
    before: Mapping[str, Problem],
    after: Mapping[str, Problem],
    metrics: Sequence[str],
    confidence: float,
) -> Outcome:
    """Decide a gate.

    Args:
        gate: what has to hold.
        baseline: the stage that `before` is of.
        before: its problems by example id.
        after: the problems of the stage with the gate.
        metrics: what the table has beside the gate's own metric.
        confidence: of the intervals.
    """
    if before.keys() != after.keys():
        shared = len(before.keys() & after.keys())
        reason = f"the two stages share only {shared} of {len(before)} and {len(after)} problems"
        return {
            "gate": str(gate), "baseline": baseline, "passed": False, "reason": reason, "table": []
        }  # fmt: skip
    names = [gate.metric, *(metric for metric in metrics if metric != gate.metric)]
    pairs = [_values(name, before, after) for name in names]
    differences = [paired_difference(first, second, confidence) for first, second in pairs]
    own = differences[0]
    interval = f"the {confidence:.0%} interval of the paired difference over {own.n} problems"
    if math.isnan(own.low):
        reason = f"{interval} is not known"
    else:
        verb = "is" if holds(gate, own) else "is not"
        reason = f"{interval}, [{own.low:+.3f}, {own.high:+.3f}], {verb} {gate.demand}"
    rows = [
        {"metric": name, "baseline": _mean(first), "value": _mean(second), "difference": found.to_dict()}
        for name, (first, second), found in zip(names, pairs, differences, strict=True)
    ]
    passed = holds(gate, own)
    return {"gate": str(gate), "baseline": baseline, "passed": passed, "reason": reason, "table": rows}


def _values(metric: str, before: Mapping[str, Problem], after: Mapping[str, Problem]) -> tuple[Any, Any]:
    """The values of the problems that have one in both."""
    first = problem_values(metric, list(before.values()))
    second = problem_values(metric, [after[name] for name in before])
    both = ~(np.isnan(first) | np.isnan(second))
    return first[both], second[both]


def _mean(values: Any) -> float | None:
    return float(values.mean()) if len(values) else None


def gate_lines(stage: str, outcome: Outcome) -> list[str]:
    """The decision and its table, line by line."""
    table = [("metric", outcome["baseline"], stage, "difference", "interval", "problems")]
    for row in outcome["table"]:
        found, form = row["difference"], "{:.1f}" if row["metric"] == "mean_length" else "{:.3f}"
        signed = form.replace(":", ":+")
        known = found["low"] is not None
        interval = f"[{signed.format(found['low'])}, {signed.format(found['high'])}]" if known else "unknown"
        means = [_number(form, row[key]) for key in ("baseline", "value")]
        difference = _number(signed, found["value"])
        table.append((row["metric"], *means, difference, interval, str(found["n"])))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    verdict = "passed" if outcome["passed"] else "not passed"
    return [f"gate {outcome['gate']}: {verdict}, {outcome['reason']}"] + [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (table if outcome["table"] else [])
    ]


def _number(form: str, value: float | None) -> str:
    return "–" if value is None else form.format(value)
