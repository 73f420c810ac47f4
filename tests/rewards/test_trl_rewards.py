"""TRL's own reward functions, unchanged, give here what they give there."""

import pytest
from rewards.scoring import make_rollouts, make_scorer

TEXTS = [
    "<think>\nr\n</think>\nso \\boxed{\\frac{1}{2}}",
    "<think>r</think> \\boxed{0.5}",
    "<think>r</think> \\boxed{\\frac{2}{4}} of it",
    "no thought \\boxed{1/3}",
    "<think>r \\boxed{\\frac{1}{2}}",
    "",
]
MESSAGES = [[{"role": "assistant", "content": text}] for text in TEXTS]
CHAT = [{"role": "user", "content": "What is a half?"}]


def score(name, **args):
    rollouts = make_rollouts(TEXTS, "1/2", prompt=CHAT, solution="$\\frac{1}{2}$")
    with make_scorer({"name": f"trl.rewards:{name}", "args": args, "timeout": 60.0}, workers=1) as scorer:
        report = scorer.score(rollouts)
    assert not report.error_lines
    return [rollout.reward for rollout in rollouts]


def test_functions():
    from trl.rewards import accuracy_reward, reasoning_accuracy_reward, think_format_reward

    solution = ["$\\frac{1}{2}$"] * len(TEXTS)
    assert score("accuracy_reward") == accuracy_reward(MESSAGES, solution)
    assert score("think_format_reward") == think_format_reward(MESSAGES)
    expected = reasoning_accuracy_reward(MESSAGES, solution, reasoning_delimiters=["r"])
    assert score("reasoning_accuracy_reward", reasoning_delimiters=["r"]) == expected


def test_functions_that_return_a_function():
    from trl.rewards import get_cosine_scaled_reward, get_soft_overlong_punishment

    ids = [list(range(len(text))) for text in TEXTS]
    cosine = get_cosine_scaled_reward(max_len=30)
    assert score("get_cosine_scaled_reward", max_len=30) == cosine(
        MESSAGES, ["$\\frac{1}{2}$"] * len(TEXTS), ids
    )
    overlong = get_soft_overlong_punishment(max_completion_len=30, soft_punish_cache=20)
    args = {"max_completion_len": 30, "soft_punish_cache": 20}
    assert score("get_soft_overlong_punishment", **args) == overlong(ids)


def test_length_penalty_is_that_of_trl():
    from trl.rewards import get_soft_overlong_punishment

    rollouts = make_rollouts(["x" * length for length in range(15)])
    with make_scorer({"name": "length_penalty", "args": {"max_tokens": 10, "buffer": 4}}) as scorer:
        scorer.score(rollouts)
    theirs = get_soft_overlong_punishment(10, 4)([list(range(length)) for length in range(15)])
    assert [rollout.reward for rollout in rollouts] == pytest.approx(theirs)


def test_math_answer_agrees_where_both_find_an_answer():
    from trl.rewards import accuracy_reward

    answers = ["\\frac{1}{2}", "0.5", "1/3", "50\\%", "\\frac{3}{6}", "(0,1)", "\\text{half}", "2^{-1}"]
    boxed = [f"it is $\\boxed{{{answer}}}$" for answer in answers]
    rollouts = make_rollouts(boxed, "$\\frac{1}{2}$")
    with make_scorer("math_answer") as scorer:
        scorer.score(rollouts)
    theirs = accuracy_reward([[{"content": text}] for text in boxed], ["$\\frac{1}{2}$"] * len(boxed))
    assert [rollout.reward for rollout in rollouts] == theirs
    assert set(theirs) == {0.0, 1.0}
