"""Two runs side by side: curves in the same charts, settings that differ, evaluations problem by problem."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.evaluation.samples import Problem, is_of_samples, problem_values
from posttrain.evaluation.table import Comparison, compare
from posttrain.report.results import Row, metric_row, moved, to_estimate
from posttrain.report.rollouts import count_rollouts, evaluation_problems, read_tables, shortened
from posttrain.report.run_folder import Run, Stage
from posttrain.report.series import stage_charts

CHANGED_SHOWN = 8
"""Problems shown of those that a run answers better, and of those that it answers worse."""
UNEQUAL = ("name", "description", "output_dir")
"""Settings that always differ, or say nothing about the result."""


@dataclass(frozen=True)
class Changed:
    """A problem and the shares of its samples that are right."""

    prompt: str
    answer: str
    share: float
    other: float


@dataclass(frozen=True)
class Pair:
    """An evaluation of each run. `rows` have the cells of the other run, then this; the change is from it.

    `unpaired` says why the change has no interval, and is "" where it has.
    """

    stage: str
    other: str
    rows: list[Row]
    moved: str
    unpaired: str
    better: list[Changed]
    worse: list[Changed]


def names(run: Run, other: Run) -> tuple[str, str]:
    """What the runs are called: their names, or their folders where both have the same."""
    if run.name != other.name:
        return run.name, other.name
    folders = str(run.path), str(other.path)
    return folders if folders[0] != folders[1] else (f"{folders[0]} (1)", f"{folders[1]} (2)")


def count(run: Run) -> int:
    """All rollouts that a run has written."""
    return sum(count_rollouts(stage) for stage in run.stages)


def pairs(run: Run, other: Run) -> list[Pair]:
    """The evaluations that both runs have: those of the same stage, or else one after the other."""
    mine, theirs = (list(each.summary.get("evaluations") or []) for each in (run, other))
    by_stage = {entry["stage"]: entry for entry in theirs}
    if {entry["stage"] for entry in mine} <= by_stage.keys():
        matched = [(entry, by_stage[entry["stage"]]) for entry in mine]
    else:
        matched = list(zip(mine, theirs, strict=False))
    return [_pair(run, other, own, against) for own, against in matched]


def _pair(run: Run, other: Run, own: Mapping[str, Any], against: Mapping[str, Any]) -> Pair:
    columns = [
        {name: to_estimate(value) for name, value in entry["metrics"].items()} for entry in (against, own)
    ]
    metrics = [name for name in columns[1] if name in columns[0]]
    stages = other.stage(against["stage"]), run.stage(own["stage"])
    problems = [evaluation_problems(stage) if stage is not None else {} for stage in stages]
    texts = [_texts(stage) if stage is not None else {} for stage in stages]
    unpaired = _unpaired(texts[0], texts[1])
    compared: dict[str, Comparison] = {}
    if not unpaired:
        confidence = next((e.confidence for column in columns for e in column.values() if e), 0.95)
        asked = [name for name in metrics if is_of_samples(name)]
        compared = compare(problems[0], problems[1], asked, confidence)
    main = next((name for name in metrics if name in compared and name != "mean_length"), None)
    changed = [] if unpaired or main is None else _changed(main, problems[0], problems[1], texts[1])
    return Pair(
        stage=own["stage"],
        other=against["stage"],
        rows=[metric_row(name, [column.get(name) for column in columns], 0, 1, compared) for name in metrics],
        moved=moved(compared.get(main) if main else None, f"in {names(run, other)[1]}"),
        unpaired=unpaired,
        better=[entry for entry in changed if entry.share > entry.other][:CHANGED_SHOWN],
        worse=[entry for entry in reversed(changed) if entry.share < entry.other][:CHANGED_SHOWN],
    )


def _texts(stage: Stage) -> dict[str, tuple[str, str]]:
    """Prompt and answer of an evaluation's problems by id."""
    if stage.samples is None:
        return {}
    rows = read_tables([stage.samples], ("example_id", "prompt", "answer")).to_pylist()
    return {row["example_id"]: (row["prompt"], str(row["answer"])) for row in rows}


def _unpaired(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Why two evaluations cannot be paired problem by problem; "" where they can.

    Ids alone do not make problems the same: two datasets may both count from 0.
    """
    if not first or not second:
        return "the rollouts of an evaluation are not in its run folder"
    if first.keys() != second.keys():
        return "the evaluations are of different problems"
    if any(first[name][1] != second[name][1] for name in first):
        return "problems of the same id have different answers"
    return ""


def _changed(
    metric: str,
    before: Mapping[str, Problem],
    after: Mapping[str, Problem],
    texts: Mapping[str, tuple[str, str]],
) -> list[Changed]:
    """The problems whose value of a metric differs, the largest gains first."""
    ids = list(before)
    values = [problem_values(metric, [problems[name] for name in ids]) for problems in (before, after)]
    order = np.argsort(-(values[1] - values[0]), kind="stable")
    return [
        Changed(shortened(texts[ids[i]][0]), texts[ids[i]][1], float(values[1][i]), float(values[0][i]))
        for i in order
        if np.isfinite(values[1][i] - values[0][i]) and values[1][i] != values[0][i]
    ]


def different_settings(run: Run, other: Run) -> list[tuple[str, str, str]]:
    """The recipe's keys whose values differ: key, value in this run, value in the other."""
    mine, theirs = (dict(_flat(each.recipe)) for each in (run, other))
    keys = dict.fromkeys([*mine, *theirs])
    missing = "not there"
    return [
        (key, mine.get(key, missing), theirs.get(key, missing))
        for key in keys
        if key not in UNEQUAL and mine.get(key, missing) != theirs.get(key, missing)
    ]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of nested settings with their paths."""
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from _flat(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(part, dict | list) for part in value):
        for index, part in enumerate(value):
            yield from _flat(part, f"{key}[{index}]")
    else:
        yield key, str(value)


def shared_curves(run: Run, other: Run) -> list[tuple[str, list[dict[str, Any]]]]:
    """Charts of the training stages that both runs have, with a line for each run.

    Stages are matched by kind, in order. A chart of several lines becomes several charts.
    """
    title = names(run, other)
    theirs: dict[str, list[Stage]] = {}
    for stage in other.stages:
        theirs.setdefault(stage.kind, []).append(stage)
    found = []
    for stage in run.stages:
        if not stage.metrics or not theirs.get(stage.kind):
            continue
        against = theirs[stage.kind].pop(0)
        lines = dict(_lines(against))
        groups: dict[str, list[dict[str, Any]]] = {}
        for (group, name), (chart, line) in _lines(stage):
            if (group, name) in lines:
                both = [{**line, "label": title[0]}, {**lines[group, name][1], "label": title[1]}]
                ends = "; ".join(f"{part['label']} ends at {_last(part)}" for part in both)
                drawn = {**chart, "title": name, "lines": both, "summary": f"{name}. {ends}."}
                groups.setdefault(group, []).append(drawn)
        if groups:
            stages = stage.name if stage.name == against.name else f"{stage.name} and {against.name}"
            found.append((stages, [{"title": group, "charts": charts} for group, charts in groups.items()]))
    return found


def _lines(stage: Stage) -> Iterator[tuple[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]]]:
    """The lines of a stage's charts by group and title, with the chart each is of."""
    for group in stage_charts(stage):
        for chart in group["charts"]:
            for line in chart["lines"]:
                several = len(chart["lines"]) > 1
                name = f"{chart['title']}: {line['label']}" if several else chart["title"]
                yield (group["title"], name), (chart, line)


def _last(line: Mapping[str, Any]) -> str:
    known = [value for value in line["raw"] if value is not None]
    return f"{known[-1]:.4g}" if known else "no number"
