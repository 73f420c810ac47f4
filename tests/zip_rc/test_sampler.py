"""Adaptive sampling on the transformers engine: pieces, pauses, seeds, and the decisions of a replay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import make_tiny_model

from posttrain.data.answers import extract_answer
from posttrain.errors import RolloutError
from posttrain.evaluation.pareto import Tape, replay
from posttrain.recipe.schema import ModelConfig
from posttrain.rollout.build import load_model, load_tokenizer
from posttrain.rollout.transformers import TransformersEngine
from posttrain.rollout.types import Example, RolloutRequest, Sampling
from posttrain.zip_rc.controller import EarlyStopPolicy, UtilityPolicy
from posttrain.zip_rc.grid import Grid, expected_reward
from posttrain.zip_rc.sampler import AdaptiveSampler

GRID = Grid(first_id=200, reward_values=(0.0, 0.5, 1.0), length_edges=(0, 8, 16, 32))
INTERVAL, CAP = 8, 24
STOPS = (20, 30, 40, 50)
EVERYTHING = EarlyStopPolicy(2.0)
POLICY = UtilityPolicy(alpha=0.5, beta=0.1)


class Recording:
    """Passes requests on and keeps the answers by example and prompt."""

    def __init__(self, engine):
        self.engine = engine
        self.max_model_len = engine.max_model_len
        self.calls = []

    def generate(self, requests):
        answers = self.engine.generate(requests)
        self.calls.append(list(zip(requests, answers, strict=True)))
        return answers


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    config = ModelConfig(path=str(make_tiny_model(tmp_path_factory.mktemp("model"), seed=3)))
    model, tokenizer = load_model(config), load_tokenizer(config)
    model.config.zip_rc = GRID.to_config()
    return TransformersEngine(model, tokenizer), tokenizer


def requests_for(tokenizer, *prompts, **kwargs):
    sampling = Sampling(max_tokens=CAP, n=4, seed=5, **kwargs)
    return [
        RolloutRequest(tuple(tokenizer(prompt)["input_ids"]), Example(prompt, prompt), prompt, sampling)
        for prompt in prompts
    ]


@pytest.fixture(scope="module")
def asked(parts):
    _, tokenizer = parts
    # The random model seldom ends by itself: a stop id does.
    return requests_for(tokenizer, "1+1=", "ab", "xyz", stop_token_ids=STOPS)


@pytest.fixture(scope="module")
def whole(parts, asked):
    """All samples of the prompts run to their ends, and the pieces they came in."""
    engine, tokenizer = parts
    recording = Recording(engine)
    answers = AdaptiveSampler(recording, tokenizer, GRID, policy=EVERYTHING, interval=INTERVAL).sample(asked)
    return answers, [pair for call in recording.calls for pair in call]


def tape_of(request, completion, pieces):
    """A sample as a controller would have met it, from the pieces that it begins with."""
    readings = {}
    for made, [piece] in pieces:
        tokens = (*made.prompt_ids, *piece.token_ids)
        if tokens == (*request.prompt_ids, *completion.token_ids)[: len(tokens)]:
            readings[len(tokens) - len(request.prompt_ids)] = GRID.joint(piece.scored[-1])
    positions = np.array(sorted(readings))
    answer = extract_answer(completion.text)
    joints = np.stack([readings[position] for position in positions])
    return Tape(positions, joints, completion.finish_reason, answer, True)


def test_pieces_make_up_samples(parts, whole, asked):
    answers, pieces = whole
    ends = {*STOPS, parts[1].eos_token_id}
    assert {len(answer.samples) for answer in answers} == {4}
    endings = [completion.finish_reason for answer in answers for completion in answer.samples]
    assert set(endings) == {"stop", "length"}
    for answer in answers:
        for completion in answer.samples:
            assert len(completion.logprobs) == len(completion.token_ids)
            ended = completion.token_ids[-1] in ends
            assert completion.finish_reason == ("stop" if ended else "length")
            assert ended or len(completion.token_ids) == CAP
        assert answer.tokens == sum(len(completion.token_ids) for completion in answer.samples)
        assert answer.completion in answer.samples
        assert answer.latency >= max(len(completion.token_ids) for completion in answer.samples)
    assert not set(GRID.ids) & {token for answer in answers for c in answer.samples for token in c.token_ids}
    lengths = {len(request.prompt_ids) - len(first.prompt_ids) for first in asked for request, _ in pieces
               if request.example is first.example}  # fmt: skip
    assert lengths <= {0, 1, 8, 16}


@pytest.fixture(scope="module")
def found(parts, asked):
    """Answers under the utility, and all that was shown."""
    seen = []
    sampler = AdaptiveSampler(*parts, GRID, policy=POLICY, interval=INTERVAL)
    return sampler.sample(asked, seen.append), seen


def test_decisions_are_those_of_a_replay(whole, asked, found):
    """Samples do not depend on when they were paused, so the policy can be played on the whole ones."""
    everything, pieces = whole
    for request, answer, every in zip(asked, found[0], everything, strict=True):
        tapes = [tape_of(request, completion, pieces) for completion in every.samples]
        outcome = replay(POLICY, tapes, GRID, INTERVAL)
        assert (answer.tokens, answer.latency) == (outcome.tokens, outcome.latency)
        for completion in answer.samples:
            assert any(
                completion.token_ids == c.token_ids[: len(completion.token_ids)] for c in every.samples
            )
        place = [completion.token_ids for completion in every.samples].index(answer.completion.token_ids)
        value = float(expected_reward(GRID, tapes[place].readings[-1]))
        assert answer.confidence == pytest.approx(value if answer.completion.finish_reason == "stop" else 0.0)
    assert sum(answer.tokens for answer in found[0]) < sum(answer.tokens for answer in everything)


def test_what_is_shown(found):
    answers, seen = found
    last = {progress.prompt: progress for progress in seen}
    for place, answer in enumerate(answers):
        assert last[place].done
        assert last[place].tokens == answer.tokens
        assert last[place].confidence == answer.confidence
        assert last[place].remaining == 0.0
    first = next(progress for progress in seen if not progress.done)
    assert first.remaining > 0
    assert 0 < first.confidence <= 1


def test_results_do_not_depend_on_the_batch(parts, asked, found):
    sampler = AdaptiveSampler(*parts, GRID, policy=POLICY, interval=INTERVAL, concurrency=1)
    for answer, together in zip(sampler.sample([asked[2], asked[0]]), found[0][2::-2], strict=True):
        assert [c.token_ids for c in answer.samples] == [c.token_ids for c in together.samples]
        assert answer.completion.token_ids == together.completion.token_ids


def test_a_budget_is_kept(parts, asked):
    engine, tokenizer = parts
    sampler = AdaptiveSampler(engine, tokenizer, GRID, policy=EVERYTHING, interval=INTERVAL, budget=40)
    answers = sampler.sample(asked)
    assert all(answer.tokens <= 40 for answer in answers)
    sampler = AdaptiveSampler(engine, tokenizer, GRID, budget=CAP - 1)
    with pytest.raises(RolloutError, match=r"budget of 23 tokens .* '1\+1='"):
        sampler.sample(asked)


def test_stop_strings_across_pieces(parts, whole, asked):
    """A stop string that begins in one piece and ends in the next ends the sample there."""
    engine, tokenizer = parts
    text = next(c.text for answer in whole[0][:1] for c in answer.samples if len(c.token_ids) == CAP)
    stop = text[INTERVAL - 2 : INTERVAL + 2]
    request = replace(asked[0], sampling=replace(asked[0].sampling, stop=(stop,)))
    [answer] = AdaptiveSampler(engine, tokenizer, GRID, policy=EVERYTHING, interval=INTERVAL).sample(
        [request]
    )
    stopped = [c for c in answer.samples if stop in c.text]
    assert stopped
    assert all(c.text.endswith(stop) and c.finish_reason == "stop" for c in stopped)


@pytest.mark.parametrize(
    ("change", "text"),
    [({"temperature": 0.0}, "temperature 0"), ({"n": 0}, "asks for 0 samples")],
)
def test_what_cannot_be_sampled(parts, asked, change, text):
    engine, tokenizer = parts
    request = replace(asked[0], sampling=replace(asked[0].sampling, **change))
    with pytest.raises(RolloutError, match=text):
        AdaptiveSampler(engine, tokenizer, GRID).sample([request])
