"""The string machine: its operations, and that demonstrations are what they are said to be."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain.data.string_machine import (
    RIGHT,
    Item,
    apply,
    is_right,
    read_question,
    string_machine,
    write_question,
)
from posttrain.data.tasks import make_task
from posttrain.recipe.soar_schema import ProposalFormat
from posttrain.soar.proposals import Unreadable, parse_proposal

FORMAT = ProposalFormat(question=["{", "}"], answer=["(", ")"], boxed=False)


def test_operations_by_hand():
    assert [apply(operation, "abcd") for operation in "rsv"] == ["bcda", "bacd", "dcba"]
    item = Item("Q", "abcd", "rsv")
    assert item.states == ["bcda", "cbda", "adbc"]
    assert write_question(item) == "Qrsv...abcd"
    assert read_question("Qrsv...abcd") == item


@pytest.mark.parametrize(
    "text",
    ["", "Q", "Qrsvabcd", "Qrsv...aacd", "Qr.v...abcd", "Xrsv...abcd", "Qrsv...abcz", "Qrsv...abcd:"],
)
def test_what_is_no_question(text):
    assert read_question(text) is None


def test_worked_and_exam_rows():
    for row in make_task("string_machine", size=20, seed=0, split="train", mode="worked"):
        item = read_question("Q" + row.prompt[1:])
        assert (
            row.columns["completion"]
            == "".join(map("".join, zip(item.operations, item.states, strict=True))) + f"</think>{row.answer}"
        )
        assert row.answer == item.answer
    rng = np.random.default_rng(0)
    rows = [string_machine(rng, min_operations=2, max_operations=2, persistence=0.5) for _ in range(1000)]
    solved = [row.demonstration.endswith(f"</think>{row.answer}") for row in rows]
    assert np.mean(solved) == pytest.approx(0.25, abs=0.05)


def test_what_came_out_is_said_again():
    """After each time with the same chance, four times at most; not where the exam was given up."""
    rng = np.random.default_rng(0)
    settings = {"min_operations": 2, "max_operations": 2, "persistence": 0.7, "restate": 0.4}
    rows = [string_machine(rng, **settings) for _ in range(2000)]
    times = []
    for row in rows:
        working, _, answer = row.demonstration.partition("</think>")
        assert row.columns == {"operations": "2"}
        finished = len(working) >= 2 * 5
        again = working[10:]
        assert again == f"={row.answer}" * (len(again) // 5)
        if finished:
            assert answer == row.answer
            times.append(len(again) // 5)
    assert np.mean(np.array(times) > 0) == pytest.approx(0.4, abs=0.05)
    assert max(times) == 4
    assert len(times) / len(rows) == pytest.approx(0.49, abs=0.04)


def test_proposals_are_right_as_often_as_they_should_be():
    rng = np.random.default_rng(0)
    texts = [string_machine(rng, mode="teacher").demonstration for _ in range(3000)]
    items, right = [], []
    for text in texts:
        try:
            found = parse_proposal(text, FORMAT)
        except Unreadable:
            continue
        item = read_question(found.question)
        items.append(item)
        right.append(is_right(item, found.answer))
    assert len(items) / len(texts) == pytest.approx(0.95, abs=0.02)
    by_length = [
        np.mean(
            [
                ok
                for item, ok in zip(items, right, strict=True)
                if len(item.operations) == k and item.header == "Q"
            ]
        )
        for k in range(7)
    ]
    assert by_length == pytest.approx(list(RIGHT), abs=0.12)
    assert all(ok for item, ok in zip(items, right, strict=True) if item.header == "Z")
