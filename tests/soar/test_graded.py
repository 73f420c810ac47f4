r"""The tiers of the student's reward."""

from __future__ import annotations

import pytest

from posttrain.rollout.types import Completion, Example
from posttrain.soar.graded import GradedAnswer


@pytest.fixture(scope="module")
def grade():
    reward = GradedAnswer()
    return lambda text, answer: reward(Completion((1,), (0.0,), "stop", text), Example("x", "?", answer))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("So it is \\boxed{\\frac{1}{2}}", 120),
        ("So it is \\boxed{0.5}", 120),
        ("So it is \\boxed{3}", 10),
        ("So it is \\boxed{1 / 2 + x}", 20),
        ("So it is 1/2", 0),
        ("", 0),
    ],
)
def test_tiers(grade, text, value):
    assert grade(text, "1/2") == value


def test_without_a_reference_it_does_not_apply(grade):
    assert grade("\\boxed{1}", None) is None
