"""The outer loop of SOAR (arXiv:2601.18778, algorithm 1).

One outer step: the teacher proposes g sets of n questions; on each, r students train from the baseline; a
set's reward is the mean gain of its students on hard problems; when gains have been large enough for a while,
the best set's median student becomes the baseline; the teacher takes one RLOO step with the sets as its
group.

With several processes each trains other students, and the first has the teacher.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from posttrain.recipe.soar_schema import SoarStage
from posttrain.rollout.types import derive_seed
from posttrain.soar.gains import (
    grounded_rewards,
    learnability,
    set_advantages,
    set_rewards,
)
from posttrain.soar.learner import Learner
from posttrain.soar.proposals import Question, digest, partition, unique_share
from posttrain.soar.snapshots import References, Snapshot
from posttrain.soar.state import Job, Journal, Result, SoarState
from posttrain.soar.student import Asked, Spent, Students
from posttrain.soar.teacher import Proposals, Proposer, spread
from posttrain.training.advantages import Floats
from posttrain.training.ranks import on_first_rank

BASELINE = -1


@dataclass(frozen=True)
class OuterRecord:
    """What an outer step leaves for the run folder. `rewards` are R_k, None where the step was skipped."""

    step: int
    proposals: Proposals
    advantages: list[float]
    rewards: list[float] | None
    metrics: dict[str, float]


class OuterLoop:
    """Teacher, students and promotion, from one outer step to the next."""

    def __init__(
        self,
        stage: SoarStage,
        *,
        state: SoarState,
        proposer: Proposer,
        students: Students,
        learner: Learner,
        references: References | None,
        hard: Sequence[Asked],
        ask: Callable[[str, Question], Asked],
        journal: Journal,
        seed: int,
        rank: int = 0,
        world: int = 1,
        say: Callable[[str], None] = print,
        check: Callable[[], None] = lambda: None,
    ):
        """Its parts.

        Args:
            stage: the recipe's section.
            state: where to begin; `state.baseline` of a new run is the base model.
            proposer: samples with whatever weights are in the model.
            students: trains and measures.
            learner: the teacher's optimiser, used on the first process.
            references: for the teacher's KL term.
            hard: the hard problems.
            ask: makes a problem for students of an id and a question.
            journal: where results of students are kept.
            seed: the run's.
            rank: this process.
            world: number of processes.
            say: takes lines for the terminal.
            check: called between jobs; may raise to end the run.
        """
        self.stage = stage
        self.state = state
        self.proposer = proposer
        self.students = students
        self.learner = learner
        self.references = references
        self.hard = hard
        self.ask = ask
        self.journal = journal
        self.seed = seed
        self.rank = rank
        self.world = world
        self.say = say
        self.check = check
        self.base = state.baseline
        self.known = on_first_rank(journal.read)
        self.trained: dict[str, Snapshot] = {}

    @property
    def bench(self) -> Any:
        """The shared model and its engine."""
        return self.students.bench

    def finished(self) -> bool:
        """Whether all outer steps are done or a budget is used up."""
        stage, state = self.stage, self.state
        return (
            state.step >= stage.steps
            or (stage.max_student_updates is not None and state.spent.updates >= stage.max_student_updates)
            or (stage.max_sampled_tokens is not None and state.sampled_tokens >= stage.max_sampled_tokens)
        )

    def step(self) -> OuterRecord:
        """One outer step. All processes call it together."""
        stage, state, seconds = self.stage, self.state, _Seconds()
        step, sampled, trained = state.step, state.sampled_tokens, state.spent.trained
        self.trained = {}
        with seconds("propose"):
            proposals = on_first_rank(lambda: self._propose(step))
        state.teacher_tokens += proposals.tokens
        metrics = {**proposals.metrics(), "teacher/unique": unique_share(proposals.questions)}
        rewards: Floats | None = None
        advantages: list[float] = []
        if len(proposals.questions) < stage.datasets * stage.questions:
            self.say(
                f"   outer step {step + 1}: only {len(proposals.questions)} of "
                f"{stage.datasets * stage.questions} proposals could be read; the step is skipped"
            )
        else:
            sets = partition(proposals.questions, stage.datasets, stage.questions)
            with seconds("students"):
                gains, measured = self._gains(step, sets)
            rewards = set_rewards(gains)
            metrics |= measured | self._promote(step, sets, gains)
            with seconds("update"):
                advantages = spread(set_advantages(rewards), stage.questions)
                metrics |= on_first_rank(lambda: self._teach(proposals, advantages))
            state.teacher_updates += 1
        state.step += 1
        metrics |= seconds.metrics() | {
            "tokens/sampled": float(state.sampled_tokens - sampled),
            "tokens/teacher": float(proposals.tokens),
            "tokens/trained": metrics.get("tokens/trained", 0.0) + state.spent.trained - trained,
            "student/updates": float(state.spent.updates),
            "student/completions": float(state.spent.completions),
            "promotions": float(state.promotions.count),
            "promotion_questions": float(sum(len(questions) for _, questions in state.kept)),
        }
        shown = None if rewards is None else rewards.tolist()
        return OuterRecord(step + 1, proposals, advantages, shown, metrics)

    def hard_sample(self, step: int) -> list[Asked]:
        """The hard problems of an outer step, without replacement; the same for the baseline and all
        students."""
        rng = np.random.default_rng(derive_seed(self.seed, "reward_questions", step))
        count = min(self.stage.reward_questions, len(self.hard))
        return [self.hard[index] for index in rng.choice(len(self.hard), size=count, replace=False)]

    # --- the teacher, on the first process -------------------------------------------------------------

    def _propose(self, step: int) -> Proposals:
        self.bench.put(self.state.teacher)
        needed = self.stage.datasets * self.stage.questions
        return self.proposer.propose(needed, derive_seed(self.seed, "teacher", step), str(step))

    def _teach(self, proposals: Proposals, advantages: Sequence[float]) -> dict[str, float]:
        self.bench.put(self.state.teacher)
        reference = None
        if self.stage.teacher.loss.kl and self.references is not None:
            reference = self.references.at(self.base)
        self.learner.move(self.learner.forward.device)
        found = self.learner.update(proposals.accepted, advantages, reference)
        self.learner.move("cpu")
        self.bench.changed()
        self.state.teacher = self.bench.shared.capture()
        return {f"teacher/{key}": value for key, value in found.items() if key != "tokens/trained"} | {
            "tokens/trained": found["tokens/trained"]
        }

    # --- the students, on all processes ----------------------------------------------------------------

    def _gains(self, step: int, sets: Sequence[Sequence[Question]]) -> tuple[Floats, dict[str, float]]:
        """R[k, j] of a step, and what is worth logging about it."""
        stage, state = self.stage, self.state
        start, updates = state.baseline.checksum, stage.student.steps_after(state.promotions.count)
        grounded = stage.reward == "grounded"
        each = range(stage.students if grounded else 1)
        jobs = [
            Job(step, k, j, digest(sets[k]), start, updates if grounded else 0)
            for k in range(len(sets))
            for j in each
        ]
        if grounded:
            jobs = [Job(step, BASELINE, 0, "", start, 0), *jobs]
        results = self._results(jobs, sets)
        for result in results:
            state.spent.add(result.spent)
        values = [result.value for result in results]
        metrics = {"student/steps": float(updates)} if grounded else {}
        baseline = values.pop(0) if grounded else 0.0
        gains = grounded_rewards(np.reshape(values, (len(sets), len(each))).tolist(), baseline)
        if grounded:
            metrics["baseline/accuracy"] = baseline
        return gains, metrics | {
            "reward": float(gains.mean()),
            "reward/best_set": float(set_rewards(gains).max()),
            "reward/best_student": float(gains.max()),
        }

    def _results(self, jobs: Sequence[Job], sets: Sequence[Sequence[Question]]) -> list[Result]:
        """Results of jobs: those that are known, and the others worked off by all processes."""
        missing = [job for job in jobs if job.key not in self.known]
        done: dict[str, Result] = {}
        for job in missing[self.rank :: self.world]:
            self.check()
            done[job.key] = self._work(job, sets)
            self.journal.add(job, done[job.key])
        for part in gather_object([done]):
            self.known |= part
        return [self.known[job.key] for job in jobs]

    def _work(self, job: Job, sets: Sequence[Sequence[Question]]) -> Result:
        """Do a job. A trained student's weights are kept until the end of the outer step."""
        stage, students, spent = self.stage, self.students, Spent()
        seed = derive_seed(self.seed, "student", job.step, job.set, job.student)
        if stage.reward == "learnability":
            self.bench.put(self.state.baseline)
            hits, cost = students.hits(self._asked(job, sets), stage.learnability_samples, seed)
            return Result(float(learnability(hits, stage.learnability_samples).mean()), 0, cost)
        if job.set == BASELINE:
            self.bench.put(self.state.baseline)
        else:
            spent.add(students.train(self.state.baseline, self._asked(job, sets), job.updates, seed))
            self.trained[job.key] = self.bench.shared.capture()
        hard = self.hard_sample(job.step)
        accuracy, cost = students.accuracy(
            hard, stage.reward_samples, derive_seed(self.seed, "gain", job.step)
        )
        spent.add(cost)
        return Result(accuracy, self.bench.shared.checksum(), spent)

    def _asked(self, job: Job, sets: Sequence[Sequence[Question]]) -> list[Asked]:
        return [
            self.ask(f"{job.step}.{job.set}.{index}", question)
            for index, question in enumerate(sets[job.set])
        ]

    # --- promotion -------------------------------------------------------------------------------------

    def _promote(self, step: int, sets: Sequence[Sequence[Question]], gains: Floats) -> dict[str, float]:
        """Take the step's rewards to the moving average, and make the median student of the best set the
        baseline if it is above the threshold.
        """
        promotions = self.state.promotions
        updates = self.stage.student.steps_after(promotions.count)
        chosen = promotions.add(gains)
        promoted = 0.0
        if chosen is not None:
            best, student = chosen
            job = Job(step, best, student, digest(sets[best]), self.state.baseline.checksum, updates)
            self.state.baseline = self._weights(job, sets)
            self.state.kept.append((step + 1, list(sets[best])))
            promoted = 1.0
            self.say(f"   outer step {step + 1}: student {student + 1} of set {best + 1} is the new baseline")
        return {"reward/moving_average": promotions.latest, "promotion": promoted}

    def _weights(self, job: Job, sets: Sequence[Sequence[Question]]) -> Snapshot:
        """A student's weights, on every process. One that was trained before a restart is trained again."""
        owners = gather_object([job.key in self.trained])
        owner = owners.index(True) if True in owners else 0
        if self.rank == owner and job.key not in self.trained:
            seed = derive_seed(self.seed, "student", job.step, job.set, job.student)
            self.students.train(self.state.baseline, self._asked(job, sets), job.updates, seed)
            again = self.trained[job.key] = self.bench.shared.capture()
            if again.checksum != self.known[job.key].checksum:
                self.say(
                    "   the promoted student was trained again after a restart, and its weights differ in "
                    "some bits from before: this machine does not compute the same twice"
                )
        if self.world == 1:
            return self.trained[job.key]
        return broadcast(self.trained.get(job.key), self.state.baseline, owner)


def broadcast(snapshot: Snapshot | None, like: Snapshot, owner: int) -> Snapshot:
    """A snapshot that one process has, on all of them; `like` has its names and shapes."""
    device = PartialState().device
    tensors = {}
    for name, template in like.tensors.items():
        tensor = (snapshot.tensors[name] if snapshot is not None else template).to(device, copy=True)
        torch.distributed.broadcast(tensor, owner)
        tensors[name] = tensor.cpu()
    return Snapshot.of(tensors)


class _Seconds:
    """Time by phase."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}
        self._phase, self._start = "", 0.0

    def __call__(self, phase: str) -> _Seconds:
        self._phase, self._start = phase, time.monotonic()
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        self._spent[self._phase] = time.monotonic() - self._start

    def metrics(self) -> dict[str, float]:
        """`seconds/PHASE`."""
        return {f"seconds/{phase}": seconds for phase, seconds in self._spent.items()}
