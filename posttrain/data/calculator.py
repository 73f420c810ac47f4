"""A task on which a calculator helps with some problems and is wasteful on others.

    easy     7+5=        the sum of two digits
    medium   48+37=      the sum of two numbers of two digits
    hard     482*37=     a product of three digits by two

A demonstration answers directly, `<answer>12</answer>`, or calls the calculator, some of them twice for the
same thing. How it calls is up to the `tools` section of the recipe; here a call is the bare expression.
"""

from __future__ import annotations

import numpy as np

from posttrain.data.problem import Problem
from posttrain.rollout.types import Message

FAMILIES = ("easy", "medium", "hard")
COPIES = 10_000
"""There are a hundred easy problems; a row of the data is one of them and a number below this."""


def calculator(
    rng: np.random.Generator,
    *,
    easy: float = 0.6,
    medium: float = 0.2,
    hard: float = 0.2,
    tool: float = 0.9,
    redundant: float = 0.3,
    open: str = "<tool_call>",
    close: str = "</tool_call>",
) -> Problem:
    """A sum or a product; the column `family` says which kind.

    `easy`, `medium` and `hard` are the shares of the families. The demonstrator calls the calculator with
    probability `tool`, and of these times with probability `redundant` once more.
    """
    drawn = rng.random() * (easy + medium + hard)
    family = FAMILIES[int(drawn >= easy) + int(drawn >= easy + medium)]
    match family:
        case "easy":
            a, b = rng.integers(0, 10, size=2)
            expression, answer = f"{a}+{b}", a + b
        case "medium":
            a, b = rng.integers(10, 100, size=2)
            expression, answer = f"{a}+{b}", a + b
        case _:
            a, b = rng.integers(100, 1000), rng.integers(10, 100)
            expression, answer = f"{a}*{b}", a * b
    calls = 0 if rng.random() >= tool else 2 if rng.random() < redundant else 1
    messages: list[Message] = []
    for _ in range(calls):
        messages.append(Message(role="assistant", content=f"{open}{expression}{close}"))
        messages.append(Message(role="tool", content=str(answer)))
    messages.append(Message(role="assistant", content=f"<answer>{answer}</answer>"))
    return Problem(
        question=f"{expression}=",
        answer=str(answer),
        demonstration=messages,
        variant=str(rng.integers(COPIES)) if family == "easy" else "",
        columns={"family": family},
    )
