"""Completions of mathematical problems, drawn as a policy writes them, for the bench `rewards`.

Of each problem the policy has some chance of being right, spread evenly from never to always. Right answers
are mostly written as the reference is and sometimes in another form; wrong ones are often the same mistake. A
few completions end without an answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from posttrain.rollout.types import Completion, Example, Rollout, RolloutRequest, Sampling

USUAL_FORM = 0.85
"""Share of the right completions that write the answer as the reference does."""
USUAL_MISTAKE = 0.5
"""Share of the wrong completions that make the problem's most common mistake."""
NO_ANSWER = 0.03
"""Share of completions that end before their answer: cut off, or lost in thought."""
CHARACTERS_PER_TOKEN = 3.3

Forms = tuple[str, ...]
"""One value in the ways that it is written, the usual one first."""

_STEPS = (
    "First write ${a}x + {b} = {c}$, so that $x = \\frac{{{c} - {b}}}{{{a}}}$.",
    "There are {a} ways to choose the first and {b} for the second, which makes {a} \\cdot {b} in total.",
    "Substituting $y = {a}$ into the equation gives $y^2 - {b}y + {c} = 0$.",
    "Wait, that cannot be right: the sum of the first {a} terms is $\\frac{{{a}({a}+1)}}{{2}}$, not {b}.",
    "By symmetry it is enough to look at $0 \\le t \\le {a}$; the other case gives {b} again.",
    "Let me check this with $n = {b}$: both sides are {c}.",
    "So the area is $\\pi \\cdot {a}^2$ minus {b} of the {c} equal pieces.",
    "She has {a} left after the sale, which is {b} more than the {c} of the day before.",
)


@dataclass(frozen=True)
class Problem:
    """The reference, and the wrong answer that is given most."""

    right: Forms
    mistake: str
    other: Callable[[random.Random], str]
    """Draws any other wrong answer."""


def make_rollouts(seed: int, prompts: int, group: int) -> list[Rollout]:
    """`prompts` groups of `group` completions. The reference is the example's answer, between dollars."""
    rng = random.Random(seed)
    kinds = rng.choices([*KINDS], [*KINDS.values()], k=prompts)
    rollouts = []
    for number, kind in enumerate(kinds):
        problem = kind(rng)
        example = Example(f"problem-{number}", f"Problem {number}", f"${problem.right[0]}$")
        accuracy = rng.random()
        for index in range(group):
            text = _completion(rng, problem, accuracy)
            ids = tuple(rng.randrange(150_000) for _ in range(int(len(text) / CHARACTERS_PER_TOKEN)))
            request = RolloutRequest((0,), example, example.id, Sampling(len(ids), n=group))
            rollouts.append(Rollout(request, Completion(ids, (-0.5,) * len(ids), "stop", text), index, 0))
    return rollouts


def _completion(rng: random.Random, problem: Problem, accuracy: float) -> str:
    steps = [_step(rng) for _ in range(rng.randint(3, 16))]
    reasoning = "\n".join(steps)
    if rng.random() < NO_ANSWER:
        return reasoning
    if rng.random() < accuracy:
        usual = rng.random() < USUAL_FORM or len(problem.right) == 1
        answer = problem.right[0] if usual else rng.choice(problem.right[1:])
    else:
        answer = problem.mistake if rng.random() < USUAL_MISTAKE else problem.other(rng)
    return f"{reasoning}\n\n" + rng.choice(
        (
            f"The answer is $\\boxed{{{answer}}}$.",
            f"Therefore, the final answer is: $\\boxed{{{answer}}}$. I hope it is correct.",
            f"**Answer:** \\[ \\boxed{{{answer}}} \\]",
        )
    )


def _step(rng: random.Random) -> str:
    a, b, c = (rng.randint(2, 400) for _ in range(3))
    return rng.choice(_STEPS).format(a=a, b=b, c=c)


def _integer(rng: random.Random) -> Problem:
    value = rng.choice((rng.randint(-20, 100), rng.randint(100, 20_000)))
    forms: Forms = (str(value),)
    if value >= 1000:
        forms = (str(value), f"{value:,}", f"{value:,}".replace(",", "{,}"))
    mistake = str(value + rng.choice((-10, -1, 1, 2, 10)))
    return Problem(forms, mistake, lambda r: str(r.randint(-50, 20_000)))


def _fraction(rng: random.Random) -> Problem:
    value = Fraction(rng.randint(1, 60), rng.choice((3, 7, 9, 11, 13, 17, 24)))
    value += value.denominator == 1 and Fraction(1, 3)
    top, bottom = value.numerator, value.denominator
    others = (f"\\dfrac{{{top}}}{{{bottom}}}", f"{top}/{bottom}", f"\\frac{{{2 * top}}}{{{2 * bottom}}}")
    return Problem(
        (_frac(value), *others),
        _frac(1 / value),
        lambda r: _frac(Fraction(r.randint(1, 80), r.choice((5, 7, 19, 23)))),
    )


def _frac(value: Fraction) -> str:
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _root(rng: random.Random) -> Problem:
    factor, radicand = rng.randint(2, 9), rng.choice((2, 3, 5, 6, 7, 10))
    return Problem(
        (f"{factor}\\sqrt{{{radicand}}}", f"\\sqrt{{{factor * factor * radicand}}}"),
        f"{factor}\\sqrt{{{radicand + 5}}}",
        lambda r: f"{r.randint(2, 30)}\\sqrt{{{r.choice((11, 13, 17))}}}",
    )


def _polynomial(rng: random.Random) -> Problem:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    return Problem(
        (f"x^2 + {a + b}x + {a * b}", f"(x + {a})(x + {b})"),
        f"x^2 + {a + b}x - {a * b}",
        lambda r: f"x^2 - {r.randint(1, 20)}x + {r.randint(1, 90)}",
    )


def _pair(rng: random.Random) -> Problem:
    a, b = rng.randint(-9, 9), rng.randint(1, 30)
    return Problem(
        (f"({a}, {b})", f"({a},{b})"),
        f"({b}, {a - 1})",
        lambda r: f"({r.randint(-9, 9)}, {r.randint(31, 60)})",
    )


def _decimal(rng: random.Random) -> Problem:
    value = rng.randint(1, 999) / rng.choice((8, 20, 40))
    value += value.is_integer() and 0.5
    return Problem((f"{value:g}", f"{value:g}0"), f"{value * 10:g}", lambda r: f"{r.randint(1, 400) / 16:g}")


KINDS = {_integer: 9, _fraction: 4, _root: 2, _polynomial: 2, _pair: 1, _decimal: 2}
"""Kinds of problems and how frequent they are."""
