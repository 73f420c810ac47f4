"""SOAR where everything can be computed: students with one number per topic, a teacher that is a table.

A student goes on at each step of a problem with the chance c = σ(θ of the topic), so that it solves one of k
steps with c^k, and else guesses right with 0.002. The hard problems have eight steps of one topic. The
teacher is a softmax over 3 topics × 8 lengths, and its answers to longer problems are mostly wrong. The outer
loop is that of `posttrain.soar`: rewards, advantages and promotion are its functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from reproductions.common import claim

from posttrain.soar.gains import Promotions, grounded_rewards, learnability, set_advantages, set_rewards
from posttrain.training.advantages import Floats

SEEDS = (0, 1, 2, 3, 4, 5)
TOPICS, LENGTHS = 3, 8
CELLS = TOPICS * LENGTHS
RIGHT = np.array([0.9, 0.7, 0.5, 0.5, 0.3, 0.1, 0.1, 0.1])
"""Chance that the teacher's answer is right, by length."""
HARD_TOPIC, HARD_LENGTH = 1, 8
GUESS = 0.002
START = float(np.log(0.2 / 0.8))
SETS, QUESTIONS, STUDENTS, HARD = 4, 16, 4, 64
OUTER_STEPS, HARD_ONLY_STEPS, FRESH_STEPS = 60, 400, 32
DRAWS = 20
"""Sets of 64 questions drawn from a teacher, each with a fresh student: one draw is mostly luck."""
TEACHER_RATE, STUDENT_RATE = 4.0 / SETS, 0.6

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Questions:
    """Problems of several sets: topics, lengths, and whether the teacher's answer is right; all [sets, n]."""

    topic: Ints
    length: Ints
    right: NDArray[np.bool_]

    def __getitem__(self, chosen: Any) -> Questions:
        return Questions(self.topic[chosen], self.length[chosen], self.right[chosen])


def solve_rate(theta: Floats) -> Floats:
    """Chance to solve a hard problem, for students [..., topics]."""
    solved = (1 / (1 + np.exp(-theta[..., HARD_TOPIC]))) ** HARD_LENGTH
    return solved + (1 - solved) * GUESS


def train(
    theta: Floats, questions: Questions, steps: int, rng: np.random.Generator, batch: int = 8, group: int = 32
) -> Floats:
    """RLOO by plain gradient ascent for students [runs, topics], each on a set of its own [runs, n]."""
    theta, runs, count = theta.copy(), len(theta), questions.topic.shape[1]
    epochs = -(-steps * batch // count)
    order = np.concatenate(
        [rng.permuted(np.tile(np.arange(count), (runs, 1)), axis=1) for _ in range(epochs)], axis=1
    )
    rows = np.arange(runs)[:, None]
    for step in range(steps):
        asked = questions[rows, order[:, step * batch : (step + 1) * batch]]
        chance = 1 / (1 + np.exp(-theta[rows, asked.topic]))[..., None]
        length = asked.length[..., None]
        went = np.minimum(rng.geometric(1 - chance, size=(runs, batch, group)) - 1, length)
        solved = went == length
        lucky = rng.random((runs, batch, group)) < GUESS
        rewards = ((solved | lucky) & asked.right[..., None]).astype(float)
        advantages = (rewards - rewards.mean(-1, keepdims=True)) * group / (group - 1)
        score = np.where(solved, length * (1 - chance), went * (1 - chance) - chance)
        gradient = np.zeros_like(theta)
        np.add.at(gradient, (rows, asked.topic), (advantages * score).mean(-1))
        theta += STUDENT_RATE * gradient
    return theta


def propose(logits: Floats, sets: int, count: int, rng: np.random.Generator) -> tuple[Ints, Questions]:
    """Cells that the teacher draws, and their problems [sets, count]."""
    cells = rng.choice(CELLS, size=(sets, count), p=softmax(logits))
    length = cells % LENGTHS + 1
    return cells, Questions(cells // LENGTHS, length, rng.random(cells.shape) < RIGHT[length - 1])


def softmax(logits: Floats) -> Floats:
    """Probabilities of the cells."""
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())


def entropy(logits: Floats) -> float:
    """Of the teacher, in nats; ln 24 = 3.18 at the start."""
    chances = softmax(logits)
    return float(-(chances * np.log(chances + 1e-12)).sum())


@dataclass
class Run:
    """Where an outer loop came to."""

    logits: Floats
    theta: Floats
    kept: list[Questions] = field(default_factory=list)
    promoted_at: list[int] = field(default_factory=list)


def soar(seed: int, steps: int, *, intrinsic: bool = False, promote: bool = True) -> Run:
    """The outer loop from the base student and a uniform teacher."""
    rng = np.random.default_rng(seed)
    run = Run(np.zeros(CELLS), np.full(TOPICS, START))
    promotions = Promotions(0.01 if promote else np.inf, 3)
    for step in range(steps):
        cells, sets = propose(run.logits, SETS, QUESTIONS, rng)
        if intrinsic:
            chance = (1 / (1 + np.exp(-run.theta[sets.topic]))) ** sets.length * sets.right
            hits = rng.binomial(32, chance)
            gains = (
                learnability(hits.reshape(-1).tolist(), 32).reshape(SETS, QUESTIONS).mean(1, keepdims=True)
            )
        else:
            inner = min(10 + 5 * promotions.count, 20)
            starts = np.tile(run.theta, (SETS * STUDENTS, 1))
            students = train(starts, sets[np.repeat(np.arange(SETS), STUDENTS)], inner, rng)
            accuracies = rng.binomial(HARD, solve_rate(students)).reshape(SETS, STUDENTS) / HARD
            gains = grounded_rewards(accuracies.tolist(), rng.binomial(HARD, solve_rate(run.theta)) / HARD)
            chosen = promotions.add(gains)
            if chosen is not None:
                run.theta = students.reshape(SETS, STUDENTS, TOPICS)[chosen]
                run.kept.append(sets[chosen[0]])
                run.promoted_at.append(step)
        advantages = set_advantages(set_rewards(gains))
        advantages /= np.abs(advantages).max() + 1e-9  # what Adam would do to their size
        counts = np.stack([np.bincount(row, minlength=CELLS) for row in cells])
        run.logits = run.logits + TEACHER_RATE * (advantages @ (counts / QUESTIONS - softmax(run.logits)))
    return run


def fresh(questions: Questions, seed: int, steps: int) -> float:
    """What base students can do on hard problems after some steps, one on each set [sets, n]; their mean."""
    starts = np.full((len(questions.topic), TOPICS), START)
    return float(solve_rate(train(starts, questions, steps, np.random.default_rng(seed))).mean())


def hard_only(seed: int, steps: int) -> float:
    """What it can do after as many steps on hard problems alone."""
    count = 64
    hard = Questions(
        np.full((1, count), HARD_TOPIC), np.full((1, count), HARD_LENGTH), np.ones((1, count), bool)
    )
    return fresh(hard, seed, steps)


def promotion_questions(run: Run, count: int = 64) -> Questions:
    """The first questions of the sets that led to promotions."""
    return Questions(
        *(
            np.concatenate([getattr(kept, name) for kept in run.kept])[None, :count]
            for name in ("topic", "length", "right")
        )
    )


def measure(seeds: Sequence[int], fast: bool) -> dict[str, Any]:
    """The whole table: a few seconds for each seed."""
    outer = 5 if fast else OUTER_STEPS
    grounded = [soar(seed, outer) for seed in seeds]
    intrinsic = [soar(seed, outer, intrinsic=True) for seed in seeds]
    frozen = [soar(seed, outer, promote=False) for seed in seeds]

    def taught(run: Run, seed: int) -> float:
        questions = propose(run.logits, DRAWS, 64, np.random.default_rng(50 + seed))[1]
        return fresh(questions, seed, FRESH_STEPS)

    def each(value: Callable[[int], float]) -> list[float]:
        return [round(value(seed), 4) for seed in seeds]

    untrained = Run(np.zeros(CELLS), np.full(TOPICS, START))
    kept = [(run, seed) for run, seed in zip(grounded, seeds, strict=True) if run.kept]
    arms: dict[str, Any] = {
        "base": round(float(solve_rate(untrained.theta)), 4),
        "hard only": each(lambda seed: hard_only(seed, HARD_ONLY_STEPS)),
        "soar, promoted student": [round(float(solve_rate(run.theta)), 4) for run in grounded],
        "soar, first promotion": [run.promoted_at[0] if run.promoted_at else None for run in grounded],
        "fresh student, promotion questions": [
            round(fresh(promotion_questions(run), seed, FRESH_STEPS), 4) for run, seed in kept
        ],
        "fresh student, untrained teacher": each(lambda seed: taught(untrained, seed)),
        "fresh student, intrinsic teacher": [
            round(taught(run, seed), 4) for run, seed in zip(intrinsic, seeds, strict=True)
        ],
        "entropy, soar": [round(entropy(run.logits), 3) for run in grounded],
        "entropy, intrinsic": [round(entropy(run.logits), 3) for run in intrinsic],
        "entropy, no promotion": [round(entropy(run.logits), 3) for run in frozen],
    }
    return {"arms": arms, "claims": _claims(arms)}


def _claims(arms: dict[str, Any]) -> list[dict[str, Any]]:
    direct, promoted = arms["hard only"], arms["soar, promoted student"]
    made = [
        claim("hard problems solved, hard-only RL", "< 0.01", direct, max(direct) < 0.01),
        claim(
            "hard problems solved, promoted student",
            "> 0.5 for three of four seeds",
            promoted,
            float(np.mean(np.array(promoted) > 0.5)) >= 0.75,
        ),
    ]
    ours, theirs = arms["fresh student, promotion questions"], arms["fresh student, untrained teacher"]
    if ours:
        ratio = float(np.mean(ours) / np.mean(theirs))
        name = "fresh student after 32 steps, promotion questions / untrained teacher"
        made.append(claim(name, "> 5", [ratio], ratio > 5))
    soar_entropy, own = arms["entropy, soar"], arms["entropy, intrinsic"]
    holds = float(np.mean(soar_entropy)) > 2
    made.append(claim("entropy of the grounded teacher, mean over seeds", "> 2", soar_entropy, holds))
    holds = float(np.mean(own)) < 1
    made.append(claim("entropy of the intrinsic teacher, mean over seeds", "< 1", own, holds))
    luck = arms["fresh student, intrinsic teacher"]
    either = any(value > 0.5 for value in luck) and any(value < 0.1 for value in luck)
    made.append(
        claim(
            "fresh student of the intrinsic teacher: luck of the seed", "some > 0.5, some < 0.1", luck, either
        )
    )
    return made
