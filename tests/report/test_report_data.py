"""What the report computes before anything is drawn."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
from synthetic_run import METRICS, policy_line, write_lines, write_run, write_step

from posttrain.errors import PosttrainError
from posttrain.evaluation.metrics import paired_difference
from posttrain.evaluation.samples import problem_values
from posttrain.report.health import findings
from posttrain.report.results import results
from posttrain.report.rollouts import (
    GROUP_SHOWN,
    PAYLOAD,
    STEPS_SHOWN,
    TEXT_SHOWN,
    distributions,
    evaluation_problems,
    histogram,
    sample_rollouts,
    shortened,
)
from posttrain.report.run_folder import Series, read_run
from posttrain.report.series import MAX_POINTS, curve, smooth, stage_charts
from posttrain.report.words import amount, count, duration, percent, points, stage_title
from posttrain.training.record import write_rollouts


def read_lines(run_dir, lines):
    write_lines(run_dir, lines)
    return read_run(run_dir)


def texts(run, stage=None):
    return " ".join(finding.text for finding in findings(run) if stage in (None, finding.stage))


def test_stages_metrics_and_rollouts_are_read(run_dir):
    run = read_run(run_dir)
    assert [stage.name for stage in run.stages] == ["01-sft", "02-evaluate", "03-policy", "04-evaluate"]
    sft, before, policy, _ = run.stages
    assert sft.metrics["loss"].steps.tolist() == [10, 20, 30, 40]
    assert (policy.steps, policy.seconds, policy.phases["update"]) == (6, 185.0, 90.0)
    assert list(policy.rollouts) == [1, 2, 3, 4, 5, 6]
    assert before.samples is not None
    assert before.samples.name == "samples.parquet"
    assert "kl" not in policy.metrics  # null in every line
    assert np.isnan(policy.metrics["grad_norm"].values[2])
    assert len(policy.values("grad_norm")) == 5


def test_stages_of_a_stopped_run_are_found_without_a_summary(run_dir):
    (run_dir / "summary.json").unlink()
    run = read_run(run_dir)
    assert [(stage.name, stage.kind) for stage in run.stages] == [
        ("01-sft", "sft"),
        ("02-evaluate", "evaluate"),
        ("03-policy", "policy"),
        ("04-evaluate", "evaluate"),
    ]
    assert run.name == "arithmetic"
    assert "stopped early" in texts(run, "run")


def test_last_line_cut_short_by_a_kill_is_left_out(run_dir):
    path = run_dir / "metrics.jsonl"
    path.write_text(path.read_text() + '{"stage": "03-policy", "st')
    assert read_run(run_dir).stages[2].steps == 6


def test_step_logged_again_after_a_resume_counts_once(run_dir):
    first, again = ({"stage": "p", "kind": "policy", "step": 1, "reward": value} for value in (0.1, 0.7))
    series = read_lines(run_dir, [first, again]).stage("p").metrics["reward"]
    assert series.values.tolist() == [0.7]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", "{", r"summary\.json is not valid JSON"),
        ("summary.json", "[]", r"summary\.json is not a JSON object"),
        ("recipe.yaml", "a: [", r"recipe\.yaml is not valid YAML"),
        ("metrics.jsonl", '{"stage": "p", "step": 1}\noops\n', r"metrics\.jsonl, line 2 is not valid JSON"),
        ("metrics.jsonl", "{}\n", r"metrics\.jsonl, line 1 is not a metrics record"),
    ],
)
def test_damaged_file_is_named(run_dir, name, content, message):
    (run_dir / name).write_text(content)
    with pytest.raises(PosttrainError, match=message):
        read_run(run_dir)


def test_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(PosttrainError, match=f"{tmp_path} is not a run folder"):
        read_run(tmp_path)


def test_smoothing_keeps_lines_straight_and_skips_gaps():
    line = np.linspace(0, 1, 101)
    np.testing.assert_allclose(smooth(line)[15:-15], line[15:-15], atol=1e-9)
    noisy = np.random.default_rng(0).normal(size=200)
    assert smooth(noisy).std() < 0.5 * noisy.std()
    gap = np.array([1.0] * 10 + [np.nan] + [1.0] * 10)
    np.testing.assert_allclose(smooth(gap), 1.0)


def test_curves_are_thinned_but_keep_their_ends_and_gaps():
    steps = np.arange(1, 5001, dtype=float)
    drawn = curve(Series(steps, steps / 5000))
    assert len(drawn["x"]) == len(drawn["raw"]) == len(drawn["smooth"]) == MAX_POINTS
    assert (drawn["x"][0], drawn["x"][-1]) == (1, 5000)
    short = curve(Series(np.array([1.0, 2.0, 3.0]), np.array([1.0, np.nan, np.inf])))
    assert short == {"x": [1, 2, 3], "raw": [1.0, None, None], "smooth": []}


def test_charts_are_those_of_the_metrics_there_are(run_dir):
    lines = [{"stage": "p", "kind": "policy", "step": s, "reward": 0.5, "masa/gate": 0.1 * s} for s in (1, 2)]
    lines += [{"stage": "s", "kind": "sft", "step": 1, "loss": 0.4, "grad_norm": "NaN"}]
    run = read_lines(run_dir, lines)
    titles = {
        stage.name: [
            (group["title"], [chart["title"] for chart in group["charts"]]) for group in stage_charts(stage)
        ]
        for stage in run.stages
    }
    assert titles["p"] == [("Learning", ["Reward"]), ("Other metrics", ["masa/gate"])]
    assert titles["s"] == [("Learning", ["Loss"])]
    assert titles["02-evaluate"] == []


def test_each_reward_has_a_line(run_dir):
    groups = stage_charts(read_run(run_dir).stage("03-policy"))
    each = next(chart for group in groups for chart in group["charts"] if chart["title"] == "Each reward")
    assert [line["label"] for line in each["lines"]] == ["math_answer", "format"]
    assert each["summary"].startswith("Each reward over 6 steps: math_answer from ")


def test_table_shows_the_paired_change(run_dir):
    run = read_run(run_dir)
    table = results(run)
    before, after = (evaluation_problems(run.stage(name)) for name in ("02-evaluate", "04-evaluate"))
    assert [row.metric for row in table.rows] == METRICS
    assert (table.stages[table.before], table.stages[table.after]) == ("02-evaluate", "04-evaluate")
    assert table.paired
    row = table.rows[0]
    first, last = (problem_values("pass@1", list(side.values())) for side in (before, after))
    expected = paired_difference(first, last)
    assert row.cells[0].value == percent(first.mean())
    assert row.cells[1].value == percent(last.mean())
    assert row.change == points(expected.value)
    assert row.change_interval == f"{points(expected.low)} to {points(expected.high)}"
    assert row.verdict == "up"
    metric = run.summary["evaluations"][1]["metrics"]["pass@1"]
    assert row.cells[1].interval == f"{percent(metric['low'])[:-2]} to {percent(metric['high'])}"
    assert row.cells[1].dot == pytest.approx(100 * metric["value"])
    assert table.headline.metric == "Greedy accuracy"
    assert table.headline.change.startswith(table.rows[METRICS.index("greedy")].change)
    assert "worse" in table.moved


def test_before_is_the_evaluation_the_summary_means(run_dir):
    path = run_dir / "summary.json"
    summary = json.loads(path.read_text())
    only = {"greedy": {"value": 0.01, "low": 0.0, "high": 0.02, "confidence": 0.95, "n": 40}}
    first = {**summary["evaluations"][0], "stage": "00-evaluate", "metrics": only}
    summary["evaluations"].insert(0, first)
    path.write_text(json.dumps(summary))
    table = results(read_run(run_dir))
    assert (table.before, table.after) == (1, 2)
    assert [row.cells[0] is None for row in table.rows] == [row.metric != "greedy" for row in table.rows]


def test_other_problems_are_compared_without_an_interval(run_dir):
    write_rollouts(run_dir / "rollouts/02-evaluate/samples.parquet", one_sample("another"))
    table = results(read_run(run_dir))
    assert not table.paired
    assert {row.change_interval for row in table.rows} == {""}
    assert table.rows[0].change.startswith("+")


def one_sample(example_id, **changes):
    return [
        {
            "step": 0,
            "policy_version": 0,
            "rollout_id": "r",
            "example_id": example_id,
            "group": "g",
            "role": "solution",
            "index": 0,
            "seed": 1,
            "prompt": "p",
            "completion": "c",
            "answer": None,
            "prompt_ids": [1],
            "completion_ids": [1],
            "logprobs": [-0.5],
            "finish_reason": "stop",
            "loss_mask": None,
            "reward": 1.0,
            "reward_errors": "{}",
            "correct": True,
            **changes,
        }
    ]


def test_run_without_evaluations_has_no_table(run_dir):
    (run_dir / "summary.json").write_text('{"name": "x", "evaluations": []}')
    assert results(read_run(run_dir)) is None


def test_sample_shows_whole_groups_of_each_kind(run_dir):
    sample = sample_rollouts(read_run(run_dir))
    assert sample.written == 6 * 4 * 4 + 2 * 40 * 5
    policy = [row for row in sample.rows if row["stage"] == "03-policy"]
    assert {row["step"] for row in policy} == {1, 2, 3, 4, 5, 6}
    statuses = {row["status"] for row in policy}
    assert statuses == {"trained", "dropped: unscored", "dropped: equal rewards"}
    unscored = next(row for row in policy if row["status"] == "dropped: unscored")
    assert unscored["reward"] is None
    assert unscored["errors"] == {"math_answer": "no result within 5 s"}
    assert unscored["rewards"]["math_answer"] is None
    trained = next(row for row in policy if row["status"] == "trained")
    mean, low, high = trained["advantages"]["outcome"]
    assert mean == low == high != 0
    groups = {(row["step"], row["group"]) for row in policy}
    assert len(policy) == 4 * len(groups)
    evaluated = {
        stage: {r["example"] for r in sample.rows if r["stage"] == stage}
        for stage in ("02-evaluate", "04-evaluate")
    }
    assert evaluated["02-evaluate"] == evaluated["04-evaluate"] != set()
    assert sample.prompts[trained["p"]].startswith("What is")
    assert trained["seed"].isdigit()


def test_sample_of_a_long_run_is_bounded(tmp_path):
    run_dir = write_run(tmp_path, steps=2, problems=30)
    for step in range(3, 41):
        write_step(run_dir, "03-policy", step, 0.5, 2, 10)
    sample = sample_rollouts(read_run(run_dir))
    steps = sorted({row["step"] for row in sample.rows if row["step"] is not None})
    assert len(steps) == STEPS_SHOWN
    assert (steps[0], steps[-1]) == (1, 40)
    by_group = {}
    for row in sample.rows:
        by_group.setdefault((row["stage"], row["step"], row["group"]), []).append(row)
    assert max(len(rows) for rows in by_group.values()) <= GROUP_SHOWN


def test_sample_of_long_completions_fits_the_report(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: long")
    long = {"completion": "x" * 50_000, "completion_ids": [1] * 500, "logprobs": [-0.1] * 500}
    for step in range(1, 30):
        for_step = [one_sample("e", index=i, reward=float(i), **long)[0] for i in range(8)]
        equal = [one_sample("f", index=i, group="h", **long)[0] for i in range(8)]
        write_rollouts(tmp_path / f"rollouts/01-policy/step-{step:06d}.parquet", for_step + equal)
    sample = sample_rollouts(read_run(tmp_path))
    assert len(json.dumps(sample.rows)) <= PAYLOAD
    assert len({row["step"] for row in sample.rows}) == STEPS_SHOWN


def test_long_text_loses_its_middle_and_says_so():
    text = "a" * TEXT_SHOWN + "b" * TEXT_SHOWN
    short = shortened(text)
    assert "4,000 characters not shown" in short
    assert short[0] == "a"
    assert short[-1] == "b"
    assert shortened("a" * TEXT_SHOWN) == "a" * TEXT_SHOWN


def test_files_of_several_ranks_are_one_step(run_dir):
    folder = run_dir / "rollouts/03-policy"
    whole = sample_rollouts(read_run(run_dir))
    for path in list(folder.iterdir()):
        rows = pq.read_table(path).to_pylist()
        path.unlink()
        for rank in range(2):
            write_rollouts(path.with_stem(f"{path.stem}-{rank}"), rows[8 * rank : 8 * rank + 8])
    stage = read_run(run_dir).stage("03-policy")
    assert {step: len(paths) for step, paths in stage.rollouts.items()} == dict.fromkeys(range(1, 7), 2)
    assert sample_rollouts(read_run(run_dir)) == whole
    assert sum(distributions(stage)[0]["shares"][0]) == pytest.approx(1, abs=1e-3)


def test_unreadable_rollouts_are_named(run_dir):
    path = run_dir / "rollouts/03-policy/step-000002.parquet"
    path.write_bytes(b"PAR1 cut short")
    with pytest.raises(PosttrainError, match=r"step-000002\.parquet is not a readable rollout file"):
        sample_rollouts(read_run(run_dir))


def test_distributions_compare_early_and_late_steps(run_dir):
    reward, length = distributions(read_run(run_dir).stage("03-policy"))
    assert reward["labels"] == ["step 1", "step 6"]
    assert reward["discrete"]
    last = pq.read_table(run_dir / "rollouts/03-policy/step-000006.parquet").to_pylist()
    scored = [row["reward"] for row in last if row["reward"] is not None]
    assert reward["means"][1] == pytest.approx(np.mean(scored), rel=1e-4)
    assert length["means"][1] == pytest.approx(
        np.mean([len(row["completion_ids"]) for row in last]), rel=1e-4
    )
    for panel in (reward, length):
        for shares in panel["shares"]:
            assert sum(shares) == pytest.approx(1, abs=1e-3)


def test_distribution_of_one_step_has_one_part(tmp_path):
    run_dir = write_run(tmp_path, steps=1, problems=3)
    assert distributions(read_run(run_dir).stage("03-policy"))[0]["labels"] == ["step 1"]


def test_histogram_of_whole_numbers_has_whole_bins():
    panel = histogram([np.arange(0, 100, dtype=float), np.arange(50, 100, dtype=float)])
    assert set(np.diff(panel["edges"])) == {5.0}
    assert panel["shares"][0] == [0.05] * 20
    assert panel["shares"][1] == [0.0] * 10 + [0.1] * 10


def test_histogram_of_real_numbers_holds_every_value():
    values = np.random.default_rng(0).normal(size=1000)
    panel = histogram([values])
    assert not panel["discrete"]
    assert sum(panel["shares"][0]) == pytest.approx(1, abs=1e-9)


def healthy(steps=40):
    rng = np.random.default_rng(0)
    return [policy_line(rng, "p", step, steps) | {"grad_norm": 0.3} for step in range(1, steps + 1)]


def test_healthy_run_has_no_findings(run_dir):
    assert findings(read_lines(run_dir, healthy())) == []


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"completions/truncated": 0.4}, "40 % of the last completions ran into the token cap"),
        ({"groups/zero_variance": 0.9}, "In 90 % of the last groups"),
        ({"rewards/unscored": 0.05}, "5.0 % of the samples could not be scored"),
        ({"ratio/clipped": 0.5}, "50 % of the tokens were clipped"),
        ({"sampling/logprob_difference": 0.2}, "differ from the trainer's by 0.2"),
        ({"loss": "NaN"}, "Not a finite number: loss in 40 steps"),
        ({"reward": 0.5}, "The reward did not rise: 0.5"),
    ],
)
def test_each_check_speaks_up(run_dir, metrics, words):
    run = read_lines(run_dir, [line | metrics for line in healthy()])
    assert words in texts(run, "p")
    assert len(findings(run)) == 1


def test_entropy_collapse_is_found(run_dir):
    lines = [line | {"entropy": 0.6 * math.exp(-line["step"] / 8)} for line in healthy()]
    assert "Entropy fell from" in texts(read_lines(run_dir, lines), "p")


def test_unscored_evaluation_is_a_problem(run_dir):
    path = run_dir / "summary.json"
    summary = json.loads(path.read_text())
    summary["evaluations"][0] |= {"unscored": 9}
    path.write_text(json.dumps(summary))
    run = read_lines(run_dir, healthy())
    assert [(f.level, f.stage) for f in findings(run)] == [("problem", "02-evaluate")]
    assert "9 of the samples" in texts(run)


def test_numbers_are_written_for_people():
    assert percent(0.1234) == "12.3 %"
    assert points(-0.05) == "−5.0"
    assert points(0.05) == "+5.0"
    assert amount(1234.5) == "1,234"
    assert amount(-3.25, signed=True) == "−3.2"
    assert count(1_234_567) == "1.23M"
    assert count(999) == "999"
    assert count(None) == "–"
    assert [duration(s) for s in (0.25, 59.6, 61, 3700, None)] == [
        "0.2 s",
        "1 min 0 s",
        "1 min 1 s",
        "1 h 1 min",
        "–",
    ]
    assert stage_title("02-policy") == "policy"
    assert stage_title("policy") == "policy"
