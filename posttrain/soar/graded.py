r"""The reward of SOAR's students, as a recipe lists it:

rewards: [{name: graded, use: soar_graded}]
"""

from __future__ import annotations

from posttrain.data.answers import extract_answer, last_boxed
from posttrain.rewards.builtin import MathAnswer
from posttrain.rewards.registry import reward
from posttrain.rollout.types import Completion, Example

RIGHT, CONTAINED, BOXED = 120.0, 20.0, 10.0


@reward("soar_graded", version="1", timeout=5.0, range=(0.0, RIGHT))
class GradedAnswer:
    r"""120 for a right answer in a box, 20 for a box that has the reference answer in it, 10 for a box, else
    0.

    The lower tiers teach the format even where the teacher's answer is wrong (arXiv:2601.18778). "Has it in
    it" is read as: the reference without white space is a substring of the boxed text without white space.
    Right is what `math_answer` calls right.
    """

    def __init__(self) -> None:
        self._verify = MathAnswer()

    def __call__(self, completion: Completion, example: Example) -> float | None:
        """One of the tiers, None without an answer to compare with."""
        verified = self._verify(completion, example)
        if verified is None or example.answer is None:
            return None
        content = last_boxed(completion.written)
        if content is None:
            return 0.0
        if verified:
            return RIGHT
        reference = extract_answer(example.answer) or example.answer
        return CONTAINED if _squeezed(reference) in _squeezed(content) else BOXED


def _squeezed(text: str) -> str:
    return "".join(text.split())
