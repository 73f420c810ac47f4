import re
from dataclasses import replace

import math_verify
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewards.scoring import completion

from posttrain.errors import RecipeError
from posttrain.rewards.builtin import (
    CANONICAL_INPUTS,
    Format,
    LengthPenalty,
    MathAnswer,
    ReasoningGym,
    exact_match,
    numeric_match,
    parse_number,
)
from posttrain.rewards.maths import same_plain_numbers
from posttrain.rollout.types import Completion, Example, Turn


def example(answer, **columns):
    return Example("row", "What?", answer, columns)


# --- math_answer


@pytest.fixture(scope="module")
def math_answer():
    return MathAnswer()


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("\\boxed{42}", "42", 1.0),
        ("so it is\n#### 42", "6*7 = 42\n#### 42", 1.0),
        ("<think>\\boxed{1}</think>\n<answer>42</answer>", "42", 1.0),
        ("The answer is 42.", "42", 1.0),
        ("\\boxed{\\frac{1}{2}}", "1/2", 1.0),
        ("\\boxed{0.5}", "\\frac12", 1.0),
        ("\\boxed{50\\%}", "0.5", 1.0),
        ("\\boxed{50\\%}", "50", 1.0),  # math-verify takes both readings of a percentage
        ("\\boxed{\\$18}", "18", 1.0),
        ("$18", "18", 1.0),
        ("1,234", "1234", 1.0),
        ("\\boxed{x=3}", "3", 1.0),
        ("\\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
        ("\\boxed{2\\sqrt{2}}", "\\sqrt{8}", 1.0),
        ("\\boxed{[1,2)}", "[1,2)", 1.0),
        ("\\boxed{(2,1)}", "(1,2)", 0.0),
        ("\\boxed{1e3}", "1000", 1.0),
        ("\\boxed{1e3}", "1", 0.0),
        ("\\boxed{2x+1}", "1", 0.0),
        ("\\boxed{5\\text{ cm}}", "5", 1.0),
        ("$\\frac{84}{2}$", "42", 1.0),
        ("\\boxed{41}", "42", 0.0),
        ("\\boxed{}}", "42", 0.0),
        ("\\boxed{\\frac{}", "42", 0.0),
        ("first\nsecond", "42", 0.0),
        ("<think>\\boxed{42}", "42", 0.0),
        ("", "42", 0.0),
    ],
)
def test_math_answer(math_answer, text, answer, score):
    assert math_answer(completion(text), example(answer)) == score


def test_math_answer_without_reference(math_answer):
    assert math_answer(completion("42"), example(None)) is None


@pytest.mark.parametrize("text", ["42", "}", "no answer\nat all"])
def test_an_unreadable_reference_is_an_error_for_every_completion(math_answer, text):
    with pytest.raises(ValueError, match=r"answer '}' of the example cannot be parsed"):
        math_answer(completion(text), example("}"))


def test_a_degenerate_reference_is_an_error(math_answer):
    with pytest.raises(ValueError, match="nan or zoo"):
        math_answer(completion("\\boxed{3}"), example("\\frac{1}{0}"))


ASKED = MathAnswer()


def slowly(answer, reference):
    """What math-verify says if it is asked everything."""
    gold, parsed = ASKED._parse(reference), ASKED._parse(answer)
    return float(math_verify.verify(gold, parsed, timeout_seconds=None, raise_on_error=True))


whole = st.integers(0, 10**6)
NUMBERS = st.one_of(
    whole.map(str),
    whole.map("{:,}".format),
    st.builds("-{}".format, whole),
    st.builds("{}.{}".format, st.integers(0, 999), st.integers(0, 99_999)),
    st.builds("{}/{}".format, st.integers(0, 99), st.integers(1, 99)),
    st.builds("-\\frac{{{}}}{{{}}}".format, st.integers(1, 99), st.integers(1, 99)),
    st.builds("\\dfrac{{{}}}{{{}}}".format, st.integers(-99, 99), st.integers(1, 99)),
    st.sampled_from(
        ["0.5", "1/2", "\\frac{2}{4}", "0.50", "1234", "1,234", "-0", "$7$", "$-3/4$", "007", "1/0"]
    ),
)


TUPLES = st.lists(NUMBERS, min_size=2, max_size=3).map(lambda values: f"({', '.join(values)})")
LIKE = st.one_of(st.tuples(NUMBERS, NUMBERS), st.tuples(TUPLES, TUPLES))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LIKE)
def test_plain_numbers_are_judged_as_math_verify_does(pair):
    answer, reference = pair
    quick = same_plain_numbers(answer, reference)
    assert quick is None or quick == slowly(answer, reference)
    same = same_plain_numbers(answer, answer)
    assert same is None or slowly(answer, answer) == 1.0


EXPRESSIONS = [
    "2\\sqrt{3}", "\\sqrt{12}", "2\\sqrt{8}", "x^2+3x+2", "(x+1)(x+2)", "x^2+3x-2", "\\pi", "3.14159265",
    "50\\%", "50", "x", "x=5", "5", "(1,2)", "(1, 3)", "[1,2]", "\\{1,2\\}", "1 < x < 2", "\\frac{x}{x}",
    "1", "\\frac{1}{x}", "\\text{east}", "east", "\\infty", "1+2i", "\\sin^2 x + \\cos^2 x", "|x|",
    "\\sqrt{x^2}", "x^{1/2}", "\\frac{1}{0}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", "2^{10}", "1024",
    "0.3333333", "\\frac{1}{3}", "10!", "\\log_2 8", "e^x",
]  # fmt: skip


@pytest.mark.parametrize("reference", EXPRESSIONS)
def test_expressions_are_judged_as_math_verify_does(math_answer, reference):
    """Against those beside it in the list, itself, and itself between dollars."""
    at = EXPRESSIONS.index(reference)
    for answer in (*EXPRESSIONS[max(at - 2, 0) : at + 3], f"${reference}$"):
        try:
            expected = slowly(answer, reference)
        except Exception:
            continue  # it is an error there, and no value here contradicts it
        assert math_answer(completion(f"\\boxed{{{answer}}}"), example(reference)) == expected, answer


def test_math_answer_depends_on_its_merge_key_alone():
    key = CANONICAL_INPUTS["math_answer"]
    one = key(completion("so \\boxed{42}"), example("a\n#### 42"))
    assert one == key(completion("\\boxed{42} it is"), example("42"))
    assert one != key(completion("\\boxed{42}"), example("43"))


# --- exact_match


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("\\boxed{Paris}", "paris", 1.0),
        ("  Paris. ", "Paris", 1.0),
        ("New\t York", "new york", 1.0),
        ("½", "½", 1.0),
        ("ﬁve", "five", 1.0),
        ("STRASSE", "straße", 1.0),
        ("42.0", "42", 0.0),
        ("first\nsecond", "Paris", 0.0),
        ("Paris", None, None),
    ],
)
def test_exact_match(text, answer, score):
    assert exact_match(completion(text), example(answer)) == score


# --- numeric_match


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", 42),
        ("+42.", 42),
        ("-3", -3),
        ("−3", -3),
        (".5", 0.5),
        ("1,234,567.25", 1234567.25),
        ("1e-4", 1e-4),
        ("3/4", 0.75),
        ("-3 / 4", -0.75),
        ("\\frac{3}{4}", 0.75),
        ("-\\dfrac{3}{4}", -0.75),
        ("75%", 0.75),
        ("75\\%", 0.75),
        ("1/2%", 0.005),
        ("$18", 18),
        ("\\$1,800.50", 1800.5),
        ("-$5", -5),
        ("$42$", 42),
        ("12,34", None),
        ("3/0", None),
        ("1/2/3", None),
        ("x = 3", None),
        ("3 apples", None),
        ("nan", None),
        ("inf", None),
        ("1e999", None),
        ("9" * 500, None),
        ("", None),
        ("%", None),
    ],
)
def test_parse_number(text, number):
    assert parse_number(text) == (None if number is None else pytest.approx(number, rel=1e-15))


def test_numeric_match():
    assert numeric_match(completion("\\boxed{0.75}"), example("3/4")) == 1.0
    assert numeric_match(completion("0.7500001"), example("0.75")) == 1.0
    assert numeric_match(completion("0.751"), example("0.75")) == 0.0
    assert numeric_match(completion("0.751"), example("0.75"), rel_tol=0.01) == 1.0
    assert numeric_match(completion("0.3"), example("0"), abs_tol=0.5) == 1.0
    assert numeric_match(completion("many"), example("3")) == 0.0
    assert numeric_match(completion("first\nsecond"), example("3")) == 0.0
    assert numeric_match(completion("3"), example(None)) is None
    with pytest.raises(ValueError, match="answer 'many' of the example is not a number"):
        numeric_match(completion("3"), example("many"))


# --- format


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("\n<think>\na\n</think>\n\n<answer></answer>\n", 1.0),
        ("<think>a</think>b<answer>c</answer>", 0.0),
        ("a<think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer>c", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a<answer>b</answer></think>", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("</think>a<think><answer>b</answer>", 0.0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer></answer>", 0.0),
        ("<THINK>a</THINK><answer>b</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_format_tags(text, score):
    assert Format(tags=["think", "answer"])(completion(text), example(None)) == score
    # As a regular expression: blocks in order, and no mark inside of a block.
    marks = "(?!</?(?:think|answer)>)"
    pattern = rf"\s*<think>(?:{marks}.)*</think>\s*<answer>(?:{marks}.)*</answer>\s*"
    assert (re.fullmatch(pattern, text, re.DOTALL) is not None) == bool(score)
    assert Format(pattern=pattern)(completion(text), example(None)) == score


def test_format_with_text_after():
    function = Format(tags=["think"], text_after=True)
    assert function(completion("<think>a</think>b"), example(None)) == 1.0
    assert function(completion("b<think>a</think>"), example(None)) == 0.0


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"tags": []},
        {"tags": "think"},
        {"tags": ["a"], "pattern": "b"},
        {"pattern": "("},
        {"pattern": "a", "text_after": True},
    ],
)
def test_format_refuses(args):
    with pytest.raises(RecipeError, match="reward 'format'"):
        Format(**args)


# --- length_penalty


@pytest.mark.parametrize(
    ("tokens", "score"),
    # DAPO's own numbers, L_max 20480 and L_cache 4096 (section 3.4), and points between.
    [
        (0, 0.0),
        (16384, 0.0),
        (16385, -1 / 4096),
        (17408, -0.25),
        (18432, -0.5),
        (20480, -1.0),
        (20481, -1.0),
        (99999, -1.0),
    ],
)
def test_length_penalty(tokens, score):
    function = LengthPenalty(max_tokens=20480, buffer=4096)
    assert function(completion("x", tokens), example(None)) == pytest.approx(score, abs=1e-15)


@pytest.mark.parametrize("args", [(10, 0), (10, 11), (0, 0), (-1, -2)])
def test_length_penalty_refuses(args):
    with pytest.raises(RecipeError, match="0 < buffer <= max_tokens"):
        LengthPenalty(*args)


# --- reasoning_gym


@pytest.mark.parametrize("name", ["chain_sum", "countdown", "spell_backward"])
def test_reasoning_gym_agrees_with_the_dataset(name):
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(name, size=3, seed=1)
    function = ReasoningGym()
    for entry in dataset:
        row = example(entry["answer"], source_dataset=name, metadata=entry["metadata"])
        assert function(completion(f"<answer>{entry['answer']}</answer>"), row) == 1.0
        wrong = function(completion("<answer>nonsense</answer>"), row)
        assert wrong == dataset.score_answer("nonsense", entry) < 1.0
        assert function(completion("no\nanswer"), row) == dataset.score_answer(None, entry)


def test_reasoning_gym_needs_its_columns():
    with pytest.raises(ValueError, match="no column 'source_dataset'"):
        ReasoningGym()(completion("42"), example("42"))


def test_what_tools_say_is_no_answer():
    said = "<answer>42</answer>"
    tools = Completion(
        (1, 2, 3), (0.0,) * 3, "stop", f"call {said} 41", (1, 0, 1), (Turn(0, 1, "call "), Turn(2, 3, "41"))
    )
    assert exact_match(tools, example("42")) == 0.0
    assert exact_match(replace(tools, turns=()), example("42")) == 1.0
    assert Format(pattern="call 41")(tools, example("42")) == 1.0
