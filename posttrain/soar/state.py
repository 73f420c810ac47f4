"""What a SOAR run must not lose: checkpoints of the outer loop, and the results of every finished student.

A checkpoint holds what an outer step starts from. The students in between need none: a student's whole run
follows from the baseline, its set and its seed, so one line with its result is enough, and a run that was
killed among them asks for their results again. Only a promoted student's weights are needed; where they were
lost, that one student is trained again, to the same bits on a CPU.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from posttrain.errors import TrainingError
from posttrain.soar.gains import Promotions
from posttrain.soar.learner import Learner
from posttrain.soar.proposals import Question
from posttrain.soar.snapshots import Snapshot
from posttrain.soar.student import Spent
from posttrain.training.manifest import STAGING, checkpoint_name, publish, remove_older, write_manifest
from posttrain.training.record import free_space


@dataclass
class SoarState:
    """Where the outer loop is. `step` outer steps are done; `kept` are the sets that led to a promotion."""

    teacher: Snapshot
    baseline: Snapshot
    promotions: Promotions
    step: int = 0
    kept: list[tuple[int, list[Question]]] = field(default_factory=list)
    spent: Spent = field(default_factory=Spent)
    """By the students, and by measuring them."""
    teacher_tokens: int = 0
    teacher_updates: int = 0

    @property
    def sampled_tokens(self) -> int:
        """By teacher and students."""
        return self.spent.sampled + self.teacher_tokens


def save_state(
    folder: Path, state: SoarState, learner: Learner, *, stage: str, seconds: float, keep: int
) -> None:
    """Write a checkpoint beside and rename it (see `posttrain.training.manifest`).

    Raises:
        TrainingError: it could not be written; the checkpoints before it are untouched.
    """
    staged = folder / STAGING / "checkpoint"
    content = {
        "step": state.step,
        "recent": state.promotions.recent,
        "promotions": state.promotions.count,
        "kept": [[step, [[q.question, q.answer] for q in questions]] for step, questions in state.kept],
        "spent": asdict(state.spent),
        "teacher_tokens": state.teacher_tokens,
        "teacher_updates": state.teacher_updates,
        "seconds": seconds,
    }
    try:
        shutil.rmtree(folder / STAGING, ignore_errors=True)
        staged.mkdir(parents=True)
        (staged / "state.json").write_text(json.dumps(content, ensure_ascii=False) + "\n")
        save_file(state.teacher.tensors, staged / "teacher.safetensors")
        save_file(state.baseline.tensors, staged / "baseline.safetensors")
        torch.save(learner.optimizer.state_dict(), staged / "optimizer.pt")
        write_manifest(staged, stage=stage, step=state.step, processes=1)
        publish(staged, folder / checkpoint_name(state.step))
        remove_older(folder, state.step, keep)
    except (OSError, RuntimeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error).partition("\n")[0]
        raise TrainingError(
            f"a checkpoint could not be written to {folder}: {reason} ({free_space(folder)}); "
            f"the checkpoints before it are untouched"
        ) from error


def load_state(checkpoint: Path, state: SoarState, learner: Learner) -> float:
    """Bring a new state and the teacher's optimiser to a checkpoint; the seconds that it took to get
    there."""
    content: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    state.step = content["step"]
    state.promotions.recent = content["recent"]
    state.promotions.count = content["promotions"]
    state.kept = [
        (step, [Question(question, answer) for question, answer in questions])
        for step, questions in content["kept"]
    ]
    state.spent = Spent(**content["spent"])
    state.teacher_tokens = content["teacher_tokens"]
    state.teacher_updates = content["teacher_updates"]
    state.teacher = Snapshot.of(load_file(checkpoint / "teacher.safetensors"))
    state.baseline = Snapshot.of(load_file(checkpoint / "baseline.safetensors"))
    learner.advance(state.teacher_updates)
    learner.optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", weights_only=True))
    return float(content["seconds"])


@dataclass(frozen=True)
class Job:
    """A student (`set`, `student`) of an outer step, or with `set` -1 the baseline's accuracy."""

    step: int
    set: int
    student: int
    digest: str
    """Of the set's questions."""
    start: int
    """Checksum of the weights that it starts from."""
    updates: int

    @property
    def key(self) -> str:
        """Under which its result is found."""
        return f"{self.step}/{self.set}/{self.student}/{self.digest}/{self.start:x}/{self.updates}"


@dataclass(frozen=True)
class Result:
    """What came of a job: accuracy (or intrinsic reward), checksum of the student's weights, and cost."""

    value: float
    checksum: int
    spent: Spent


class Journal:
    """Results of jobs as JSON lines, forced to disk at once; every process appends to a file of its own."""

    def __init__(self, folder: Path, rank: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._path = folder / f"students-{rank}.jsonl"

    def read(self) -> dict[str, Result]:
        """All results of all processes; a last line that a kill cut short is left out."""
        found = {}
        for path in sorted(self._folder.glob("students-*.jsonl")):
            for text in path.read_text().splitlines():
                try:
                    line = json.loads(text)
                    found[line["job"]] = Result(line["value"], line["checksum"], Spent(**line["spent"]))
                except (ValueError, KeyError, TypeError):
                    continue
        return found

    def add(self, job: Job, result: Result) -> None:
        """Write down what came of a job."""
        with self._path.open("a") as file:
            # A kill may have left half of a line.
            start = "\n" if file.tell() else ""
            file.write(start + json.dumps({"job": job.key, **asdict(result)}))
            file.flush()
            os.fsync(file.fileno())
