from __future__ import annotations

import re

import numpy as np
import pytest

from posttrain.data.answers import extract_answer
from posttrain.data.tasks import SPLITS, TASKS, make_task, split_of
from posttrain.errors import DataError


def values_of(question):
    return [int(number) for number in re.findall(r"[+-]?\d+", question)]


NO_MISTAKES = {"string_machine": {"mode": "worked"}}
"""Arguments of tasks whose demonstrators are fallible unless told otherwise."""


@pytest.mark.parametrize("task", sorted(TASKS))
def test_demonstrations_end_in_the_right_answer_and_rows_differ(task):
    rows = make_task(task, size=100, seed=0, split="train", **NO_MISTAKES.get(task, {}))
    assert len({row.id for row in rows}) == 100
    assert len({row.prompt for row in rows}) == 100 or task == "calculator"  # whose easy problems are few
    for row in rows:
        written = row.columns["completion"]
        text = written if isinstance(written, str) else written[-1]["content"]
        assert extract_answer(text) == row.answer


def test_answers_are_right():
    for row in make_task("arithmetic", size=300, seed=1, split="test", min_terms=2, max_terms=6):
        assert int(row.answer) == sum(values_of(row.prompt))
        assert int(row.columns["terms"]) == len(values_of(row.prompt))
    for row in make_task("largest", size=100, seed=1, split="train"):
        assert int(row.answer) == max(values_of(row.prompt))
    for row in make_task("addition", size=100, seed=1, split="train"):
        assert int(row.answer) == sum(values_of(row.prompt))
    for row in make_task("reversing", size=100, seed=1, split="train"):
        assert row.answer == row.prompt.removeprefix("reverse ")[::-1]
    for row in make_task("counting", size=100, seed=1, split="train"):
        _, letter, _, word = row.prompt.split()
        assert int(row.answer) == word.count(letter)


def test_every_step_of_a_faultless_demonstration_is_right():
    for row in make_task("arithmetic", size=200, seed=2, split="train"):
        steps = re.findall(r"(-?\d+)([+-]\d+)=(-?\d+)", row.columns["completion"])
        assert len(steps) == 3
        assert all(int(a) + int(b) == int(c) for a, b, c in steps)


def test_some_demonstrations_write_the_last_step_twice():
    rows = make_task("arithmetic", size=400, seed=2, split="train", restate=0.25)
    steps = [re.findall(r"[-+\d]+=-?\d+", row.columns["completion"]) for row in rows]
    again = [own for own in steps if len(own) == 4]
    assert all(own[-1] == own[-2] for own in again)
    assert len(again) / 400 == pytest.approx(0.25, abs=0.06)
    assert all(row.answer == str(sum(values_of(row.prompt))) for row in rows)


def test_slips_keep_the_last_digit_at_their_rate_and_never_touch_the_answer():
    rows = make_task("arithmetic", size=2000, seed=0, split="train", slips=0.5)
    slipped = prone = 0
    for row in rows:
        assert int(row.answer) == sum(values_of(row.prompt))
        for a, b, c in re.findall(r"(-?\d+)([+-]\d+)=(-?\d+)", row.columns["completion"]):
            right, written = int(a) + int(b), int(c)
            assert written in (right, abs(right) % 10)
            if not 0 <= right <= 9:
                prone += 1
                slipped += written != right
    assert slipped / prone == pytest.approx(0.5, abs=0.03)


def test_splits_share_no_problem_whatever_the_seed_and_arguments():
    train = make_task("arithmetic", size=1500, seed=0, split="train", min_terms=3, max_terms=3)
    test = make_task("arithmetic", size=400, seed=7, split="test", min_terms=3, max_terms=3, slips=0.5)
    assert not {row.prompt for row in train} & {row.prompt for row in test}
    shares = np.mean([[split_of(f"{n}+{n}=") == split for split in SPLITS] for n in range(3000)], axis=0)
    assert shares == pytest.approx([0.2, 0.1, 0.7], abs=0.03)


def test_a_seed_gives_the_same_rows():
    first, again, other = (make_task("arithmetic", size=50, seed=seed, split="train") for seed in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "arithmatic"}, "unknown task 'arithmatic'; known: arithmetic"),
        ({"split": "dev"}, "no split 'dev'; known: test, validation, train"),
        ({"terms": 3}, "no argument 'terms'; known: min_terms"),
        ({"size": 500, "min_terms": 1, "max_terms": 1}, r"has only about \d problems in split 'train'"),
    ],
)
def test_bad_requests_say_what_there_is(options, message):
    options = {"name": "arithmetic", "size": 5, "seed": 0, "split": "train"} | options
    with pytest.raises(DataError, match=message):
        make_task(options.pop("name"), **options)
