"""Several ranks decide what one would: each has all requests of its own problems, and counts are gathered."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
from helpers import make_tokenizer

from posttrain.data.self_predictions import Prediction, write_prediction
from posttrain.methods.base import RolloutPlan, StepContext
from posttrain.methods.masa import Masa
from posttrain.recipe.masa_schema import EfficientConfig, ExpertConfig, GuardConfig, MasaConfig
from posttrain.recipe.meta_schema import MetaFormat
from posttrain.rollout.types import Completion, Example, RolloutRequest, Sampling, derive_seed, make_rollouts

QUESTION = MetaFormat(system=None, template="? {problem}")
TOKENIZER = make_tokenizer()


class Engine:
    """Says what it says: self-predictions with more spread for later problems, solutions of two kinds."""

    max_model_len, version = 512, 0

    def generate(self, requests):
        return [[self.answer(request, i) for i in range(request.sampling.n)] for request in requests]

    def answer(self, request, index):
        number = int(request.example.id.removesuffix("#meta"))
        if request.role == "meta":
            rate = int(index == 0 and number % 3 == 1) if number % 2 else 4
            text = write_prediction(Prediction(("carry",), rate, 2 + number), QUESTION)
        else:
            text = "carry" if (index + number) % 3 else "none"
        return Completion(tuple(TOKENIZER(text)["input_ids"]), (0.0,) * len(text), "stop", text)


def requests():
    return [
        RolloutRequest(
            (1,), Example(str(i), f"problem {i}", ""), f"7.{i}", Sampling(48, n=4, seed=derive_seed(i))
        )
        for i in range(16)
    ]


def act(own, gather, log):
    """One rank's step 7: what it plans, and its method afterwards."""
    method = Masa(
        MasaConfig(
            group_size=8,
            question=QUESTION,
            efficient=EfficientConfig(start=0, min_limit=1, guard=GuardConfig(evidence=1, max_fraction=0.25)),
            experts=ExpertConfig(batch=4, min_notion=0.1),
        )
    )
    method.controls.add((10, 9), (100, 1), 20)
    engine = Engine()
    context = StepContext(
        step=7,
        engine=engine,
        tokenizer=TOKENIZER,
        model=None,
        rng=np.random.default_rng(0),
        log=lambda name, value: log.append((name, value)),
        score=lambda rollouts: None,
        gather=gather,
    )
    planned = method.plan(RolloutPlan(own), context).requests
    batch = make_rollouts(planned, engine.generate(planned), 0)
    for rollout in batch:
        rollout.reward = float("carry" in rollout.completion.text)
        rollout.rewards = {"right": rollout.reward}
    batch = method.extend(batch, context)
    (channel,) = method.channels(batch, context)
    return planned, method, channel.advantages


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_decide_together(ranks):
    alone_log = []
    planned, alone, advantages = act(requests(), lambda value: [value], alone_log)
    assert len(alone.gated) == 4  # a quarter of the problems, the surest of those that could be gated
    assert len(planned) == 12

    barrier, board = Barrier(ranks), [None] * ranks

    def gather_of(rank):
        def gather(value):
            board[rank] = value
            barrier.wait(10)
            values = list(board)
            barrier.wait(10)
            return values

        return gather

    logs = [[] for _ in range(ranks)]
    listed = requests()
    shares = [listed[rank * 16 // ranks : (rank + 1) * 16 // ranks] for rank in range(ranks)]
    with ThreadPoolExecutor(ranks) as pool:
        results = list(pool.map(act, shares, map(gather_of, range(ranks)), logs))
    assert [request for part, _, _ in results for request in part] == planned
    merged = {}
    for _, method, part in results:
        merged |= part
        assert method.gated == alone.gated
        assert method.controls == alone.controls
        assert method.clone_steps == alone.clone_steps == 5
    assert merged == advantages
    assert [expert for _, method, _ in results for expert in method.cloned] == alone.cloned
    for log in logs:
        shown = [entry for entry in log if entry[0] != "too_long"]
        assert shown == [entry for entry in alone_log if entry[0] != "too_long"]
