import pytest
from rewards.score_server import serving
from rewards.test_registry import spec

from posttrain.errors import RecipeError
from posttrain.rewards.trial import (
    CODE,
    MATHS,
    Case,
    _Outcome,
    _preferred,
    gold_examples,
    make_cases,
    try_reward,
)
from posttrain.rollout.types import Example


def found(trial):
    return {check.name: check.passed for check in trial.checks}


def test_cases():
    cases = make_cases(MATHS[:1])
    gold, *rest = cases
    assert (gold.kind, gold.text, gold.right) == ("gold", "The answer is \\boxed{42}.", True)
    kinds = {case.kind: case for case in rest}
    assert kinds["empty text"].right is False
    assert kinds["copy of the prompt"].text == MATHS[0].prompt
    assert kinds["answer that is a number"].example.answer == 7
    assert kinds["answer that is a number"].right is None
    assert any("\ud83d" in case.text for case in rest)
    assert max(len(case.text) for case in rest) > 100_000


def test_nothing_is_asked_of_a_text_that_has_the_answer_or_of_a_sample_without_one():
    copied = make_cases([Example("a", "Say 42.", "42")])
    assert {case.right for case in copied if case.kind == "copy of the prompt"} == {None}
    shown = make_cases([Example("a", "p", None, {"completion": "so"})])
    assert shown[0].text == "so"
    assert {case.right for case in shown[1:]} == {None}


def test_a_built_in_passes():
    trial = try_reward(spec("numeric_match"), gold_examples(spec("numeric_match")))
    assert trial.failed == []
    assert {name for name, passed in found(trial).items() if passed} == {
        "range", "deterministic", "time", "process", "any text", "gold", "adversarial",
    }  # fmt: skip


def test_each_built_in_has_gold_samples():
    args = {"format": {"tags": ["think", "answer"]}}
    for name in ("math_answer", "exact_match", "length_penalty", "format"):
        assert make_cases(gold_examples(spec(name, args=args.get(name, {}))))[0].right
    assert gold_examples(spec("code")) == [CODE]
    assert [example.columns["source_dataset"] for example in gold_examples(spec("reasoning_gym"))]
    with pytest.raises(RecipeError, match=r"no samples to try reward 'format' on: give some with --data"):
        try_reward(spec("format", args={"pattern": "a"}), gold_examples(spec("format")))


BAD = """
import itertools, os, time
from posttrain import reward
numbers = itertools.count(1)

@reward("too_kind", range=(0, 1))
def too_kind(completion, example):
    return 1.0

@reward("too_strict", range=(0, 1))
def too_strict(completion, example):
    return 0.0

@reward("drifts")
def drifts(completion, example):
    return next(numbers)

@reward("out_of_range", range=(0, 1))
def out_of_range(completion, example):
    return 1.5

@reward("breaks")
def breaks(completion, example):
    return completion.text.split()[0] == "The" and "42" in completion.text

@reward("exits", timeout=5.0)
def exits(completion, example):
    if completion.text == "":
        os._exit(1)
    return float("42" in completion.text)

@reward("hangs", timeout=0.2)
def hangs(completion, example):
    while "often" in completion.text or completion.text.count("boxed") > 1000:
        pass
    return 1.0 if example.answer is not None and str(example.answer) in completion.text else 0.0

@reward("short", batched=True)
def short(completions, examples):
    return [1.0]

@reward("undeclared", deterministic=False)
def undeclared(completion, example):
    return next(numbers)
"""


@pytest.mark.parametrize(
    ("name", "failed"),
    [
        ("too_kind", ["adversarial"]),
        ("too_strict", ["gold"]),
        ("drifts", ["deterministic", "adversarial"]),
        ("out_of_range", ["range", "gold"]),
        ("breaks", ["any text"]),
        ("exits", ["process"]),
        ("hangs", ["time"]),
        ("short", ["length", "gold"]),
        ("undeclared", ["adversarial"]),
    ],
)
def test_bad_rewards_fail(tmp_path, name, failed):
    (tmp_path / "bad.py").write_text(BAD)
    trial = try_reward(spec(name, **{"from": str(tmp_path / "bad.py")}), MATHS[:1])
    assert trial.failed == failed, {check.name: check.text for check in trial.checks}


def test_a_level_of_acceptance(tmp_path):
    (tmp_path / "half.py").write_text(
        "from posttrain import reward\n"
        "@reward('half', range=(0, 1))\n"
        "def half(completion, example): return 0.5 if '42' in completion.text else 0.2\n"
    )
    own = spec("half", **{"from": str(tmp_path / "half.py")})
    assert try_reward(own, MATHS[:1]).failed == ["gold"]
    assert try_reward(own, MATHS[:1], accept=0.5).failed == []


def test_a_relative_reward_is_tried_beside_the_right_completion(tmp_path):
    (tmp_path / "best.py").write_text(
        "from posttrain import reward\n"
        "@reward('best', range=(0, 1), batched=True)\n"
        "def best(completions, examples):\n"
        "    right = ['42' in completion.text for completion in completions]\n"
        "    return [0.5 if all(right) or not any(right) else float(one) for one in right]\n"
    )
    own = spec("best", **{"from": str(tmp_path / "best.py")})
    assert try_reward(own, MATHS[:1], accept=0.5).failed == []
    assert try_reward(own, MATHS[:1], accept=0.6).failed == ["gold"]


@pytest.mark.parametrize(("wrong", "passed"), [(-3.5, True), (-2.0, False), (None, None)])
def test_scores_of_a_reward_model_are_compared_with_each_other(wrong, passed):
    example = MATHS[0]
    outcomes = [_Outcome(Case("gold", example, "42", True), -2.0, "")]
    outcomes += [
        _Outcome(Case("empty text", example, "", False), wrong, "" if wrong else "exception: no"),
        _Outcome(Case("copy of the prompt", example, "", None), 5.0, ""),
    ]
    assert _preferred(outcomes).passed is passed


def test_a_server_is_tried_too():
    """A trial waits for nobody, and shows what was counted."""

    def rule(body):
        return {"score": float(body["answer"] is not None and str(body["answer"]) in body["completion"])}

    args = {"range": [0, 1], "retries": 0, "timeout": 5}
    with serving(rule) as server:
        style = spec("style", use="http", args={**args, "url": server.url})
        trial = try_reward(style, MATHS)
        requests = len(server.seen)
    assert trial.failed == []
    assert trial.checks[-1].text == f"{requests // 2} requests"  # all cases are tried twice
    trial = try_reward(style, MATHS)
    assert "server" in trial.failed
    assert any(f"unavailable: {server.url} failed" in check.text for check in trial.checks)
