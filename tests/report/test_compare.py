"""Two runs on one page."""

from __future__ import annotations

import json
import shutil

import pytest
from synthetic_run import RECIPE, write_evaluation, write_lines, write_run

from posttrain.cli import main
from posttrain.report.compare import different_settings, names, pairs, shared_curves
from posttrain.report.html import render_comparison
from posttrain.report.run_folder import read_run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run, and another that got less out of the same data, without a warm start and with a KL term."""
    folder = tmp_path_factory.mktemp("compared")
    write_run(folder / "one")
    shutil.copytree(folder / "one", folder / "two")
    two = folder / "two"
    recipe = RECIPE.replace("name: arithmetic", "name: plain").replace(
        "{steps: 60}", "{steps: 60, loss: {kl: 0.1}}"
    )
    (two / "recipe.yaml").write_text(recipe)
    summary = json.loads((two / "summary.json").read_text()) | {"name": "plain", "seconds": 100.0}
    summary["evaluations"][1] = write_evaluation(two, "04-evaluate", 0.5, 40, 4)
    summary["stages"] = [stage for stage in summary["stages"] if stage["kind"] != "sft"]
    (two / "summary.json").write_text(json.dumps(summary))
    lines = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    write_lines(two, [line for line in lines if line["kind"] == "policy"])
    return folder / "one", two


def test_evaluations_are_paired_problem_by_problem(folders):
    one, two = map(read_run, folders)
    before, after = pairs(one, two)
    assert (before.stage, before.rows[0].change, before.rows[0].verdict) == ("02-evaluate", "+0.0", "unclear")
    row = next(row for row in after.rows if row.metric == "pass@1")
    theirs, mine = (float(cell.value.rstrip(" %")) for cell in row.cells)
    assert mine > theirs
    assert float(row.change) == pytest.approx(mine - theirs, abs=0.15)
    low, high = map(float, row.change_interval.split(" to "))
    assert 0 < low < mine - theirs < high
    assert row.verdict == "up"
    assert after.unpaired == ""
    assert "answered better than in plain" in after.moved
    assert after.better[0].share > after.better[0].other
    assert after.better[0].prompt.startswith("What is ")
    (_, mirrored) = pairs(two, one)
    assert mirrored.rows[0].change == after.rows[0].change.replace("+", "−")


def test_other_problems_are_not_paired(folders, tmp_path):
    one = read_run(folders[0])
    other = tmp_path / "other"
    shutil.copytree(folders[1], other)
    write_evaluation(other, "04-evaluate", 0.5, 39, 4)
    after = pairs(one, read_run(other))[1]
    assert after.unpaired == "the evaluations are of different problems"
    assert after.rows[0].change != ""
    assert after.rows[0].change_interval == ""
    shutil.rmtree(other / "rollouts")
    assert (
        pairs(one, read_run(other))[1].unpaired == "the rollouts of an evaluation are not in its run folder"
    )


def test_settings_and_curves(folders):
    one, two = map(read_run, folders)
    assert different_settings(one, two) == [("stages[1].policy.loss.kl", "not there", "0.1")]
    assert different_settings(one, one) == []
    ((stages, groups),) = shared_curves(one, two)
    assert stages == "03-policy"
    chart = groups[0]["charts"][0]
    assert (chart["title"], [line["label"] for line in chart["lines"]]) == ("Reward", ["arithmetic", "plain"])
    assert names(one, one) == (f"{one.path} (1)", f"{one.path} (2)")


def test_the_page(folders, capsys):
    one, two = folders
    assert main(["report", str(one), "--compare", str(two)]) == 0
    path = one / "compare-two.html"
    assert capsys.readouterr().out == f"Comparison: {path}\n"
    page = path.read_text()
    for expected in (
        "arithmetic minus plain",
        "stages[1].policy.loss.kl",
        "1 min 40 s",
        "paired over the same problems",
    ):
        assert expected in page
    assert main(["report", str(one), "--compare", str(one / "none")]) == 1
    assert "none: there is no such run folder." in capsys.readouterr().err
    (one / "empty").mkdir(exist_ok=True)
    (one / "empty" / "metrics.jsonl").write_text("")
    assert "have no evaluations to compare: they are listed" in render_comparison(
        read_run(one / "empty"), read_run(one / "empty")
    )
