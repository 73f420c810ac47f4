"""The harness of scripts/bench, the results that are checked in, and what the README says of them."""

import json
import re
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import bench
import pytest
from benchmarks import harness
from benchmarks.harness import BENCHES, Comparison, Sample, Settings, Stopwatch, alternate

ROOT = Path(__file__).parent.parent
RESULTS = sorted(harness.RESULTS.glob("*.json"))


def comparison(ours, theirs, limit=0.5):
    return Comparison("name", "theirs", "seconds", limit, ours, theirs, shapes={"group": 8})


def test_the_ratio_is_the_median_of_paired_ratios():
    # The medians themselves are 2 and 4, a ratio of 0.5; the pairs say 0.25, 0.1 and 1.
    made = comparison([1, 2, 4], [4, 20, 4])
    record = made.record()
    assert made.ratios == [0.25, 0.1, 1.0]
    assert (record["ratio"], record["ratio_min"], record["ratio_max"]) == (0.25, 0.1, 1.0)
    assert (record["ours"], record["theirs"]) == (2, 4)
    assert record["runs"] == {"ours": [1, 2, 4], "theirs": [4, 20, 4]}
    assert record["holds"]


@pytest.mark.parametrize(("limit", "holds"), [(0.5, True), (0.4999, False)])
def test_a_limit_holds_up_to_itself(limit, holds):
    assert comparison([1.0], [2.0], limit).record()["holds"] is holds


def test_a_ratio_may_be_too_small():
    made = replace(comparison([0.8], [1.0], limit=1.15), at_least=0.85)
    assert (made.record()["holds"], made.record()["at_least"]) == (False, 0.85)
    assert replace(made, ours=[0.9]).holds


def test_sides_take_turns_after_a_warm_up_and_every_pair_is_checked():
    order, checked = [], []

    def side(name):
        def run():
            order.append(name)
            return Sample(float(len(order)), name)

        return run

    values = alternate(side("a"), side("b"), 2, lambda a, b: checked.append((a, b)))
    assert order == ["a", "b"] * 3
    assert checked == [("a", "b")] * 3
    assert values == ([3.0, 5.0], [4.0, 6.0])


def test_sides_that_computed_something_else_are_an_error():
    with pytest.raises(AssertionError, match="not compute the same: losses 1 and 2"):
        alternate(
            lambda: Sample(1.0, 1),
            lambda: Sample(1.0, 2),
            1,
            lambda a, b: harness.require(a == b, f"losses {a} and {b}"),
        )


def test_a_stopwatch_counts_work_and_not_waiting():
    watch = Stopwatch()
    with watch:
        time.sleep(0.2)
    assert watch.seconds < 0.1
    with watch:
        start = time.process_time()
        while time.process_time() - start < 0.05:
            pass
    assert watch.seconds >= 0.05


def test_a_fresh_process_answers():
    assert harness.in_fresh_process(statistics.median, [3, 1, 2]) == 2


def test_a_written_result_says_what_it_was_measured_on(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    made = [comparison([1.0], [4.0]), comparison([3.0], [4.0])]
    path = harness.write("fork", "A title.\n\nMore.", made, Settings(seed=7), harness.machine("cpu"))
    assert path == tmp_path / "fork.json"
    check_result(json.loads(path.read_text()))
    assert not json.loads(path.read_text())["holds"]
    assert json.loads(path.read_text())["measures"] == "A title."


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_that_are_checked_in(path):
    result = json.loads(path.read_text())
    assert path.stem.removesuffix("-cuda") == result["bench"]
    assert result["bench"] in BENCHES
    check_result(result)


def test_the_measurement_of_the_plan_is_checked_in():
    result = json.loads((ROOT / "results" / "plan_memory.json").read_text())
    check_result(result)
    assert {one["at_least"] for one in result["comparisons"]} == {0.85}
    assert {one["details"]["fitted"] for one in result["comparisons"]} == {True, False}


def check_result(result):
    assert re.fullmatch(r"[0-9a-f]{40}", result["commit"])
    assert {"processor", "cores", "threads_used", "load_average"} <= result["machine"].keys()
    assert {"python", "torch", "transformers", "trl"} <= result["versions"].keys()
    assert isinstance(result["seed"], int)
    assert result["comparisons"]
    assert result["holds"] == all(one["holds"] for one in result["comparisons"])
    for one in result["comparisons"]:
        ours, theirs = one["runs"]["ours"], one["runs"]["theirs"]
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        assert one["ratio"] == pytest.approx(statistics.median(ratios), rel=2e-3, abs=2e-4)
        assert one["ratio_min"] <= one["ratio"] <= one["ratio_max"]
        assert one["ours"] == pytest.approx(statistics.median(ours), abs=1e-4)
        assert one["holds"] == (one.get("at_least", 0.0) <= one["ratio"] <= one["limit"])
        assert one["unit"]
        assert one["theirs_is"]
        assert one["shapes"]


def test_the_readme_lists_every_bench():
    section = (ROOT / "README.md").read_text().partition("\n## Benchmarks\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z-]+)` \|", section, re.MULTILINE)) == set(BENCHES)


@pytest.mark.parametrize("name", BENCHES)
def test_every_bench_has_a_file_with_a_title(name):
    source = (ROOT / "scripts" / "benchmarks" / f"{BENCHES[name]}.py").read_text()
    assert re.match(r'"""[A-Z][^\n]+\.\n', source)
    assert "\ndef compare(settings: Settings) -> list[Comparison]:\n" in source


def test_a_bench_that_does_not_exist_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "no-such-bench"])
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert stopped.value.code == 2
    assert "no-such-bench" in capsys.readouterr().err


def test_nothing_is_measured_on_a_busy_machine(monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (harness.MAX_LOAD + 0.1, 0, 0))
    monkeypatch.setattr(sys, "argv", ["bench", "fork"])
    with pytest.raises(SystemExit, match="busy machine"):
        bench.main()
