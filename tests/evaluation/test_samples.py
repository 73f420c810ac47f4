import numpy as np
import pytest

from posttrain.evaluation.samples import group_by_problem, problem_values
from posttrain.evaluation.table import compare


def row(problem, correct, length=3, role="solution", vote="0"):
    text = f"So it is\n#### {vote}"
    return {"example_id": problem, "role": role, "correct": correct, "length": length, "completion": text}


ROWS = [
    row("p", True, 2, vote="4"),
    row("q", None, 9),
    row("p", False, 4, vote="5"),
    row("q", None, 5),
    row("p", True, 6, vote="4"),
    row("p", False, 99, role="greedy"),
    row("r", True, 1, vote="7"),
    row("r", True, 1, vote="7"),
    row("r", True, 1, vote="7"),
    row("r", True, 1, role="greedy"),
]


def test_rows_become_problems_and_greedy_is_kept_apart():
    problems = group_by_problem(ROWS)
    assert list(problems) == ["p", "q", "r"]
    assert problems["p"].correct == [True, False, True]
    assert problems["p"].lengths == [2, 4, 6]
    assert problems["p"].votes == ["4", "5", "4"]
    assert problems["p"].greedy is False
    assert problems["q"].greedy is None


@pytest.mark.parametrize(
    ("metric", "values"),
    [
        ("pass@1", [2 / 3, np.nan, 1.0]),
        ("pass@2", [1.0, np.nan, 1.0]),
        ("maj@3", [1.0, np.nan, 1.0]),
        ("maj@2", [2 / 3, np.nan, 1.0]),
        ("greedy", [0.0, np.nan, 1.0]),
        ("mean_length", [4.0, 7.0, 1.0]),
    ],
)
def test_values_of_each_metric(metric, values):
    problems = list(group_by_problem(ROWS).values())
    np.testing.assert_allclose(problem_values(metric, problems), values)


def test_unknown_metric_is_named():
    with pytest.raises(ValueError, match="unknown metric 'best@4'"):
        problem_values("best@4", [])


def test_comparison_is_paired_by_problem_whatever_the_order():
    before = group_by_problem([row("a", False), row("b", True), row("c", False), row("d", None)])
    after = group_by_problem([row("c", True), row("b", False), row("a", True), row("d", True)])
    result = compare(before, after, ["pass@1"])["pass@1"]
    assert result.difference.value == pytest.approx(1 / 3)
    assert (result.difference.n, result.difference.left_out) == (3, 1)
    assert (result.rose, result.fell) == (2, 1)


def test_other_problems_are_not_compared():
    before, after = group_by_problem([row("a", True)]), group_by_problem([row("b", True)])
    assert compare(before, after, ["pass@1"]) == {}


def test_metric_that_no_problem_has_is_not_compared():
    problems = group_by_problem([row("a", True)])
    assert compare(problems, problems, ["greedy"]) == {}
