import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.answers import extract_answer, last_boxed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        # reasoning
        ("<think>6*7 is \\boxed{41}</think>\\boxed{42}", "42"),
        ("<think>a</think> no <think>b</think> 42", "42"),
        ("prefilled reasoning</think>\n42", "42"),
        ("<think>so it is \\boxed{42}", None),
        ("<think>a</think> \\boxed{42} <think> wait", None),
        ("<think>42</think>", None),
        # tags
        ("<answer>41</answer> or <answer> 42\n</answer>", "42"),
        ("<answer>two\nlines</answer>", "two\nlines"),
        ("<answer>so <answer>42</answer>", "42"),
        ("<answer>\\boxed{42}</answer>", "42"),
        ("\\boxed{41} <answer>42</answer> \\boxed{43}", "42"),
        ("<answer></answer>\\boxed{42}", None),
        ("<answer>41 and then \\boxed{42}", "42"),
        # boxes
        ("\\boxed{41}, no, $\\boxed{42}$.\nDone.", "42"),
        ("\\boxed{\\frac{1}{2}} and text\n", "\\frac{1}{2}"),
        ("\\boxed {42}", "42"),
        ("\\boxed{\\boxed{42}}", "42"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\{1}", "\\{1"),
        ("\\boxed{42} then \\boxed{4", "42"),
        ("{ \\boxed{42} } }", "42"),
        # ####
        ("6 * 7 = 42\n#### 42", "42"),
        ("#### 41\n#### 42\nThat is it.", "42"),
        ("\\boxed{42}\n#### 41", "42"),
        ("####\n42", None),
        # one short line
        (" 42 \n", "42"),
        ("The answer is 42.", "The answer is 42."),
        ("x" * 200, "x" * 200),
        ("x" * 201, None),
        ("First\n42", None),
        ("", None),
        (" \n ", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@given(st.text(), st.text(alphabet="0123456789+-*/^_ abc", min_size=1).map(str.strip).filter(bool))
def test_a_final_box_is_the_answer_whatever_comes_before(before, answer):
    before = before.replace("<", "").replace("\\", "")
    assert extract_answer(f"{before}\\boxed{{{answer}}}") == answer


PIECES = ["\\boxed{", "{", "}", "\\{", "a", "<answer>", "</answer>", "####", "\n", "</think>", "<think>"]


@given(st.lists(st.sampled_from(PIECES)).map("".join))
def test_an_answer_is_stripped_text_of_the_completion(text):
    answer = extract_answer(text)
    assert answer is None or (answer and answer == answer.strip() and answer in text)


def test_last_boxed_without_box():
    assert last_boxed("{42}") is None
    assert last_boxed("\\boxed 42") is None


@pytest.mark.parametrize(
    "piece", ["\\boxed{", "<answer>", "</answer>", "{", "####", "\\", "<answer>\\boxed{"]
)
def test_comes_back_from_a_flood(piece):
    """In linear time: a quadratic scan of 2 MB would take hours."""
    assert extract_answer(piece * (2_000_000 // len(piece))) is None
