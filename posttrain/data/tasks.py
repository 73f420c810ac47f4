"""Built-in procedural tasks: problems with answers and demonstrations, made on the spot.

A task is a function `(rng, **args) -> Problem`; `make_task` draws from it. The splits of a task never share
a problem, whatever the seeds and arguments: a problem's split is decided by a hash of its text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np

from posttrain.data.assessments import assessing
from posttrain.data.calculator import calculator
from posttrain.data.error_analysis import error_analysis, error_replay
from posttrain.data.problem import Problem
from posttrain.data.search import search
from posttrain.data.string_machine import string_machine
from posttrain.errors import DataError
from posttrain.rollout.types import Example, derive_seed

SPLITS = {"test": range(0, 2), "validation": range(2, 3), "train": range(3, 10)}
"""Share of the problem space in tenths."""

MAX_DRAWS_PER_ROW = 200


def _between(low: int, high: int, rng: np.random.Generator) -> int:
    return int(rng.integers(low, high + 1))


def arithmetic(
    rng: np.random.Generator,
    *,
    min_terms: int = 4,
    max_terms: int = 4,
    max_term: int = 9,
    min_first: int = 1,
    max_first: int | None = None,
    slips: float = 0.0,
    noise: float = 0.0,
    restate: float = 0.0,
) -> Problem:
    """A chain of additions and subtractions, `3-8+7=`, solved one step at a time.

    The first number is between `min_first` and `max_first` (None: `max_term`), the others are between 1 and
    `max_term`.

    The demonstrator may be fallible: with probability `slips` it keeps only the last digit of a step's
    result (forgets the sign or the tens), and with probability `noise` it is off by one. It then goes on
    from its wrong value; `answer` is always the right one. With probability `restate` it writes the last step
    down twice, so that right solutions differ in length. Column `terms` counts the numbers.
    """
    terms = _between(min_terms, max_terms, rng)
    question = str(_between(min_first, max_first or max_term, rng))
    total = written = int(question)
    steps = []
    for _ in range(terms - 1):
        term = _between(1, max_term, rng) * (1 if rng.random() < 0.5 else -1)
        question += f"{term:+d}"
        total += term
        value = written + term
        if rng.random() < slips:
            value = abs(value) % 10
        if rng.random() < noise:
            value += 1 if rng.random() < 0.5 else -1
        steps.append(f"{written}{term:+d}={value}")
        written = value
    if restate and rng.random() < restate:
        steps.append(steps[-1])
    demonstration = f"<think>{';'.join(steps)}</think>{written}"
    return Problem(f"{question}=", str(total), demonstration, columns={"terms": str(terms)})


def largest(rng: np.random.Generator, *, numbers: int = 4, max_value: int = 99) -> Problem:
    """The largest of some numbers, found by going through them."""
    values = [_between(0, max_value, rng) for _ in range(numbers)]
    best = values[0]
    steps = []
    for value in values[1:]:
        best = max(best, value)
        steps.append(f"{value}:{best}")
    question = f"max {','.join(map(str, values))}"
    return Problem(question, str(best), f"<think>{';'.join(steps)}</think>{best}")


def counting(rng: np.random.Generator, *, length: int = 10, letters: str = "abc") -> Problem:
    """How often a letter occurs in a word, counted along the word."""
    word = "".join(letters[_between(0, len(letters) - 1, rng)] for _ in range(length))
    letter = letters[_between(0, len(letters) - 1, rng)]
    count = 0
    steps = ""
    for character in word:
        count += character == letter
        steps += f"{character}{count}"
    return Problem(f"count {letter} in {word}", str(count), f"<think>{steps}</think>{count}")


def reversing(rng: np.random.Generator, *, max_length: int = 8) -> Problem:
    """A word written backwards."""
    word = "".join(chr(ord("a") + _between(0, 25, rng)) for _ in range(_between(2, max_length, rng)))
    return Problem(f"reverse {word}", word[::-1], f"<think>{' '.join(word)}</think>{word[::-1]}")


def addition(rng: np.random.Generator, *, max_digits: int = 3) -> Problem:
    """Addition of two numbers in columns, from the right, with the carry written down."""
    a, b = (_between(0, 10 ** _between(1, max_digits, rng) - 1, rng) for _ in range(2))
    steps, carry = [], 0
    for column in range(max(len(str(a)), len(str(b)))):
        left, right = a // 10**column % 10, b // 10**column % 10
        total = left + right + carry
        steps.append(f"{left}+{right}+{carry}={total}")
        carry = total // 10
    return Problem(f"add {a} {b}", str(a + b), f"<think>{';'.join(steps)}</think>{a + b}")


TASKS: dict[str, Callable[..., Problem]] = {
    "arithmetic": arithmetic,
    "largest": largest,
    "counting": counting,
    "reversing": reversing,
    "addition": addition,
    "calculator": calculator,
    "search": search,
    "string_machine": string_machine,
    "error_analysis": error_analysis,
    "error_replay": error_replay,
}
BASIC = (arithmetic, largest, counting, reversing, addition)
TASKS |= {f"meta_{task.__name__}": assessing(task) for task in BASIC}


def split_of(question: str) -> str:
    """The split a problem belongs to, from its text alone."""
    tenth = derive_seed("split", question) % 10
    return next(name for name, tenths in SPLITS.items() if tenth in tenths)


def make_task(name: str, *, size: int, seed: int, split: str, **args: object) -> list[Example]:
    """`size` different problems of one split; demonstrations are in `columns["completion"]`.

    Raises:
        DataError: unknown task, split or argument, or the split has fewer than `size` problems.
    """
    if name not in TASKS:
        raise DataError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    if split not in SPLITS:
        raise DataError(f"task {name!r} has no split {split!r}; known: {', '.join(SPLITS)}")
    known = [parameter for parameter in inspect.signature(TASKS[name]).parameters if parameter != "rng"]
    unknown = [argument for argument in args if argument not in known]
    if unknown:
        raise DataError(f"task {name!r} has no argument {unknown[0]!r}; known: {', '.join(known)}")

    rng = np.random.default_rng(derive_seed(name, split, seed))
    examples: dict[str, Example] = {}
    draws_since_new = 0
    while len(examples) < size:
        problem = TASKS[name](rng, **args)
        draws_since_new += 1
        row = problem.question + problem.variant
        if split_of(problem.question) == split and row not in examples:
            draws_since_new = 0
            examples[row] = Example(
                id=f"{name}-{derive_seed(row):016x}",
                prompt=problem.prompt or problem.question + problem.given,
                answer=problem.answer,
                columns={"completion": problem.demonstration, **problem.columns},
            )
        elif draws_since_new > MAX_DRAWS_PER_ROW:
            raise DataError(
                f"task {name!r} with these arguments has only about {len(examples)} problems "
                f"in split {split!r}; size asks for {size}"
            )
    return list(examples.values())
