"""Finding rollouts in a run folder, by id or by what they are."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import DataError
from posttrain.report.rollouts import read_tables
from posttrain.report.run_folder import Run, Stage

LISTED: tuple[str, ...] = ("step", "rollout_id", "example_id", "group", "role", "reward", "status", "correct")
LISTED += ("finish_reason", "prompt", "completion", "completion_ids")


@dataclass(frozen=True)
class Wanted:
    """Which rollouts to list; what is None or empty says nothing. `status` is how the status begins."""

    stage: str | None = None
    step: int | None = None
    role: str | None = None
    status: str | None = None
    example: str | None = None
    group: str | None = None
    text: str = ""
    low: float | None = None
    high: float | None = None

    def accepts(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is wanted, apart from stage and step."""
        reward = row["reward"]
        return (
            self.role in (None, row["role"])
            and self.example in (None, row["example_id"])
            and self.group in (None, row["group"])
            and (self.status is None or str(row.get("status") or "").startswith(self.status))
            and (self.low is None or (reward is not None and reward >= self.low))
            and (self.high is None or (reward is not None and reward <= self.high))
            and self.text.lower() in f"{row['prompt']}\n{row['completion']}".lower()
        )


@dataclass(frozen=True)
class Found:
    """A rollout or, with `supervised`, a supervised text, as the run folder has it, and its neighbours.

    `forks` are the rollouts that continue it, `learned` the supervised texts that are its completion.
    """

    stage: Stage
    row: dict[str, Any]
    supervised: bool
    forks: list[dict[str, Any]]
    learned: list[dict[str, Any]]


def select(run: Run, wanted: Wanted) -> Iterator[tuple[Stage, dict[str, Any]]]:
    """The rows of the wanted rollouts, file by file, in the order of stages and steps.

    Raises:
        DataError: the run has no such stage, or no rollouts at all.
    """
    for stage in _stages(run, wanted.stage):
        for step, paths in _files(stage):
            if wanted.step in (None, step):
                for row in read_tables(paths, LISTED).to_pylist():
                    if wanted.accepts(row):
                        yield stage, row


def find(run: Run, name: str, stage: str | None = None, step: int | None = None) -> Found:
    """The rollout or supervised text of an id.

    Raises:
        DataError: there is none, or there are several of that id.
    """
    places: list[tuple[Stage, int | None, list[Path], bool]] = []
    known: set[str] = set()
    for part in _stages(run, stage):
        files = [(number, paths, False) for number, paths in _files(part)]
        files += [(number, paths, True) for number, paths in part.supervised.items()]
        for number, paths, supervised in files:
            if step in (None, number):
                ids = read_tables(paths, ("rollout_id",))["rollout_id"].to_pylist()
                known.update(ids)
                places += [(part, number, paths, supervised)] * ids.count(name)
    if not places:
        where = "".join(
            [f" in stage {stage}" if stage else "", f" at step {step}" if step is not None else ""]
        )
        near = difflib.get_close_matches(name, known, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise DataError(
            f"{run.path} has no rollout {name!r}{where}.{hint} posttrain rollouts list {run.path} shows what "
            "there is."
        )
    if len(places) > 1:
        seen = dict.fromkeys(
            f"{part.name}" if number is None else f"{part.name} step {number}"
            for part, number, _, _ in places
        )
        raise DataError(
            f"{run.path} has {len(places)} rollouts {name!r}: in {', '.join(seen)}. --stage and --step say "
            "which."
        )
    part, number, paths, supervised = places[0]
    rows = read_tables(paths).to_pylist()
    row = next(row for row in rows if row["rollout_id"] == name)
    texts = read_tables(part.supervised[number]).to_pylist() if number in part.supervised else []
    return Found(
        part,
        row,
        supervised,
        forks=[other for other in rows if other.get("parent") == name],
        learned=[text for text in texts if not supervised and text["source"] == name],
    )


def _stages(run: Run, name: str | None) -> Sequence[Stage]:
    """The stages with rollouts, or the one of that name."""
    stages = [stage for stage in run.stages if stage.rollouts or stage.samples or stage.supervised]
    if not stages:
        raise DataError(f"{run.path} holds no rollouts.")
    if name is None:
        return stages
    chosen = [stage for stage in stages if stage.name == name]
    if not chosen:
        names = ", ".join(stage.name for stage in stages)
        raise DataError(f"{run.path} has no rollouts of a stage {name!r}; there are those of {names}.")
    return chosen


def _files(stage: Stage) -> list[tuple[int | None, list[Path]]]:
    """A stage's rollout files by step; those of an evaluation have none."""
    evaluated = [(None, [stage.samples])] if stage.samples is not None else []
    return [*evaluated, *stage.rollouts.items()]
