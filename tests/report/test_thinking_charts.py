"""The charts of thinking that was cut short."""

from __future__ import annotations

import json

from posttrain.report.html import write_report
from posttrain.report.run_folder import read_run
from posttrain.report.thinking import thinking_charts

CURVES = {
    "tokens": [16.0, 32.0],
    "accuracy": [0.25, 0.5],
    "regret": [0.875, 0.75],
    "episodes_per_group": 2,
    "votes": [[0.1, 0.2, 0.3, None], [0.4, 0.5, 0.6, None]],
}


def test_charts_of_a_run(run_dir):
    assert thinking_charts(read_run(run_dir)) == []
    path = run_dir / "summary.json"
    summary = json.loads(path.read_text())
    for evaluation in summary["evaluations"]:
        evaluation["thinking"] = CURVES
        evaluation["metrics"]["regret@32"] = {**evaluation["metrics"]["pass@1"], "value": 0.75}
    path.write_text(json.dumps(summary))

    accuracy, regret, votes = thinking_charts(read_run(run_dir))
    stages = [evaluation["stage"] for evaluation in summary["evaluations"]]
    assert [line["label"] for line in accuracy["lines"]] == stages
    assert (accuracy["lines"][0]["x"], accuracy["lines"][0]["raw"]) == ([16, 32], [0.25, 0.5])
    assert regret["lines"][1]["raw"] == [0.875, 0.75]
    assert [(line["label"], line["x"], line["raw"]) for line in votes["lines"]] == [
        ("thinking on", [0, 2], [0.1, 0.4]),
        ("voting from 0", [0, 1, 3], [0.1, 0.2, 0.3]),
        ("voting from 2", [2, 3, 5], [0.4, 0.5, 0.6]),
    ]
    page = write_report(run_dir).read_text()
    assert page.count("data-thinking=") == 3
    assert "Regret up to 32 tokens" in page
