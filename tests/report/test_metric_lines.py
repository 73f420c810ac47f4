"""What the terminal shows of a metric, also where there are too few problems for an interval."""

from __future__ import annotations

from posttrain.report.progress import metric_line


def line(value, low, high, n, metric="pass@1"):
    return metric_line(metric, {"value": value, "low": low, "high": high, "confidence": 0.95, "n": n})


def test_value_and_interval():
    assert line(0.5, 0.4, 0.6, 9) == "pass@1        50.0 %  95% interval [40.0, 60.0], n=9"
    assert "[0.0, 60.0]" in line(0.0, 0.0, 0.6, 4)
    assert line(12.0, 10.0, 14.0, 4, "mean_length").startswith("mean_length   12.0 tokens")


def test_too_few_problems():
    assert line(0.5, None, None, 1) == "pass@1        50.0 %  95% interval unknown, n=1"
    assert line(None, None, None, 0).endswith("no problem has a value")
