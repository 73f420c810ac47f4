from __future__ import annotations

import re

import numpy as np
import pytest

from posttrain.data.error_analysis import (
    cause,
    parting,
    read_steps,
    solve,
    spoilt,
    write_analysis,
    write_solution,
)
from posttrain.data.tasks import make_task

ROWS = {"size": 250, "seed": 0, "split": "train", "min_terms": 2, "max_terms": 4, "max_term": 20}
COMPARISON = re.compile(r"compare (.+=)\n-(<think>.*</think>-?\d+)\n\+(<think>.*</think>-?\d+)")
ANALYSIS = re.compile(r"at (.+);why (ones|tens|sign|term);rule (-?\d+[+-]\d+=-?\d+|end)")


def right_steps(question):
    return solve([int(number) for number in re.findall(r"[+-]?\d+", question)])


def test_an_analysis_says_where_why_and_what_instead():
    right = ["12+15=27", "27-18=9", "9+4=13"]
    assert solve([12, 15, -18, 4]) == right
    wrong = ["12+15=27", "27-18=8", "8+4=12"]
    assert parting(wrong, right) == 1
    assert write_analysis(wrong, right) == "at 27-18=8;why ones;rule 27-18=9"
    assert write_analysis(wrong, right, "27-18=7") == "at 27-18=8;why ones;rule 27-18=7"
    assert write_analysis(right[:1], right) == "at end;why term;rule 27-18=9"
    assert write_analysis([*right, "13+1=14"], right) == "at 13+1=14;why term;rule end"
    assert read_steps(write_solution(wrong)) == wrong
    assert read_steps("12") == []


@pytest.mark.parametrize(
    ("wrong", "why"),
    [("3-9=-5", "ones"), ("3-9=6", "sign"), ("3-9=4", "tens"), ("3+9=12", "term"), ("3-9=x", "term")],
)
def test_causes(wrong, why):
    assert cause(wrong, "3-9=-6") == why


def test_a_rule_decides_where_it_is_about_a_step():
    assert solve([3, -9, 4], "3-9=-5") == ["3-9=-5", "-5+4=-1"]
    assert solve([3, -9, 4], "13-9=4") == solve([3, -9, 4]) == solve([3, -9, 4], "end")
    assert solve([13, -9], "3-9=1") == ["13-9=4"]
    rng = np.random.default_rng(0)
    assert {spoilt("3-9=-6", rng) for _ in range(60)} == {f"3-9={n}" for n in (-16, -8, -7, -5, -4, 4)}
    assert spoilt("end", rng) == "end"


def test_rows_of_analyses_compare_a_wrong_with_a_right_solution():
    rows = make_task("error_analysis", **ROWS)
    causes = set()
    for row in rows:
        found = re.fullmatch(
            r"compare (.+=)\n-(<think>.*</think>-?\d+)\n\+(<think>.*</think>-?\d+)", row.prompt
        )
        question, wrong, right = found.groups()
        assert read_steps(right) == right_steps(question)
        assert int(wrong.rpartition(">")[2]) != int(right.rpartition(">")[2])
        at, why, rule = ANALYSIS.fullmatch(row.columns["completion"]).groups()
        number = parting(read_steps(wrong), read_steps(right))
        assert at == ([*read_steps(wrong), "end"])[number]
        assert rule == read_steps(right)[number]
        causes.add(why)
    assert causes == {"ones", "tens", "sign", "term"}
    noisy = make_task("error_analysis", **ROWS, noise=0.3)
    wrong = sum(not true_rule(row.columns["completion"]) for row in noisy)
    assert wrong / len(noisy) == pytest.approx(0.3, abs=0.09)


def true_rule(analysis):
    rule = ANALYSIS.fullmatch(analysis)[3]
    a, b, c = re.fullmatch(r"(-?\d+)([+-]\d+)=(-?\d+)", rule).groups()
    return int(a) + int(b) == int(c)


def test_rows_of_replays_follow_the_analysis():
    rows = make_task("error_replay", **ROWS, misled=0.3, unrelated=0.25)
    misled = unrelated = 0
    for row in rows:
        analysis, question = re.fullmatch(r"(.+)\nsolve (.+=)", row.prompt).groups()
        rule = ANALYSIS.fullmatch(analysis)[3]
        numbers = [int(number) for number in re.findall(r"[+-]?\d+", question)]
        steps = read_steps(row.columns["completion"])
        assert int(row.answer) == sum(numbers)
        assert steps == solve(numbers, rule)
        misled += not true_rule(analysis)
        unrelated += rule.partition("=")[0] not in [step.partition("=")[0] for step in steps]
    assert misled / len(rows) == pytest.approx(0.3, abs=0.09)
    assert unrelated / len(rows) == pytest.approx(0.25, abs=0.09)


def test_splits_share_no_problem_and_rows_fit_the_tiny_model():
    train, test = (
        make_task("error_replay", size=150, seed=seed, split=split)
        for seed, split in ((0, "train"), (1, "test"))
    )
    questions = [{row.prompt.partition("solve ")[2] for row in rows} for rows in (train, test)]
    assert not questions[0] & questions[1]
    analyses = make_task("error_analysis", **ROWS | {"max_terms": 3})
    assert max(len(row.prompt) + len(row.columns["completion"]) for row in analyses) < 160
