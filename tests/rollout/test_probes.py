"""Forced answers on the search task, where the chance of success after any beginning is known."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import make_tokenizer

from posttrain.data.search import chance_of_success
from posttrain.data.tasks import make_task
from posttrain.recipe.mrt_schema import ProbeConfig
from posttrain.recipe.schema import RewardOptions, RewardSpec
from posttrain.rewards.scorer import Scorer
from posttrain.rollout.probes import PROBE, Cut, MetaProver, success
from posttrain.rollout.tokens import decode_texts, make_completions
from posttrain.rollout.types import Rollout, RolloutRequest, Sampling

STEPS = {"separator": ";", "markers": [""], "min_gap": 1}
CUE = "!</think>"


class BestAnswers:
    """An engine that answers as well as can be: with what was found, else with a candidate not tried yet."""

    version = 0
    max_model_len = 256

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def generate(self, requests):
        return [self.answers(request) for request in requests]

    def answers(self, request):
        [text] = decode_texts(self.tokenizer, [list(request.prompt_ids)])
        question, _, thinking = text.partition("<think>")
        assert thinking.endswith("</think>")
        assert request.given == text.removeprefix(question)
        rng = np.random.default_rng(request.sampling.seed)
        found = [episode[1] for episode in thinking.split(";") if episode.endswith("Y")]
        tried = {episode[1] for episode in thinking.split(";") if episode.startswith("T")}
        left = [f"{c:x}" for c in range(1, int(question[-1], 16)) if f"{c:x}" not in tried]
        chosen = [found[0] if found else str(rng.choice(left)) for _ in range(request.sampling.n)]
        ids = [self.tokenizer(answer)["input_ids"] for answer in chosen]
        assert {len(row) for row in ids} == {1}
        return make_completions(self.tokenizer, ids, [[0.0]] * len(ids), [False] * len(ids))


@pytest.fixture(scope="module")
def asked():
    """The points of 20 traces, with 40 answers at each, and the prover that asked."""
    tokenizer = make_tokenizer()
    rollouts = []
    for example in make_task("search", size=20, seed=0, split="train", traces=True):
        ids = tuple(tokenizer(example.columns["completion"])["input_ids"])
        [completion] = make_completions(tokenizer, [list(ids)], [[0.0] * len(ids)], [True])
        request = RolloutRequest(
            tuple(tokenizer(example.prompt)["input_ids"]), example, example.id, Sampling(160, seed=7)
        )
        rollouts.append(Rollout(request, completion, 0, 0))
    config = ProbeConfig(episodes=STEPS, branches=40, cue=CUE, max_tokens=1)
    with Scorer([RewardSpec(name="exact_match")], RewardOptions(workers=1)) as scorer:
        prover = MetaProver(BestAnswers(tokenizer), tokenizer, scorer.score, config)
        return rollouts, prover.ask_everywhere(rollouts), prover


def test_estimates_are_the_known_chances(asked):
    rollouts, everywhere, _ = asked
    errors, known = [], []
    for rollout, points in zip(rollouts, everywhere, strict=True):
        for cut, answers in points:
            kept = rollout.completion.text[: cut.at - 1 + len("<think>")]  # the tag is one token
            chance = chance_of_success(rollout.request.example.prompt, kept)
            known.append(chance)
            errors.append(success(answers) - chance)
    assert len(known) > 150
    assert max(map(abs, errors)) < 0.35  # 40 answers: deviation at most 0.08
    assert abs(np.mean(errors)) < 0.02
    assert np.corrcoef(known, np.array(known) + errors)[0, 1] > 0.95


def test_points_lie_after_whole_episodes_and_the_last_after_the_tag(asked):
    rollouts, everywhere, _ = asked
    for rollout, points in zip(rollouts, everywhere, strict=True):
        texts = [rollout.completion.text[: cut.at - 1 + len("<think>")] for cut, _ in points[:-1]]
        assert texts[0] == "<think>"
        assert all(text.endswith(";") for text in texts[1:])
        assert [cut.forced for cut, _ in points] == [True] * (len(points) - 1) + [False]
        assert {answer.request.role for _, answers in points for answer in answers} == {PROBE}


def test_tokens_and_reuse_are_counted(asked):
    _, everywhere, prover = asked
    points = sum(map(len, everywhere))
    assert prover.tokens == 40 * points
    assert len(prover.prompts) == points
    assert 0.5 < prover.reuse() < 1


def test_without_room_there_is_no_answer(asked):
    rollouts, _, prover = asked
    prover.engine.max_model_len = 10
    try:
        assert prover.ask([Cut(rollouts[0], 8)]) == [[]]
        assert np.isnan(success([]))
    finally:
        prover.engine.max_model_len = 256
