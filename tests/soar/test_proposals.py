"""What the teacher writes, as it is meant and as it is not."""

from __future__ import annotations

import time

import pytest

from posttrain.recipe.soar_schema import ProposalFormat
from posttrain.soar.proposals import Question, Unreadable, digest, parse_proposal, partition, unique_share

MATHS = ProposalFormat()


@pytest.mark.parametrize(
    "text",
    [
        "<question>What is 1+1?</question><answer>\\boxed{2}</answer>",
        "Sure!\n<question> What is 1+1? </question>\nAdd them.\n<answer>So \\boxed{2}.</answer> Done.",
        "<question>What is 1+1?<question> <answer>\\boxed{2}<answer>",  # as the paper prints its tags
        "<question>What is 1+1?</question><answer>\\boxed{1}, no: \\boxed{ 2 }</answer>",
    ],
)
def test_readable(text):
    assert parse_proposal(text, MATHS) == Question("What is 1+1?", "2")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no_question"),
        ("What is 1+1? \\boxed{2}", "no_question"),
        ("<question>What is 1+1?", "no_question"),
        ("<question>  \n </question><answer>\\boxed{2}</answer>", "empty_question"),
        ("<question>?!</question><answer>\\boxed{2}</answer>", "empty_question"),
        ("<question>1+1?</question>", "no_answer"),
        ("<answer>\\boxed{2}</answer><question>1+1?</question>", "no_answer"),
        ("<question>1+1?</question><answer>\\boxed{2}", "no_answer"),
        ("<question>1+1? <answer>\\boxed{2}</answer></question>", "nested"),
        ("<question>1+1?</question><answer>2</answer>", "unboxed"),
        ("<question>1+1?</question><answer>\\boxed{2</answer>", "unboxed"),
        ("<question>1+1?</question><answer>\\boxed{ }</answer>", "empty_answer"),
        ("<question>1+1?</question><answer>\\boxed{" + "9" * 300 + "}</answer>", "long_answer"),
    ],
)
def test_refused(text, reason):
    with pytest.raises(Unreadable, match=f"^{reason}$"):
        parse_proposal(text, MATHS)


def test_enormous_texts_are_read_in_linear_time():
    started = time.process_time()
    for text in ("<question>" * 100_000, "{" * 1_000_000, "<question>x</question><answer>\\boxed{" * 20_000):
        with pytest.raises(Unreadable):
            parse_proposal(text, MATHS)
    assert time.process_time() - started < 5  # quadratic would be hours


def test_other_tags_without_a_box():
    machine = ProposalFormat(question=["{", "}"], answer=["(", ")"], boxed=False)
    assert parse_proposal("{Qr.....abcd}rbcda(bcda)", machine) == Question("Qr.....abcd", "bcda")


def test_sets_are_consecutive_blocks_and_duplicates_stay():
    questions = [Question(f"q{index // 2}", "1") for index in range(12)]
    sets = partition(questions, 3, 4)
    assert [question for part in sets for question in part] == questions
    assert [len(part) for part in sets] == [4, 4, 4]
    assert unique_share(questions) == 0.5
    assert digest(sets[0]) != digest(sets[1])
    assert digest([Question("a", "bc")]) != digest([Question("ab", "c")])
