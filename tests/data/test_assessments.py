from __future__ import annotations

import numpy as np
import pytest

from posttrain.data.assessments import SHORT
from posttrain.data.self_predictions import meta_example, parse_prediction
from posttrain.data.tasks import BASIC, make_task
from posttrain.errors import DataError
from posttrain.rollout.types import Example


@pytest.mark.parametrize("name", [task.__name__ for task in BASIC])
def test_rows_are_what_the_method_asks_for_and_reads(name):
    rows = make_task(f"meta_{name}", size=200, seed=0, split="train")
    read = [parse_prediction(row.columns["completion"], SHORT) for row in rows]
    assert all(prediction.complete for prediction in read)
    assert all(parse_prediction(row.answer, SHORT.model_copy(update={"parser": "official"})) == prediction
               for row, prediction in zip(rows, read, strict=True))  # fmt: skip
    problems = [row.prompt.removeprefix("assess ") for row in rows]
    asked = [meta_example(Example("x", problem, ""), SHORT, 48).prompt for problem in problems]
    assert asked == [row.prompt for row in rows]
    assert not any(n in p for p, made in zip(problems, read, strict=True) for n in made.notions)
    rates = np.array([prediction.pass_rate for prediction in read])
    assert 0.6 < (rates >= 6).mean() < 0.85  # 0.6 + 0.4 / 3 of them
    assert set(rates) == set(range(9))


def test_rows_stay_in_their_split_and_take_the_tasks_arguments():
    asked = make_task("meta_arithmetic", size=200, seed=0, split="test", max_term=6)
    solved = make_task("arithmetic", size=1500, seed=1, split="train", max_term=6)
    assert not {row.prompt for row in solved} & {row.prompt.removeprefix("assess ") for row in asked}
    mixed = make_task("meta_arithmetic", size=400, seed=0, split="train", max_term=6, slips=0.6, solved=0.7)
    asked_too = [row for row in mixed if row.prompt.startswith("assess ")]
    assert len(asked_too) / 400 == pytest.approx(0.3, abs=0.07)
    assert all("<think>" in row.columns["completion"] for row in mixed if row not in asked_too)
    with pytest.raises(DataError, match=r"no argument 'terms'; known: min_terms.*solved"):
        make_task("meta_arithmetic", size=1, seed=0, split="train", terms=3)
