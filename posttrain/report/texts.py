"""Texts that methods leave behind: memories of errors (MEL) and the questions of promoted sets (SOAR)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.report.rollouts import read_tables, shortened
from posttrain.report.run_folder import Run, Stage

MEMORIES_SHOWN = 12
QUESTIONS_SHOWN = 40
STEPS_READ = 24
"""Steps, from the last on, that memories are looked for in."""
COLUMNS = ("step", "rollout_id", "role", "status", "reward", "prompt", "completion", "finish_reason")


@dataclass(frozen=True)
class Memory:
    """An analysis of an error; `replays` are the rewards of solutions with it in the prompt."""

    step: int
    id: str
    text: str
    learned: bool
    replays: list[float | None]

    @property
    def verdict(self) -> str:
        """What became of it."""
        if not self.replays:
            return "learned without a replay" if self.learned else "not replayed"
        values = ", ".join("unscored" if value is None else f"{value:.3g}" for value in self.replays)
        return (
            f"{'learned' if self.learned else 'not learned'}: replay{'s' * (len(self.replays) > 1)} {values}"
        )


@dataclass(frozen=True)
class Promoted:
    """A question of a promoted set."""

    step: int
    question: str
    answer: str


def memories(run: Run) -> list[Memory]:
    """The newest memories of a run, those that were learned first."""
    found: list[Memory] = []
    for stage in run.stages:
        for step in [*stage.rollouts][: -STEPS_READ - 1 : -1]:
            found += _of_step(stage, step)
            if sum(memory.learned for memory in found) >= MEMORIES_SHOWN:
                break
    return sorted(found, key=lambda memory: (not memory.learned, -memory.step))[:MEMORIES_SHOWN]


def _of_step(stage: Stage, step: int) -> list[Memory]:
    rows = read_tables(stage.rollouts[step], COLUMNS).to_pylist()
    replays = [row for row in rows if row["role"] == "replay"]
    return [
        Memory(
            step,
            row["rollout_id"],
            shortened(row["completion"]),
            _was_learned(row, replays),
            [replay["reward"] for replay in _replays_of(row, replays)],
        )
        for row in rows
        if row["role"] == "analysis"
    ]


def _replays_of(row: dict[str, Any], replays: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The solutions that had an analysis in their prompt."""
    text = row["completion"].strip()
    return [replay for replay in replays if text and text in replay["prompt"]]


def _was_learned(row: dict[str, Any], replays: Sequence[dict[str, Any]]) -> bool:
    """Whether the loss has learned the analysis, or a solution that it led to."""
    return any(str(other.get("status")).startswith("trained") for other in [row, *_replays_of(row, replays)])


def promoted(run: Run) -> list[Promoted]:
    """The questions of the sets whose student became the baseline, the first ones of each run."""
    found = []
    for stage in run.stages:
        path = run.path / "data" / stage.name / "rows.parquet"
        if stage.kind == "soar" and path.is_file():
            rows = read_tables([path]).slice(0, QUESTIONS_SHOWN).to_pylist()
            found += [Promoted(row["step"], _text(row["prompt"]), str(row["answer"])) for row in rows]
    return found[:QUESTIONS_SHOWN]


def _text(prompt: Any) -> str:
    return shortened(prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False))
