"""Numbers written for people."""

from __future__ import annotations

import math

from posttrain.report.run_folder import number

MISSING = "–"
MINUS = "−"


def percent(value: float, digits: int = 1) -> str:
    """A share of one as per cent."""
    return MISSING if math.isnan(value) else f"{value * 100:.{digits}f} %".replace("-", MINUS)


def points(value: float) -> str:
    """A difference of two shares in percentage points, with its sign."""
    return MISSING if math.isnan(value) else f"{round(value * 100, 1) + 0.0:+.1f}".replace("-", MINUS)


def amount(value: float, signed: bool = False) -> str:
    """A length in tokens."""
    if math.isnan(value):
        return MISSING
    digits = 0 if abs(value) >= 1000 else 1
    rounded = round(value, digits) + 0.0  # not −0
    return f"{rounded:{'+' if signed else ''},.{digits}f}".replace("-", MINUS)


def count(value: object) -> str:
    """A count that may be large: 12,345, 1.23M, 4.56B."""
    x = number(value)
    for limit, unit in ((1e9, "B"), (1e6, "M")):
        if x >= limit:
            return f"{x / limit:.3g}{unit}"
    return MISSING if math.isnan(x) else f"{x:,.0f}"


def duration(seconds: float | None) -> str:
    """Seconds as hours, minutes and seconds, the two largest of them."""
    if seconds is None or math.isnan(seconds):
        return MISSING
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def metric_name(metric: str) -> str:
    """A metric's name in the report's tables."""
    names = {
        "greedy": "Greedy accuracy",
        "mean_length": "Mean length, tokens",
        "pass@1": "Sampled accuracy, pass@1",
        "episode_regret": "Regret against voting after episodes",
    }
    kind, _, budget = metric.partition("@")
    if kind == "regret":
        return f"Regret up to {budget} tokens"
    if kind == "accuracy":
        return f"Accuracy at {budget} tokens"
    if kind == "continued":
        return f"Accuracy, made to think on by {budget[1:]}"
    if kind in ("linear", "parallel"):
        what = "searching on" if kind == "linear" else "majority of samples"
        return f"Accuracy at {budget} tokens, {what}"
    return names.get(metric, metric)


def stage_title(name: str) -> str:
    """`02-policy` as `policy`, the numbers being shown as an order."""
    head, _, tail = name.partition("-")
    return tail if head.isdigit() and tail else name
