"""What the star stage keeps of searches that waste, with forced answers as good as can be."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import make_tokenizer
from searching import BestAnswers, probes, searches

from posttrain.data.search import chance_of_success, waste_of
from posttrain.recipe.schema import RewardOptions, RewardSpec, StarStage
from posttrain.rewards.scorer import Scorer
from posttrain.rollout.probes import MetaProver
from posttrain.stages.star import select


@pytest.fixture(scope="module")
def scored():
    """Twelve scored searches, the first of them with a wrong answer, and a prover."""
    tokenizer = make_tokenizer()
    rollouts = searches(tokenizer, 12)
    first = rollouts[0].completion
    rollouts[0].completion = replace(first, text=first.text[:-1] + "0")
    with Scorer([RewardSpec(name="exact_match")], RewardOptions(workers=1)) as scorer:
        scorer.score(rollouts)
        yield rollouts, MetaProver(BestAnswers(tokenizer), tokenizer, scorer.score, probes(12))


def kept(scored, selection):
    rollouts, prover = scored
    return select(StarStage(selection=selection), rollouts, prover)


def test_correct_keeps_right_traces_as_they_are(scored):
    rollouts, _ = scored
    assert kept(scored, "correct") == [(r, r.completion.text) for r in rollouts[1:]]


def test_best_prefix_ends_where_the_solution_is_found(scored):
    rows = kept(scored, "best_prefix")
    assert len(rows) == 12  # the wrong answer does not matter here: the thinking is right
    for rollout, completion in rows:
        thinking, _, answer = completion.removeprefix("<think>").partition("</think>")
        assert rollout.completion.text.startswith(f"<think>{thinking}")
        assert "!" not in completion
        assert answer == rollout.request.example.answer
        assert chance_of_success(rollout.request.example.prompt, thinking) == 1.0
    fillers = sum(waste_of(completion).fillers for _, completion in rows)
    assert fillers < sum(waste_of(rollout.completion.text).fillers for rollout, _ in rows)


def test_best_trace_keeps_one_of_a_prompt(scored):
    rollouts, prover = scored
    request = replace(rollouts[1].request, group="shared")
    long = replace(rollouts[1], request=request)
    text = long.completion.text.replace("Y;", "Y;W;W;W;")
    ids = tuple(make_tokenizer()(text)["input_ids"])
    longer = replace(long, index=1, completion=replace(long.completion, text=text, token_ids=ids))
    wrong = replace(long, index=2, reward=0.0)
    rows = select(StarStage(selection="best_trace"), [longer, long, wrong], prover)
    assert len(rows) == 1
    assert rows[0][1] in (text, long.completion.text)
