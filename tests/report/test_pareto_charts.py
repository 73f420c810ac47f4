"""The charts of metric `pareto`."""

from __future__ import annotations

import json

from posttrain.report.html import write_report
from posttrain.report.pareto import pareto_charts
from posttrain.report.run_folder import read_run


def point(family, setting, accuracy, compute, latency):
    return {
        "family": family,
        "setting": setting,
        "accuracy": {"value": accuracy},
        "compute": compute,
        "latency": latency,
    }


MEASURED = {
    "samples": 2,
    "problems": 4,
    "left_out": 0,
    "points": [
        point("majority vote", "N = 1", 0.5, 1.0, 1.0),
        point("majority vote", "N = 2", 0.5, 2.0, 1.25),
        point("utility, α = 1", "β = 0.01", 0.75, 1.804, 1.0),
        point("utility, α = 1", "β = 0.1", 0.625, 1.2, 1.5),
    ],
    "effort": {
        "measure": "steps",
        "difficulty": [2.0, 4.0],
        "compute": {"utility, α = 1, β = 0.1": [1.0, 1.4]},
    },
}


def test_charts_of_a_run(run_dir):
    assert pareto_charts(read_run(run_dir)) == []
    path = run_dir / "summary.json"
    summary = json.loads(path.read_text())
    summary["evaluations"][-1]["pareto"] = MEASURED
    path.write_text(json.dumps(summary))

    compute, latency, effort = pareto_charts(read_run(run_dir))
    assert [line["label"] for line in compute["lines"]] == ["majority vote", "utility, α = 1"]
    utility = compute["lines"][1]  # points in the order of their cost
    assert (utility["x"], utility["raw"]) == ([1.2, 1.8], [0.625, 0.75])
    assert utility["settings"] == ["β = 0.1", "β = 0.01"]
    assert latency["lines"][1]["settings"] == ["β = 0.01", "β = 0.1"]
    assert latency["lines"][0]["x"] == [1.0, 1.25]
    assert "utility, α = 1 up to 75.0% at 1.8" in compute["summary"]
    assert (effort["lines"][0]["x"], effort["lines"][0]["raw"]) == ([2.0, 4.0], [1.0, 1.4])
    page = write_report(run_dir).read_text()
    assert page.count("data-pareto=") == 3
    assert 'href="#pareto"' in page


def test_several_evaluations_are_told_apart(run_dir):
    path = run_dir / "summary.json"
    summary = json.loads(path.read_text())
    for evaluation in summary["evaluations"]:
        evaluation["pareto"] = MEASURED
    path.write_text(json.dumps(summary))
    charts = pareto_charts(read_run(run_dir))
    stages = [evaluation["stage"] for evaluation in summary["evaluations"]]
    assert len(charts) == 3 * len(stages)
    assert charts[0]["title"] == f"Accuracy against compute: {stages[0]}"
