"""Rollouts of a run: a sample for browsing, and reward and length distributions early and late."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from posttrain.errors import PosttrainError
from posttrain.evaluation.samples import Problem, group_by_problem
from posttrain.report.run_folder import Array, Run, Stage
from posttrain.report.series import rounded
from posttrain.report.tokens import BROKEN, Pieces, pieces_of
from posttrain.report.tree import branches, family_of
from posttrain.rollout.types import derive_seed

STEPS_SHOWN = 12
"""Steps of a policy stage whose rollouts can be browsed, spread evenly from the first to the last."""
PROBLEMS_SHOWN = 24
"""Problems of an evaluation, the same ones in every evaluate stage."""
GROUP_SHOWN = 8
"""Completions shown of one group."""
FAMILY_SHOWN = 24
"""Completions shown of one group and of all that continue them."""
TEXT_SHOWN = 4000
"""Characters of a prompt or completion; longer ones lose their middle."""
TOKENS_SHOWN = 400
"""Tokens of a completion that are shown one by one."""
PAYLOAD = 2_000_000
"""Characters of all browsable rollouts together, which keeps a report well below 3 MB."""
WINDOW = 20
"""At most so many steps' files are read for one distribution."""
BINS = 24
"""Bins of a histogram of many values."""
DISTRIBUTED = ("role", "reward", "completion_ids")
CHOICE = ("rollout_id", "group", "role", "reward", "status", "parent")
"""Columns that say which groups of a step are shown."""


@dataclass(frozen=True)
class Sample:
    """Rollouts chosen for browsing. `prompts` are shared; `written` counts all rollouts of the run.

    `pieces` are texts by token id, empty where the run's tokenizer is not to be had.
    """

    prompts: list[str]
    rows: list[dict[str, Any]]
    written: int
    pieces: dict[str, str]


def read_tables(paths: Sequence[Path], columns: Sequence[str] | None = None) -> pa.Table:
    """Rollout files as one table, with all columns or those of `columns`.

    Raises:
        PosttrainError: a file is not readable parquet.
    """
    tables = []
    for path in paths:
        try:
            tables.append(pq.ParquetFile(path).read(columns=columns))
        except (pa.ArrowInvalid, OSError) as error:
            raise PosttrainError(f"{path} is not a readable rollout file: {error}") from error
    return pa.concat_tables(tables, promote_options="permissive")


def count_rollouts(stage: Stage) -> int:
    """Rollouts the stage wrote, from the files' footers.

    Raises:
        PosttrainError: a file is not readable parquet.
    """
    total = 0
    steps = [path for paths in stage.rollouts.values() for path in paths]
    for path in [*steps, *([stage.samples] if stage.samples else [])]:
        try:
            total += pq.read_metadata(path).num_rows
        except (pa.ArrowInvalid, OSError) as error:
            raise PosttrainError(f"{path} is not a readable rollout file: {error}") from error
    return total


def evaluation_problems(stage: Stage) -> dict[str, Problem]:
    """The problems of an evaluate stage with each sample's outcome; empty where none were written."""
    return {} if stage.samples is None else read_problems(stage.samples)


def read_problems(path: Path) -> dict[str, Problem]:
    """The problems in the samples of an evaluation.

    Raises:
        PosttrainError: the file is not readable parquet.
    """
    table = read_tables([path], ("example_id", "role", "correct", "completion", "completion_ids"))
    lengths = pc.list_value_length(table["completion_ids"])
    return group_by_problem(table.drop_columns("completion_ids").append_column("length", lengths).to_pylist())


def sample_rollouts(run: Run) -> Sample:
    """Choose rollouts for browsing, whole groups where possible, within the report's size.

    When they do not all fit, every stage and step gives up its last groups first.
    """
    files: list[list[list[dict[str, Any]]]] = []
    for stage in run.stages:
        if stage.samples is not None:
            files.append(_choose_problems(stage, stage.samples))
        files += [_choose_groups(stage, step, stage.rollouts[step]) for step in _spread(list(stage.rollouts))]
    kept = _within_budget(files)
    prompts: dict[str, int] = {}
    for row in kept:
        row["p"] = prompts.setdefault(row["p"], len(prompts))
    written = sum(count_rollouts(stage) for stage in run.stages)
    return Sample(list(prompts), kept, written, _spell(kept, pieces_of(run) if kept else None))


def _spell(rows: Sequence[dict[str, Any]], pieces: Pieces | None) -> dict[str, str]:
    """Texts of the tokens in rows. A row with characters of several tokens gets `texts` of its own."""
    if pieces is None:
        return {}
    for row in rows:
        ids = row["perToken"]["ids"]
        if any(BROKEN in pieces.single(token) for token in ids):
            row["perToken"]["texts"] = pieces.of(ids)
    return {str(token): pieces.single(token) for row in rows for token in row["perToken"]["ids"]}


def distributions(stage: Stage) -> list[dict[str, Any]]:
    """Histograms of reward and completion length, early against late steps of a policy stage.

    Early and late are the first and the last tenth of the steps (at most WINDOW files each); a stage of one
    step has no late.
    """
    steps = list(stage.rollouts)
    if not steps:
        return []
    share = min(max(1, len(steps) // 10), WINDOW)
    windows = [steps[:share], steps[-share:]] if len(steps) > 1 else [steps]
    tables = [
        _of_first_role(read_tables([p for step in window for p in stage.rollouts[step]], DISTRIBUTED))
        for window in windows
    ]
    labels = [_steps_in_words(window) for window in windows]
    rewards = [table["reward"].drop_null().to_numpy().astype(float) for table in tables]
    lengths = [pc.list_value_length(table["completion_ids"]).to_numpy().astype(float) for table in tables]
    panels = [
        ("Reward", "Share of scored completions.", rewards, "number"),
        ("Completion length", "Share of completions, by tokens.", lengths, "tokens"),
    ]
    return [
        {"title": title, "about": about, "form": form, "labels": labels, **histogram(parts)}
        for title, about, parts, form in panels
        if all(len(part) for part in parts)
    ]


def _of_first_role(table: pa.Table) -> pa.Table:
    """Without what methods have sampled beside: solutions, or a teacher's proposals."""
    return table.filter(pc.equal(table["role"], table["role"][0]))


def histogram(parts: Sequence[Array]) -> dict[str, Any]:
    """Shares of each part in common bins: one per value when there are few values, else about 24 equal ones.

    Whole numbers get bins of a whole width, so that no bin holds more of them than its neighbours by chance.
    """
    together = np.concatenate(parts)
    distinct = np.unique(together.round(6))
    if len(distinct) <= 12:
        shares = [[float((part.round(6) == value).mean()) for value in distinct] for part in parts]
        edges, discrete = distinct, True
    else:
        low, high, discrete = together.min(), together.max(), False
        edges = np.linspace(low, high, BINS + 1)
        if (distinct == distinct.round()).all():
            width = math.ceil((high - low + 1) / BINS)
            edges = np.arange(low, high + width + 1, width)
        shares = [list(np.histogram(part, edges)[0] / len(part)) for part in parts]
    return {
        "edges": rounded(edges),
        "discrete": discrete,
        "shares": [rounded(np.array(share)) for share in shares],
        "means": [float(f"{part.mean():.5g}") for part in parts],
    }


def _steps_in_words(steps: Sequence[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]}–{steps[-1]}"


def _spread(steps: Sequence[int]) -> list[int]:
    """Up to STEPS_SHOWN of the steps, the first and the last among them."""
    chosen = np.linspace(0, len(steps) - 1, min(len(steps), STEPS_SHOWN)).round().astype(int)
    return [steps[i] for i in chosen]


def _choose_groups(stage: Stage, step: int, paths: Sequence[Path]) -> list[list[dict[str, Any]]]:
    """Of one step: a group whose rewards differ, one whose do not, one with unscored or dropped samples, one
    with forks, and one of every further role."""
    table = read_tables(paths)
    rows = table.select([name for name in CHOICE if name in table.column_names]).to_pylist()
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    order = sorted(groups, key=lambda name: derive_seed(step, name))
    parents = {row.get("parent") for row in rows}
    first_role = rows[0]["role"]

    def is_first(name: str) -> bool:
        return any(row["role"] == first_role for row in groups[name])

    def scores(name: str) -> set[float]:
        return {row["reward"] for row in groups[name] if row["reward"] is not None}

    def has_gap(name: str) -> bool:
        dropped = any(str(row.get("status")).startswith(("dropped", "skipped")) for row in groups[name])
        return (len(scores(name)) > 1 and dropped) or any(row["reward"] is None for row in groups[name])

    tests: tuple[Callable[[str], bool], ...] = (
        lambda name: is_first(name) and len(scores(name)) > 1,
        lambda name: is_first(name) and len(scores(name)) == 1,
        lambda name: is_first(name) and has_gap(name),
        lambda name: any(row["rollout_id"] in parents for row in groups[name]),
    )
    roles = dict.fromkeys(row["role"] for row in rows if row["role"] != first_role and not row.get("parent"))
    found = [next((name for name in order if test(name)), None) for test in tests]
    found += [next(name for name in order if any(row["role"] == r for row in groups[name])) for r in roles]
    chosen = []
    for name in dict.fromkeys(name for name in found if name is not None):
        numbers = family_of(rows, name)
        own = [number for number in numbers if rows[number]["group"] == name][:GROUP_SHOWN]
        forks = [number for number in numbers if rows[number]["group"] != name]
        chosen.append(_rows(stage, table, [*own, *forks][:FAMILY_SHOWN], step))
    return chosen


def _choose_problems(stage: Stage, path: Path) -> list[list[dict[str, Any]]]:
    """Of an evaluate stage: some problems, chosen by their ids alone, with a few samples of each."""
    table = read_tables([path])
    problems: dict[str, list[int]] = {}
    for i, name in enumerate(table["example_id"].to_pylist()):
        problems.setdefault(name, []).append(i)
    chosen = sorted(problems, key=derive_seed)[:PROBLEMS_SHOWN]
    return [_rows(stage, table, problems[name][: GROUP_SHOWN // 2], None) for name in chosen]


def _within_budget(files: list[list[list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """The first group of every file, then the second of every file, and so on until the room is used."""
    room, kept = PAYLOAD, []
    order = [(rank, place) for place, groups in enumerate(files) for rank in range(len(groups))]
    for rank, place in sorted(order):
        group = files[place][rank]
        size = len(json.dumps(group))
        if size <= room:
            room -= size
            kept.append((place, rank))
    return [row for place, rank in sorted(kept) for row in files[place][rank]]


def _rows(stage: Stage, table: pa.Table, indices: list[int], step: int | None) -> list[dict[str, Any]]:
    rows = table.take(indices).to_pylist()
    shown = [browsable(stage.name, step, row) for row in rows]
    for row, branch in zip(shown, branches(rows), strict=True):
        row["family"] = shown[0]["group"]
        row["branch"] = [branch.parent, branch.leaves, branch.starts, branch.ends]
    return shown


def browsable(stage: str, step: int | None, row: dict[str, Any]) -> dict[str, Any]:
    """One rollout as the browser shows it; `step` is None in an evaluation, where nothing is trained on.

    Seeds are strings: JavaScript has no 63-bit integers.
    """
    advantages = {
        name.removeprefix("advantage/"): values
        for name, values in row.items()
        if name.startswith("advantage/") and values
    }
    tokens = {
        "ids": row["completion_ids"][:TOKENS_SHOWN],
        "logprobs": rounded(np.array(row["logprobs"][:TOKENS_SHOWN], float), 3),
        "mask": None if row.get("loss_mask") is None else row["loss_mask"][:TOKENS_SHOWN],
        "advantages": {
            name: rounded(np.array(values[:TOKENS_SHOWN], float), 3)
            for name, values in advantages.items()
            if len(set(values)) > 1
        },
    }
    errors = json.loads(row.get("reward_errors") or "{}")
    versions = json.loads(row.get("reward_versions") or "{}")
    return {
        "stage": stage,
        "step": step,
        "version": row["policy_version"],
        "id": row["rollout_id"],
        "example": row["example_id"],
        "group": row["group"],
        "role": row["role"],
        "index": row["index"],
        "seed": str(row["seed"]),
        "p": shortened(row["prompt"]),
        "completion": shortened(row["completion"]),
        "answer": None if row["answer"] is None else shortened(row["answer"]),
        "reward": _finite(row["reward"]),
        "rewards": {
            name.removeprefix("reward/"): _finite(value)
            for name, value in row.items()
            if name.startswith("reward/") and not _is_foreign(name, value, errors, versions)
        },
        "errors": errors,
        "versions": versions,
        "parent": row.get("parent"),
        "forkedAt": row.get("forked_at"),
        "temperature": row.get("temperature"),
        "maxTokens": row.get("max_tokens"),
        "weights": json.loads(row.get("channel_weights") or "{}"),
        "finish": row["finish_reason"],
        "status": None if step is None else row.get("status"),
        "correct": row.get("correct"),
        "tokens": len(row["completion_ids"]),
        "promptTokens": len(row["prompt_ids"]),
        "advantages": {name: _extent(values) for name, values in advantages.items()},
        "perToken": tokens,
    }


def _is_foreign(name: str, value: float | None, *told: dict[str, str]) -> bool:
    """Whether the column of a reward is there for other rollouts of the step, such as those of a method."""
    return value is None and any(told) and not any(name.removeprefix("reward/") in part for part in told)


def shortened(text: str) -> str:
    """A text that is too long loses its middle, and says how much of it."""
    if len(text) <= TEXT_SHOWN:
        return text
    half = TEXT_SHOWN // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters not shown …]\n{text[-half:]}"


def _finite(value: float | None) -> float | None:
    return None if value is None else rounded(np.array([value]))[0]


def _extent(values: Iterable[float]) -> list[float | None]:
    """Mean, lowest and highest advantage of a completion's tokens."""
    array = np.array(list(values), float)
    return rounded(np.array([array.mean(), array.min(), array.max()]), 4)
