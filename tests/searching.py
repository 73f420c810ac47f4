"""Searches of the task `search` as rollouts, and an engine that answers them as well as can be."""

from __future__ import annotations

import numpy as np

from posttrain.data.tasks import make_task
from posttrain.recipe.mrt_schema import ProbeConfig
from posttrain.rollout.tokens import decode_texts, make_completions
from posttrain.rollout.types import Rollout, RolloutRequest, Sampling

STEPS = {"separator": ";", "markers": [""], "min_gap": 1}
CUE = "!</think>"


def probes(branches):
    """Every episode is cut, an answer is one token."""
    return ProbeConfig(episodes=STEPS, branches=branches, cue=CUE, max_tokens=1)


def searches(tokenizer, count):
    """Demonstrations of the task as rollouts."""
    rollouts = []
    for example in make_task("search", size=count, seed=0, split="train", traces=True):
        ids = tokenizer(example.columns["completion"])["input_ids"]
        [completion] = make_completions(tokenizer, [ids], [[0.0] * len(ids)], [True], [None])
        prompt = tuple(tokenizer(example.prompt)["input_ids"])
        request = RolloutRequest(prompt, example, example.id, Sampling(160, seed=7))
        rollouts.append(Rollout(request, completion, 0, 0))
    return rollouts


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
        return make_completions(
            self.tokenizer, ids, [[0.0]] * len(ids), [False] * len(ids), [None] * len(ids)
        )
