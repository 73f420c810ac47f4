"""The charts of self-predictions."""

from __future__ import annotations

import json

from posttrain.report.health import findings
from posttrain.report.html import write_report
from posttrain.report.run_folder import read_run
from posttrain.report.self_predictions import calibration_charts
from posttrain.report.series import stage_charts

META = {"levels": 8, "problems": 4, "bins": [{"level": 2, "problems": 3, "truth": 0.25},
                                             {"level": 8, "problems": 1, "truth": 0.5}]}  # fmt: skip


def test_charts_of_a_run(run_dir):
    assert calibration_charts(read_run(run_dir)) == []
    path = run_dir / "summary.json"
    summary = json.loads(path.read_text())
    for evaluation in summary["evaluations"]:
        evaluation["meta"] = META
    path.write_text(json.dumps(summary))
    lines = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    policy = [line for line in lines if line["kind"] == "policy"]
    for line in policy:
        early = line["step"] == 1
        line |= {"masa/level/4/problems": 2, "masa/level/4/truth": 0.5 if early else 1.0, "masa/collapsed": 1}
        line |= {"masa/rate_predicted": 0.5, "masa/rate_true": 0.75}
        if early:
            line |= {"masa/level/8/problems": 6, "masa/level/8/truth": 0.25}
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    run = read_run(run_dir)
    evaluations, steps = calibration_charts(run)
    assert [line["label"] for line in evaluations["lines"][:2]] == [
        e["stage"] for e in summary["evaluations"]
    ]
    assert (evaluations["lines"][0]["x"], evaluations["lines"][0]["raw"]) == ([2, 8], [0.25, 0.5])
    assert evaluations["lines"][-1]["raw"][4] == 0.5
    first, last, _ = steps["lines"]
    assert (first["x"], first["raw"]) == ([4, 8], [0.5, 0.25])
    assert (last["x"], last["raw"]) == ([4], [1.0])
    groups = {g["title"]: [c["title"] for c in g["charts"]] for s in run.stages for g in stage_charts(s)}
    assert groups["Self-predictions"] == ["Pass rate"]
    assert not any(name.startswith("masa/level/") for name in groups.get("Other metrics", []))
    assert any("same pass rate for all problems" in finding.text for finding in findings(run))
    page = write_report(run_dir).read_text()
    assert page.count("data-calibration=") == 2
