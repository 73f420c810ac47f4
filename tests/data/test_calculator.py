"""The task for calculators."""

from collections import Counter

from posttrain.data.tasks import make_task, split_of


def rows(**args):
    return make_task("calculator", size=500, seed=0, split="train", **args)


def test_families_and_answers():
    made = rows()
    counts = Counter(row.columns["family"] for row in made)
    assert abs(counts["easy"] - 300) < 45
    assert abs(counts["hard"] - 100) < 35
    for row in made:
        expression = row.prompt.removesuffix("=")
        sign = "*" if "*" in expression else "+"
        one, other = expression.split(sign)
        value = int(one) * int(other) if sign == "*" else int(one) + int(other)
        assert row.answer == str(value)
        lengths = {"easy": ("+", 1, 1), "medium": ("+", 2, 2), "hard": ("*", 3, 2)}
        assert lengths[row.columns["family"]] == (sign, len(one), len(other))
        assert split_of(row.prompt) == "train"


def test_demonstrations_call_as_often_as_asked():
    calls = Counter(len(row.columns["completion"]) // 2 for row in rows())
    assert abs(calls[0] - 50) < 25
    assert abs(calls[2] - 135) < 40
    assert calls[0] + calls[1] + calls[2] == 500
    assert {len(row.columns["completion"]) for row in rows(tool=0)} == {1}
    twice = next(row for row in rows(tool=1, redundant=1))
    assert [message["role"] for message in twice.columns["completion"]] == ["assistant", "tool"] * 2 + [
        "assistant"
    ]
    assert twice.columns["completion"][1]["content"] == twice.answer
