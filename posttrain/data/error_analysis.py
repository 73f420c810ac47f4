"""Analyses of arithmetic errors as procedural rows, and problems that are solved with one at hand.

A wrong and a right solution of the same chain of additions part at one step. The analysis says where, why,
and what holds instead, `at 27-18=8;why ones;rule 27-18=9`:

    at      the step of the wrong solution where the two part; `end` where it stopped there
    why     its last digit is wrong (`ones`), its tens, its sign, or it works on a wrong `term`
    rule    what the right solution has there: a fact that other chains can use too

A model that learns both kinds of rows can be asked for meta-experiences and makes use of them, which is what
MEL starts from. Like what the papers' models write, a share of what the rows teach may be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from posttrain.data.experiences import filled
from posttrain.data.problem import Problem
from posttrain.recipe.mel_schema import ExperienceFormat

SHORT = ExperienceFormat(
    analysis="compare {problem}\n-{wrong}\n+{right}",
    replay="{experience}\nsolve {problem}",
    query="recall {problem}",
    sections=["at ", ";why ", ";rule "],
)
"""The format of the rows: short, since the tiny model reads and writes single characters."""
STOPPED = "end"
KINDS = ("ones", "ones", "tens", "sign", "term")
"""What a made-up error may be; a small model's errors are mostly in the last digit."""


def error_analysis(
    rng: np.random.Generator,
    *,
    min_terms: int = 3,
    max_terms: int = 3,
    max_term: int = 9,
    min_first: int = 1,
    max_first: int | None = None,
    noise: float = 0.0,
) -> Problem:
    """The analysis of a wrong and a right solution of a chain; the arguments are those of `arithmetic`.

    With probability `noise` the fact of the rule is wrong.
    """
    numbers = _chain(rng, min_terms, max_terms, max_term, min_first, max_first)
    right = solve(numbers)
    wrong = _wrong(numbers, rng)
    rule = spoilt(_at(right, parting(wrong, right)), rng) if rng.random() < noise else None
    analysis = write_analysis(wrong, right, rule)
    question = _question(numbers)
    values = {"problem": question, "wrong": write_solution(wrong), "right": write_solution(right)}
    prompt = filled(SHORT.analysis, values)
    return Problem(question, analysis, analysis, variant=prompt, prompt=prompt)


def error_replay(
    rng: np.random.Generator,
    *,
    min_terms: int = 3,
    max_terms: int = 3,
    max_term: int = 9,
    min_first: int = 1,
    max_first: int | None = None,
    misled: float = 0.0,
    unrelated: float = 0.0,
) -> Problem:
    """A chain that is solved with the analysis of an error in mind; the arguments are those of `arithmetic`.

    With probability `misled` the fact of the rule is wrong; the demonstrator believes it all the same, and
    goes on from what it says. With probability `unrelated` the analysis is of another chain.
    """
    numbers = _chain(rng, min_terms, max_terms, max_term, min_first, max_first)
    other = _chain(rng, min_terms, max_terms, max_term, min_first, max_first)
    about = other if rng.random() < unrelated else numbers
    right, wrong = solve(about), _wrong(about, rng)
    rule = _at(right, parting(wrong, right))
    if rng.random() < misled:
        rule = spoilt(rule, rng)
    question = _question(numbers)
    values = {"problem": question, "experience": write_analysis(wrong, right, rule)}
    prompt = filled(SHORT.replay, values)
    steps = solve(numbers, rule)
    return Problem(question, str(sum(numbers)), write_solution(steps), variant=prompt, prompt=prompt)


def solve(numbers: Sequence[int], rule: str = "") -> list[str]:
    """The steps of a chain; where `rule` is about one of them, it decides what comes out."""
    total, steps = numbers[0], []
    for term in numbers[1:]:
        step = f"{total}{term:+d}="
        total = int(rule.removeprefix(step)) if rule.startswith(step) else total + term
        steps.append(f"{step}{total}")
    return steps


def write_solution(steps: Sequence[str]) -> str:
    """Steps as a completion."""
    return f"<think>{';'.join(steps)}</think>{steps[-1].partition('=')[2]}"


def read_steps(solution: str) -> list[str]:
    """The steps of a completion, as they were written."""
    thoughts = re.search(r"<think>(.*?)</think>", solution, re.DOTALL)
    return thoughts[1].split(";") if thoughts else []


def parting(wrong: Sequence[str], right: Sequence[str]) -> int:
    """The number of the first step, from 0, at which two solutions differ."""
    same = [a == b for a, b in zip(wrong, right, strict=False)]
    return same.index(False) if False in same else len(same)


def write_analysis(wrong: Sequence[str], right: Sequence[str], rule: str | None = None) -> str:
    """Where and why two solutions part, and the rule: by default the step that the right one has there."""
    number = parting(wrong, right)
    at, instead = _at(wrong, number), _at(right, number)
    where, why, what = SHORT.sections
    return f"{where}{at}{why}{cause(at, instead)}{what}{rule or instead}"


def cause(wrong: str, right: str) -> str:
    """Why a step is wrong: `sign`, `tens` or `ones` of its result, or `term`."""
    before, _, result = wrong.partition("=")
    task, _, truth = right.partition("=")
    if before != task or not re.fullmatch(r"-?\d+", result):
        return "term"
    if int(result) == -int(truth):
        return "sign"
    return "ones" if (int(result) - int(truth)) % 10 else "tens"


def spoilt(step: str, rng: np.random.Generator) -> str:
    """The step with another result."""
    before, _, result = step.partition("=")
    if not result:
        return step
    offsets = [-10, -2, -1, 1, 2, 10]
    return f"{before}={int(result) + offsets[int(rng.integers(len(offsets)))]}"


def _at(steps: Sequence[str], number: int) -> str:
    return steps[number] if number < len(steps) else STOPPED


def _chain(
    rng: np.random.Generator,
    min_terms: int,
    max_terms: int,
    max_term: int,
    min_first: int,
    max_first: int | None,
) -> list[int]:
    first = int(rng.integers(min_first, (max_first or max_term) + 1))
    count = int(rng.integers(min_terms, max_terms + 1)) - 1
    signs = [1 if rng.random() < 0.5 else -1 for _ in range(count)]
    return [first, *(int(rng.integers(1, max_term + 1)) * sign for sign in signs)]


def _question(numbers: Sequence[int]) -> str:
    return f"{numbers[0]}{''.join(f'{term:+d}' for term in numbers[1:])}="


def _wrong(numbers: Sequence[int], rng: np.random.Generator) -> list[str]:
    """Steps with one error, from which the rest goes on without another."""
    number = int(rng.integers(len(numbers) - 1))
    kind = KINDS[int(rng.integers(len(KINDS)))]
    steps = solve(numbers)
    result = int(steps[number].partition("=")[2])
    if kind == "term":
        skipped = number + 1 < len(numbers) - 1 and rng.random() < 0.5
        changed = list(numbers)
        changed[number + 1 : number + 2] = [] if skipped else [-numbers[number + 1]]
        return solve(changed)
    if kind == "sign" and result:
        wrong = -result
    elif kind == "tens":
        wrong = result + (10 if rng.random() < 0.5 else -10)
    else:
        offsets = [-2, -1, -1, 1, 1, 2]
        wrong = result + offsets[int(rng.integers(len(offsets)))]
    return solve(numbers, f"{steps[number].partition('=')[0]}={wrong}")
