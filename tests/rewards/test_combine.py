import pytest

from posttrain.errors import RecipeError
from posttrain.recipe.schema import RewardSpec
from posttrain.rewards.combine import Combination, Gate, weight_at


def combination(*specs):
    return Combination([RewardSpec.model_validate(spec) for spec in specs])


MATHS = {"name": "math"}


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("math > 0", Gate("math", ">", 0.0)),
        ("math>=0.5", Gate("math", ">=", 0.5)),
        (" my reward  !=  -1e-3 ", Gate("my reward", "!=", -0.001)),
        ("rewards/mine.py:f<.5", Gate("rewards/mine.py:f", "<", 0.5)),
    ],
)
def test_conditions(text, gate):
    assert Gate.parse(text) == gate


@pytest.mark.parametrize("text", ["", "math", "math >", "> 0", "math > x", "math > 0 and b > 0", "math => 1"])
def test_what_is_no_condition(text):
    with pytest.raises(RecipeError, match="a condition is NAME > NUMBER"):
        Gate.parse(text)


@pytest.mark.parametrize(
    ("sign", "met"),
    [(">", [False, False, True]), (">=", [False, True, True]), ("<", [True, False, False]),
     ("<=", [True, True, False]), ("==", [False, True, False]), ("!=", [True, False, True])],
)  # fmt: skip
def test_signs(sign, met):
    gate = Gate("math", sign, 1.0)
    assert [gate.is_met({"math": value}) for value in (0.0, 1.0, 2.0)] == met
    assert not gate.is_met({"math": None})
    assert not gate.is_met({})


@pytest.mark.parametrize(
    ("step", "weight"),
    [(0, 1.0), (5, 1.0), (10, 1.0), (60, 0.55), (110, 0.1), (160, 0.35), (210, 0.6), (999, 0.6), (None, 0.6)],
)
def test_schedules_are_linear_between_their_steps(step, weight):
    assert weight_at({10: 1.0, 110: 0.1, 210: 0.6}, step) == pytest.approx(weight)
    assert weight_at(0.25, step) == 0.25


def test_weights_clips_and_gates():
    both = combination(
        {"name": "math", "weight": 2.0},
        {"name": "style", "weight": {0: 1.0, 10: 0.0}, "clip": [-0.5, 0.5], "only_if": "math > 0"},
    )
    right, wrong = {"math": 1.0, "style": 3.0}, {"math": 0.0, "style": 3.0}
    assert both.terms(right, 0) == {"math": 1.0, "style": 0.5}
    assert both.total(right, {}, 0) == 2.5
    assert both.total(right, {}, 4) == pytest.approx(2.3)
    assert both.total({"math": 1.0, "style": -3.0}, {}, 0) == 1.5
    assert both.terms(wrong, 0) == {"math": 0.0}
    assert both.total(wrong, {}, 0) == 0.0
    assert both.terms(right, 10) == {"math": 1.0}


def test_a_gate_sees_the_value_before_weight_and_clip():
    gated = combination(
        {"name": "math", "weight": 0.0, "clip": [0, 1]}, {"name": "style", "only_if": "math > 2"}
    )
    assert gated.total({"math": 3.0, "style": 0.5}, {}, 0) == 0.5
    assert gated.total({"math": 1.0, "style": 0.5}, {}, 0) is None  # nothing applies


def test_failures_count_where_they_matter():
    gated = combination(MATHS, {"name": "style", "only_if": "math > 0"}, {"name": "seen", "weight": 0.0})
    right, wrong = {"math": 1.0, "style": None}, {"math": 0.0, "style": None}
    assert gated.total(right, {"style": "timeout"}, 0) is None
    assert gated.total(wrong, {"style": "timeout"}, 0) == 0.0  # it would not have applied
    assert gated.total({"math": None, "style": 1.0}, {"math": "died"}, 0) is None
    assert gated.total({"math": 1.0, "style": 1.0, "seen": None}, {"seen": "died"}, 0) == 2.0
    # A gate that looks at a reward of weight 0 needs it all the same.
    hidden = combination({"name": "math", "weight": 0}, {"name": "style", "only_if": "math > 0"})
    assert hidden.total({"math": None, "style": 1.0}, {"math": "died"}, 0) is None
