"""Self-predictions as procedural rows: the format of question and answer, without knowledge of the truth.

A model that learns them can be asked for notions, a pass rate and a length, which is what MASA starts from.
What it is taught to say is noise on purpose, and too confident, as the papers' models are.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from posttrain.data.problem import Problem
from posttrain.data.self_predictions import Prediction, write_prediction
from posttrain.recipe.meta_schema import MetaFormat

SHORT = MetaFormat(
    system=None,
    template="assess {problem}",
    notions_key="n",
    pass_rate_key="p",
    length_key="l",
    min_length=1,
)
"""The format of the rows: short, since the tiny model reads and writes single characters."""
LENGTHS = (8, 64)
CONFIDENT = 0.6
"""Share of the rows with a pass rate of 6 to 8 eighths; the others have any."""
SLICE = 4


def assessing(task: Callable[..., Problem]) -> Callable[..., Problem]:
    """The task of assessing the problems of another task; it takes the same arguments, and `solved`.

    Notions are steps of a demonstration of the problem, or as often of another problem. `solved` is the share
    of rows that are the other task's own: a small model that is taught one after the other forgets the first.
    """

    @functools.wraps(task)
    def assess(rng: np.random.Generator, *, solved: float = 0.0, **args: Any) -> Problem:
        problem, other = task(rng, **args), task(rng, **args)
        if rng.random() < solved:
            return problem
        source = problem if rng.random() < 0.5 else other
        steps = [step for step in steps_of(source) if step not in problem.question]
        if not steps:
            return assess(rng, **args)
        count = min(int(rng.integers(1, 3)), len(steps))
        confident = rng.random() < CONFIDENT
        prediction = Prediction(
            notions=tuple(steps[i] for i in sorted(rng.choice(len(steps), count, replace=False))),
            pass_rate=int(rng.integers(6 if confident else 0, 9)),
            length=int(rng.integers(*LENGTHS)),
        )
        answer = write_prediction(prediction, SHORT)
        prompt = SHORT.template.replace("{problem}", problem.question)
        return replace(problem, prompt=prompt, answer=answer, demonstration=answer)

    parameters = (
        inspect.signature(task).parameters | inspect.signature(assess, follow_wrapped=False).parameters
    )
    listed = [parameter for name, parameter in parameters.items() if name != "args"]
    assess.__signature__ = inspect.Signature(listed)  # type: ignore[attr-defined]
    return assess


def steps_of(problem: Problem) -> list[str]:
    """What a demonstration writes down on the way, step by step or in slices, each once."""
    thoughts = re.search(r"<think>(.*)</think>", str(problem.demonstration))
    text = thoughts[1] if thoughts else ""
    slices = (text[start : start + SLICE].strip() for start in range(0, len(text), SLICE))
    return list(dict.fromkeys(text.split(";") if ";" in text else slices))
