"""Self-predictions and what they are worth: the worked examples, by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from pydantic import ValidationError

from posttrain.data.self_predictions import (
    Prediction,
    hinted_example,
    meta_example,
    parse_prediction,
    problem_text,
    reasoning_of,
    write_prediction,
)
from posttrain.errors import DataError
from posttrain.recipe.meta_schema import AlignmentConfig, MetaFormat
from posttrain.rollout.types import Example
from posttrain.training.advantages import group_advantages
from posttrain.training.self_alignment import (
    Assessment,
    Forecast,
    MetaReward,
    Solutions,
    calibration,
    calibration_bins,
    is_gated,
    length_limit,
    meta_reward,
    singular,
    spearman,
)

ROBUST, OFFICIAL = MetaFormat(), MetaFormat(parser="official")
EQUATION, STRICT = AlignmentConfig(), AlignmentConfig(length_bounds="strict")
PROBLEM = "Compute the area of the rectangle with sides 3 and 4."
TEXTS = [
    "By similarity of triangles and the Pythagorean theorem: 12",
    "Using similarity we get 12",
    "Work with a modulus, giving 12",
    "The modulus gives 7",
]
SOLUTIONS = Solutions(TEXTS, [True, True, True, False], [100, 140, 120, 400])


def worth(prediction, solutions=SOLUTIONS, config=EQUATION):
    return meta_reward(prediction, solutions, PROBLEM, 8, config)


def parts(*args, **options):
    found = worth(*args, **options)
    return [round(value, 6) for value in (found.length, found.difficulty, found.notion, found.total)]


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        (Prediction(("similarity", "modulus", "area"), 6, 120), [1, 1, 0.5, 0.833333]),
        (Prediction(("similarity",), 8, 100), [1, 0.316228, 1, 0.772076]),
        (Prediction(("area", "rectangle"), 6, 141), [0, 1, 0, 0.333333]),
        (Prediction(("similarities", "similarity", "modulus"), 6, 120), [1, 1, 0.5, 0.833333]),
        (Prediction((), 4, None), [0, 0.316228, 0, 0.105409]),
        (Prediction(), [0, 0, 0, 0]),
    ],
)
def test_rewards_of_the_worked_problem(prediction, expected):
    assert parts(prediction) == expected


def test_strict_bounds_are_those_of_the_released_code():
    assert parts(Prediction(("similarity",), 8, 100), config=STRICT) == [0, 0.316228, 1, 0.438743]
    one = Solutions(TEXTS, [False, False, True, False], [100, 140, 120, 400])
    inclusive = [parts(Prediction((), 2, length), one)[3] for length in (119, 120, 121)]
    assert inclusive == [0.333333, 0.666667, 0.333333]
    assert [parts(Prediction((), 2, length), one, STRICT)[0] for length in (119, 120, 121)] == [0, 0, 0]


def test_all_wrong_and_all_right():
    wrong = Solutions(["modulus"] * 4, [False] * 4, [100, 140, 120, 400])
    assert parts(Prediction(("modulus",), 0, 120), wrong) == [0, 1, 0, 0.333333]
    right = Solutions(["modulus", "x", "y", "z"], [True] * 4, [100, 140, 120, 400])
    assert parts(Prediction(("modulus", "parity"), 8, 400), right) == [1, 1, 0.5, 0.833333]


def test_notions_count_solutions_and_not_rates():
    more_wrong = Solutions(["parity", "parity", "parity", "z"], [True, False, False, False], [1, 2, 3, 4])
    assert worth(Prediction(("parity",)), more_wrong).notion == 0
    often = Solutions(["parity parity parity", "parity", "parity"], [True, False, True], [1, 2, 3])
    assert worth(Prediction(("parity",)), often).notion == 1  # 2 > 1: once for each solution
    tie = Solutions(["parity parity parity", "parity"], [True, False], [1, 2])
    assert worth(Prediction(("parity",)), tie).notion == 0


def test_one_unit_off_about_halves_the_difficulty_reward():
    truth = Solutions(["a"] * 8, [True] * 4 + [False] * 4, [1] * 8)
    values = [round(worth(Prediction((), rate), truth).difficulty, 4) for rate in range(9)]
    assert values == [0.1, 0.1778, 0.3162, 0.5623, 1.0, 0.5623, 0.3162, 0.1778, 0.1]


def test_matching_by_words():
    words = AlignmentConfig(notion_match="words")
    solutions = Solutions(["The Pythagorean Theorem gives 12", "unitheorem ax"], [True, True], [1, 2])
    assert worth(Prediction(("theorems",)), solutions, words).notion == 1
    assert worth(Prediction(("ax",)), solutions, words).notion == 0  # too short
    assert worth(Prediction(("heorem",)), solutions, words).notion == 0
    assert worth(Prediction(("heorem",)), solutions).notion == 1
    assert worth(Prediction(("Rectangles",)), solutions, words).notion == 0  # the problem says so


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("identities", "identity"),
        ("boxes", "box"),
        ("matches", "match"),
        ("series", "series"),
        ("power series", "power series"),
        ("glass", "glass"),
        ("law of cosines", "law of cosine"),
        ("vertices", "vertice"),
        ("modulus", "modulu"),
    ],
)
def test_singular(phrase, expected):
    assert singular(phrase) == expected


def test_properties_of_the_rewards():
    rng = np.random.default_rng(0)
    for _ in range(50):
        count = int(rng.integers(1, 9))
        texts = [" ".join(rng.choice(["carry", "guess", "column"], 2)) for _ in range(count)]
        solutions = Solutions(texts, list(rng.random(count) < 0.5), list(map(int, rng.integers(1, 9, count))))
        named = tuple(rng.choice(["carry", "guess", "parity"], 2))
        prediction = Prediction(named, int(rng.integers(0, 9)), int(rng.integers(1, 9)))
        found = worth(prediction, solutions)
        assert all(0 <= value <= 1 for value in (found.length, found.difficulty, found.notion, found.total))
        order = rng.permutation(count)
        shuffled = Solutions(*([values[i] for i in order] for values in vars(solutions).values()))
        assert worth(prediction, shuffled) == found
        more = Solutions([*texts, "carry"], [*solutions.correct, False], [*solutions.lengths, 3])
        assert worth(prediction, more).length <= found.length
        assert worth(prediction, more).notion <= found.notion


def test_advantages_of_the_worked_group():
    rewards = np.array([0.833333, 0.438743, 0.333333, 0.0])
    advantages = group_advantages(rewards, ["q"] * 4, eps=0.0)
    np.testing.assert_allclose(advantages, [1.25805, 0.10889, -0.19809, -1.16885], atol=2e-5)
    np.testing.assert_allclose(group_advantages(3 * rewards, ["q"] * 4, eps=0.0), advantages, atol=1e-12)


# --- parsing ---------------------------------------------------------------------------------------------


LINE = '{"math_notion": ["a"], "pass_rate": 3, "solution_length": 500}'
READ = Prediction(("a",), 3, 500)


@pytest.mark.parametrize("format", [ROBUST, OFFICIAL])
def test_one_line_is_read_by_both(format):
    assert parse_prediction(LINE, format) == READ
    assert parse_prediction(f"<meta>so {{x}}</meta>\n```json\n{LINE}\n```", format) == READ
    assert parse_prediction(f'{{"math_notion": ["b"], "pass_rate": 1}} no: {LINE}', format) == READ
    assert parse_prediction("nothing", format) == Prediction()
    assert parse_prediction("{'math_notion': ['a'], 'pass_rate': 3}", format) == Prediction()


def test_what_only_ours_reads():
    pretty = '{\n "pass_rate": 3,\n "math_notion": ["a b", "a b", " "],\n "solution_length": 500\n}'
    assert parse_prediction(pretty, ROBUST) == Prediction(("a b",), 3, 500)
    assert parse_prediction(pretty, OFFICIAL) == Prediction()
    latex = json.dumps({"math_notion": ["\\frac{a}{b}"], "pass_rate": 3, "solution_length": 500})
    assert parse_prediction(latex, ROBUST).notions == ("\\frac{a}{b}",)
    assert parse_prediction(latex, OFFICIAL) == Prediction()
    broken = LINE + ' or {"math_notion": ["c"], "pass_rate": x}'
    assert parse_prediction(broken, ROBUST) == READ
    assert parse_prediction(broken, OFFICIAL) == Prediction()
    assert parse_prediction('{"pass_rate": 1} and {"other": 2}', ROBUST).pass_rate == 1
    assert parse_prediction('{"pass_rate": 7} <meta></meta> {"pass_rate": 2', ROBUST) == Prediction()


def test_types_and_ranges():
    def ours(rate, length):
        text = f'{{"math_notion": ["similarity"], "pass_rate": {rate}, "solution_length": {length}}}'
        return parse_prediction(text, ROBUST), parse_prediction(text, OFFICIAL)

    for rate, length in (("9", "true"), ("-1", "0"), ("3.0", '"500"'), ("true", "1e3"), ("null", "1" * 5000)):
        robust, _ = ours(rate, length)
        assert (robust.pass_rate, robust.length) == (None, None)
    floats = ours("6.0", "120.0")[1]
    assert parts(floats) == [0, 0, 1, 0.333333]
    assert ours("9", "true")[1] == Prediction(("similarity",), 9, True)
    null = parse_prediction('{"math_notion": null, "pass_rate": 6, "solution_length": 120}', OFFICIAL)
    assert parts(null) == [1, 1, 0, 0.666667]
    mixed = '{"math_notion": ["similarity", 3], "pass_rate": 6, "solution_length": 120}'
    assert parse_prediction(mixed, OFFICIAL).notions == ()
    assert parse_prediction(mixed, ROBUST).notions == ("similarity",)
    joined = '{"math_notion": "similarity, area", "pass_rate": 6}'
    assert parse_prediction(joined, OFFICIAL).notions == ("similarity", "area")
    many = json.dumps({"math_notion": [f"n{i}" for i in range(40)]})
    assert len(parse_prediction(many, ROBUST).notions) == 16


@pytest.mark.parametrize("text", ["{" * 20_000, '{"a":' * 20_000, '{"pass_rate": ' + "[" * 100_000])
def test_hostile_answers_are_no_predictions(text):
    assert parse_prediction(text, ROBUST) == Prediction()


def test_an_answer_that_is_written_is_read():
    format = MetaFormat(notions_key="n", pass_rate_key="p", length_key="l", template="assess {problem}")
    text = write_prediction(READ, format, "it is easy")
    assert text == '<meta>it is easy</meta>\n{"n": ["a"], "p": 3, "l": 500}'
    assert parse_prediction(text, format) == READ
    assert reasoning_of(text) == "it is easy"
    assert reasoning_of(LINE) == ""
    assert parse_prediction(write_prediction(READ, OFFICIAL, "x"), OFFICIAL) == READ


def test_the_question_has_the_bare_problem_and_the_longest_solution():
    example = Example("e", "Solve it: x{levels}. Box it.", "1", {"bare": "x{levels}"})
    asked = meta_example(example, MetaFormat(problem="bare"), 4096)
    assert asked.id == "e#meta"
    assert [message["role"] for message in asked.prompt] == ["system", "user"]
    text = asked.prompt[1]["content"]
    assert '"pass_rate": <int 0-8>' in text
    assert "<int 128-4096>" in text
    assert text.endswith("Problem: x{levels}")
    assert (
        meta_example(example, MetaFormat(system=None, template="? {problem}"), 9).prompt
        == f"? {example.prompt}"
    )
    chat = Example("c", [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}])
    assert problem_text(chat, MetaFormat()) == "q"
    with pytest.raises(DataError, match=r"example 'c' has no column 'bare'"):
        problem_text(chat, MetaFormat(problem="bare"))
    with pytest.raises(ValidationError, match="template has no"):
        MetaFormat(template="assess")


def test_hints_follow_the_problem():
    example = Example("e", "Solve: x. Box it.", "1", {"bare": "x."})
    hint = "\n\nThe problem can be solved with the following notions: carry, column."
    assert hinted_example(example, ["carry", "column"], MetaFormat(problem="bare")).prompt == (
        f"Solve: x.{hint} Box it."
    )
    chat = Example("c", [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}])
    assert hinted_example(chat, ["carry", "column"], MetaFormat()).prompt[1]["content"] == f"q{hint}"


# --- what it controls ------------------------------------------------------------------------------------


def forecast(rates, lengths=()):
    missing = [Prediction()] * (8 - len(rates))
    made = [Prediction((), rate) for rate in rates] + missing
    made += [Prediction((), None, length) for length in lengths]
    return Forecast.of(made[: max(8, len(rates))] if not lengths else made, 8)


@pytest.mark.parametrize(
    ("rates", "gated"),
    [
        ([0] * 8, True),
        ([8] * 7 + [7], True),
        ([0] * 7 + [1], True),
        ([4] * 8, False),
        ([1] * 8, False),
        ([8] * 4 + [7] * 4, False),
        ([0] * 7 + [8], False),
        ([0] * 3, False),
        ([0] * 4, True),
        ([], False),
    ],
)
def test_gate(rates, gated):
    assert is_gated(forecast(rates)) is gated


def test_forecast_of_the_gates_edge():
    edge = forecast([8] * 7 + [7])
    assert (round(edge.rate, 4), round(edge.spread, 4)) == (0.9844, 0.0413)
    assert round(forecast([0] * 7 + [8]).spread, 3) == 0.331


def test_cutoff():
    known = Forecast.of([Prediction((), 3, n) for n in (400, 600, 500)] + [Prediction()], 8)
    assert length_limit(known, 4096) == 1000
    assert length_limit(known, 900) == 900
    assert length_limit(known, 4096, statistic="max") == 1200
    assert length_limit(known, 4096, multiplier=0.001, min_limit=128) == 128
    assert length_limit(Forecast.of([Prediction()], 8), 4096) == 4096


def test_spearman_against_worked_ranks():
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([1.0, 4, 9, 16])) == pytest.approx(1)
    # ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: covariance 4.5, variances 4.5 and 5
    assert spearman(np.array([1.0, 2, 2, 4]), np.array([1.0, 2, 3, 4])) == pytest.approx(4.5 / 22.5**0.5)
    assert math.isnan(spearman(np.array([1.0, 1]), np.array([1.0, 2])))


def test_calibration_over_problems():
    def assessment(rate, truth, predicted=math.nan, length=math.nan):
        return Assessment(rate, truth, predicted, length, (1.0, 0.5, 0.0), 0.5)

    problems = [assessment(0.25, 0.5, 10, 20), assessment(0.5, 1.0, 20, 22), assessment(math.nan, 0.0)]
    found = calibration(problems)
    assert found["rate_mae"] == pytest.approx(0.375)
    assert found["rate_spearman"] == pytest.approx(1)
    assert found["length_mae"] == pytest.approx(6)
    assert found["in_range"] == 1  # of the two with a correct solution
    assert found["reward"] == pytest.approx(0.5)
    assert found["rate_spread"] == pytest.approx(0.125)
    assert calibration([]) == {}
    assert calibration_bins(problems, 8) == {2: (1, 0.5), 4: (1, 1.0)}
    made = Assessment.of([Prediction((), 4, 7), Prediction()], [MetaReward(1, 1, 0), MetaReward(0, 0, 0)],
                         SOLUTIONS, 8)  # fmt: skip
    assert made == Assessment(0.5, 0.75, 7.0, 120.0, (0.5, 0.5, 0.0), 0.0)
