"""Thinking that is made to go on: searches, whose chance of success is known, and numbered attempts."""

from __future__ import annotations

import math

import pytest
from helpers import make_tokenizer
from searching import CUE, STEPS, BestAnswers

from posttrain.data.search import chance_of_success
from posttrain.evaluation.continuation import forced_on, search_on
from posttrain.evaluation.thinking import Trace, thinking_metrics
from posttrain.recipe.mrt_schema import ContinuationConfig, LinearConfig, ProbeConfig
from posttrain.recipe.schema import EvaluateStage
from posttrain.rollout.probes import MetaProver
from posttrain.rollout.tokens import decode_texts, make_completions
from posttrain.rollout.types import Example, Rollout, RolloutRequest, Sampling


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


class Searcher(BestAnswers):
    """Tries the least candidate that was not tried yet, once, and ends its thinking."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.asked = []

    def answers(self, request):
        [text] = decode_texts(self.tokenizer, [list(request.prompt_ids)])
        question, _, thinking = text.partition("<think>")
        if thinking.endswith("</think>"):
            return super().answers(request)
        assert request.given == text.removeprefix(question)
        self.asked.append((thinking, request.sampling.max_tokens))
        tried = {episode[1] for episode in thinking.split(";") if episode.startswith("T")}
        left = next(f"{c:x}" for c in range(1, 11) if f"{c:x}" not in tried)
        a, p = int(question[0], 16), int(question[-1], 16)
        product = a * int(left, 16) % p
        verdict = "Y" if f"{product:x}" == question[3] else "N"
        ids = self.tokenizer(f"T{left}:{product:x}{verdict};</think>{left}<|im_end|>")["input_ids"]
        limit = request.sampling.max_tokens
        return make_completions(
            self.tokenizer, [ids[:limit]], [[0.0] * len(ids[:limit])], [len(ids) <= limit], [None]
        )


def rollout_of(tokenizer, prompt, completion, answer, cap):
    ids = tokenizer(completion)["input_ids"]
    [made] = make_completions(tokenizer, [ids], [[0.0] * len(ids)], [True], [None])
    example = Example(prompt, prompt, answer)
    return Rollout(
        RolloutRequest(tuple(tokenizer(prompt)["input_ids"]), example, prompt, Sampling(cap, seed=3)),
        made,
        0,
        0,
    )


def by_answer(rollouts):
    """A reward: whether what follows the thinking is the answer."""
    for rollout in rollouts:
        given = (rollout.request.given + rollout.completion.text).rpartition("</think>")[2]
        rollout.reward = float(given == rollout.request.example.answer)


def is_right(rollout):
    return None if rollout.reward is None else rollout.reward == 1.0


def make_prover(tokenizer, engine, branches=60):
    config = ProbeConfig(episodes=STEPS, branches=branches, cue=CUE, max_tokens=1)
    return MetaProver(engine, tokenizer, by_answer, config)


def test_thinking_goes_on_for_so_many_tokens_and_finds_what_there_is(tokenizer):
    # 3x = 5 (mod 11) is solved by 9. One episode of six tokens was thought; the cap is 40 tokens.
    trace = rollout_of(tokenizer, "3x=5%b", "<think>T1:3N;</think>4<|im_end|>", "9", 40)
    engine = Searcher(tokenizer)
    config = ContinuationConfig(shares=[0.5, 1.2], words=["W;", "W;W;"])
    [values] = forced_on([trace], make_prover(tokenizer, engine), config, is_right)
    # +50 % is 20 tokens: W; and a try, W;W; and a try are 18, and another W; would leave no room for a try.
    assert [thinking for thinking, _ in engine.asked[:2]] == ["T1:3N;W;", "T1:3N;W;T2:6N;W;W;"]
    assert [limit for _, limit in engine.asked[:2]] == [18, 8]
    after = chance_of_success("3x=5%b", "T1:3N;W;T2:6N;W;W;T3:9N;")
    assert values[0] == pytest.approx(after, abs=0.15)
    # +120 % is 48 tokens, where four or five tries of eight or ten tokens have been added.
    last = engine.asked[-1][0]
    assert 5 <= last.count("T") <= 8
    assert values[1] > values[0]


def test_an_unfinished_episode_is_dropped(tokenizer):
    trace = rollout_of(tokenizer, "3x=5%b", "<think>T1:3N;</think>4<|im_end|>", "9", 10)
    engine = Searcher(tokenizer)
    prover = make_prover(tokenizer, engine, branches=1)
    forced_on([trace], prover, ContinuationConfig(shares=[0.5], words=["W;"]), is_right)
    assert engine.asked == [("T1:3N;W;", 3)]  # five tokens more are W; and three of T2:6N;
    assert decode_texts(tokenizer, [list(prover.prompts[-1])]) == [f"3x=5%b<think>T1:3N;W;{CUE}"]


def test_without_room_thinking_stays_as_it_is(tokenizer):
    trace = rollout_of(tokenizer, "3x=5%b", "<think>T1:3N;</think>4<|im_end|>", "9", 40)
    engine = Searcher(tokenizer)
    engine.max_model_len = 12
    config = ContinuationConfig(shares=[0.5], words=["W;"])
    [[value]] = forced_on([trace], make_prover(tokenizer, engine), config, is_right)
    assert math.isnan(value)
    assert engine.asked == []


class Counter:
    """Writes A1, A2, … whatever it is asked."""

    version = 0
    max_model_len = 256

    def __init__(self, tokenizer):
        self.tokenizer, self.prompts = tokenizer, []

    def generate(self, requests):
        made = []
        for request in requests:
            self.prompts.append(decode_texts(self.tokenizer, [list(request.prompt_ids)])[0])
            ids = self.tokenizer(f"A{len(self.prompts)}<|im_end|>")["input_ids"]
            made.append(make_completions(self.tokenizer, [ids], [[0.0] * 3], [True], [None]))
        return made


@pytest.mark.parametrize(("window", "kept"), [(1, "Back\nA2"), (2, "Back\nA1\nBack\nA2")])
def test_a_search_without_an_end_forgets_old_attempts(tokenizer, window, kept):
    engine = Counter(tokenizer)
    episodes = {"separator": "\n", "markers": ["Back"], "min_gap": 1}
    prover = MetaProver(engine, tokenizer, by_answer, ProbeConfig(episodes=episodes))

    def score(rollouts):
        for rollout in rollouts:
            rollout.reward = float(rollout.completion.text == "A2")

    trace = rollout_of(tokenizer, "q", "A0<|im_end|>", "A2", 20)
    score([trace])
    config = LinearConfig(window=window, word="\nBack\n")
    [chain] = search_on([trace], prover, config, 40, score, is_right)
    # Three tokens an attempt, six each time it is told to go on.
    assert chain == [(3, False), (12, False), (21, True), (30, False), (39, False)]
    assert engine.prompts[0] == "qA0\nBack\n"
    assert engine.prompts[2] == f"q{kept}\nBack\n"


def test_metrics_of_going_on():
    stage = EvaluateStage(
        metrics=["continuation", "linearized"],
        samples=3,
        thinking={"budgets": [8, 20, 40], "continuation": {"shares": [0.5, 1.0]}},
    )

    def trace(problem, success, continued, chain, vote):
        return Trace(problem, [9.0], [success], [[success] * 4], continued, chain, vote)

    traces = [
        trace("a", 0.5, [0.6, 0.7], [(10, False), (30, True)], "1"),
        trace("a", 0.7, [0.4, math.nan], [(10, True)], "2"),
        trace("a", 0.6, [0.5, 0.9], [(10, True)], "2"),
        Trace("b", [], [], [], [math.nan, math.nan]),
    ]
    metrics = thinking_metrics(stage, traces)
    value = {name: metric.value for name, metric in metrics.items()}
    assert value["continued@+0%"] == pytest.approx(0.6)
    assert value["continued@+50%"] == pytest.approx(0.5)
    assert value["continued@+100%"] == pytest.approx(0.8)
    assert [value[f"linear@{budget}"] for budget in (8, 20, 40)] == pytest.approx([0, 2 / 3, 1])
    # One sample has 10 tokens: none fits into 8, two into 20, all three into 40.
    assert value["parallel@8"] == 0
    assert value["parallel@20"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert value["parallel@40"] == 1
    assert metrics["linear@40"].n == 1
