"""Gates by hand: what ten problems can and cannot show, and what is said about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.evaluation.gates import decide, gate_lines
from posttrain.evaluation.samples import Problem
from posttrain.recipe.gate_schema import StageGate


def problems(outcomes, lengths=None):
    """One sample of every problem; outcomes as digits, `-` for one without a score."""
    lengths = lengths or [10.0] * len(outcomes)
    return {
        str(number): Problem([None if outcome == "-" else outcome == "1"], [length], [None])
        for number, (outcome, length) in enumerate(zip(outcomes, lengths, strict=True))
    }


def decided(gate, before, after, metrics=("pass@1",)):
    return decide(StageGate.parse(gate), "01-before", before, after, metrics, 0.95)


@pytest.mark.parametrize(
    ("before", "after", "gate", "interval", "passed"),
    [
        # Six of ten more: resampled means are Binomial(10, 0.6) / 10. The bias is 0.492, z0 = -0.019, the
        # acceleration -0.48 / (6 · 2.4^1.5) = -0.0215: the ends are the quantiles at 0.0185 and 0.967.
        ("0000000000", "1111110000", "pass@1 > before", (0.3, 0.9), True),
        ("0000000000", "1111110000", "pass@1 > before + 0.2", (0.3, 0.9), True),
        ("0000000000", "1111110000", "pass@1 > before + 0.3", (0.3, 0.9), False),
        # Two of ten: the quantile at 0.057 of Binomial(10, 0.2) / 10, of which 0.107 are 0.
        ("0000000000", "1100000000", "pass@1 > before", (0.0, 0.5), False),
        # The same shares, 0.5 and 0.7, from other problems: four rise and two fall. That is less.
        ("1111100000", "1110011110", "pass@1 > before", (-0.3, 0.6), False),
        ("1111100000", "1111111000", "pass@1 > before - 0.05", (0.0, 0.5), True),
        # The same outcomes: nothing changed, and that is not more.
        ("1010101010", "1010101010", "pass@1 > before", (0.0, 0.0), False),
        ("1010101010", "1010101010", "pass@1 > before - 0.01", (0.0, 0.0), True),
        # A problem without a score in one of the two is left out.
        ("-000000000-", "1111110000-", "pass@1 > before", None, True),
    ],
)
def test_ten_problems(before, after, gate, interval, passed):
    outcome = decided(gate, problems(before), problems(after))
    row = outcome["table"][0]
    if interval is None:
        assert row["difference"]["n"] == 9
    else:
        assert (row["difference"]["low"], row["difference"]["high"]) == pytest.approx(interval, abs=1e-9)
    assert outcome["passed"] is passed
    assert ("is not" in outcome["reason"]) is not passed


def test_less_is_below():
    before = problems("1111", [20.0, 30.0, 40.0, 50.0])
    after = problems("1111", [18.0, 27.0, 36.0, 45.0])
    assert decided("mean_length < before", before, after)["passed"]
    assert not decided("mean_length > before", before, after)["passed"]
    # 3.5 tokens less, from 4.5 to 2.5
    assert decided("mean_length < before - 2", before, after)["passed"]
    assert not decided("mean_length < before - 3", before, after)["passed"]


def test_one_problem_shows_nothing():
    outcome = decided("pass@1 > before", problems("0"), problems("1"))
    assert not outcome["passed"]
    assert outcome["reason"].endswith("over 1 problems is not known")
    cells = gate_lines("02-after", outcome)[2].split()
    assert cells == ["pass@1", "0.000", "1.000", "+1.000", "unknown", "1"]


def test_other_problems_are_no_pairs():
    outcome = decided("pass@1 > before", problems("00"), problems("111"))
    assert not outcome["passed"]
    assert outcome["reason"] == "the two stages share only 2 of 2 and 3 problems"
    assert len(gate_lines("02-after", outcome)) == 1


def test_the_table_has_the_other_metrics_too():
    before, after = problems("00000", [9.0] * 5), problems("00001", [7.0] * 5)
    lines = gate_lines("02-after", decided("pass@1 > before", before, after, ["mean_length", "pass@1"]))
    assert lines[0].startswith("gate pass@1 > before: not passed, the 95% interval of the paired difference ")
    assert [line.split()[0] for line in lines[1:]] == ["metric", "pass@1", "mean_length"]
    assert lines[3].split() == ["mean_length", "9.0", "7.0", "-2.0", "[-2.0,", "-2.0]", "5"]


def test_the_table_of_the_documentation():
    """Of ten problems two more are solved, and answers are a token shorter on average."""
    lengths = [20.0 + number for number in range(10)]
    before = problems("1111100000", lengths)
    after = problems("1111111000", [length - number % 3 for number, length in enumerate(lengths)])
    outcome = decided("pass@1 > before", before, after, ["pass@1", "mean_length"])
    page = (Path(__file__).parents[2] / "docs" / "gates.md").read_text()
    assert "".join(f"   {line}\n" for line in gate_lines("03-after", outcome)) in page
    assert f"its gate {outcome['gate']} was not passed, since {outcome['reason']}." in page


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("pass@8>baseline", ("pass@8", ">", "baseline", 0.0)),
        ("mean_length <  warm-start - 12.5", ("mean_length", "<", "warm-start", -12.5)),
        ("maj@4 > before + .02", ("maj@4", ">", "before", 0.02)),
    ],
)
def test_gates_are_read_and_written(text, parts):
    gate = StageGate.parse(text)
    assert (gate.metric, gate.sign, gate.stage, gate.margin) == parts
    assert StageGate.parse(str(gate)) == gate


@pytest.mark.parametrize("text", ["pass@1", "pass@1 >= x", "pass@0 > x", "forecasts > x", "pass@1 > a b", ""])
def test_what_is_no_gate(text):
    with pytest.raises(ValueError, match=r"should be METRIC > STAGE|a gate needs a metric"):
        StageGate.parse(text)
