"""Both engines against what they are made of: `model.generate`, and vLLM itself.

Prompts of groups of eight, completions of different lengths. Nothing ends by itself: every row has a length,
which is our `max_tokens` and, for `model.generate`, a stopping criterion that says so row by row.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from benchmarks.fork import check_logprobs, left_padded
from benchmarks.harness import Comparison, Sample, Settings, Stopwatch, alternate, one_thread, require
from benchmarks.models import ModelShape, make_tokenizer, random_tokens, save
from transformers import StoppingCriteria, StoppingCriteriaList

from posttrain.rollout.transformers import TransformersEngine
from posttrain.rollout.types import Completion, Example, RolloutRequest, Sampling, derive_seed
from posttrain.rollout.vllm import VllmEngine

PROMPTS, GROUP, PROMPT, LONGEST = 8, 8, 128, 128
LIMIT, VLLM_LIMIT = 0.60, 1.05
SHAPE = ModelShape()

Tokens = list[list[int]]


def compare(settings: Settings) -> list[Comparison]:
    requests = make_requests(settings.seed)
    with one_thread():
        return [_transformers(requests, settings), _vllm(requests, settings)]


def make_requests(seed: int) -> list[RolloutRequest]:
    """One request per completion. Lengths are log-normal, as those of reasoning are, up to LONGEST."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.normal(np.log(40), 0.7, (PROMPTS, GROUP))).clip(8, LONGEST).astype(int)
    lengths[0, 0] = LONGEST
    requests = []
    for prompt, row in enumerate(lengths.tolist()):
        ids = tuple(random_tokens(rng, PROMPT, SHAPE.vocab))
        for index, length in enumerate(row):
            sampling = Sampling(max_tokens=length, seed=derive_seed(seed, prompt, index))
            requests.append(RolloutRequest(ids, Example(f"{prompt}.{index}", ""), str(prompt), sampling))
    return requests


class OwnLength(StoppingCriteria):
    """Ends every row at its own number of new tokens."""

    def __init__(self, prompt: int, lengths: Sequence[int]) -> None:
        self.ends = prompt + torch.tensor(lengths)

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **options: object
    ) -> torch.BoolTensor:
        return input_ids.shape[1] >= self.ends


def _transformers(requests: list[RolloutRequest], settings: Settings) -> Comparison:
    model = SHAPE.build(settings.seed).eval()
    engine = TransformersEngine(model, make_tokenizer(SHAPE.vocab))
    lengths = [request.sampling.max_tokens for request in requests]
    watch = Stopwatch()

    def ours() -> Sample[Tokens]:
        with watch:
            completions = [one for (one,) in engine.generate(requests)]
        check_logprobs(
            model,
            [
                (request.prompt_ids, list(one.token_ids), list(one.logprobs))
                for request, one in zip(requests[::GROUP], completions[::GROUP], strict=True)
            ],
        )
        return Sample(watch.seconds, [list(one.token_ids) for one in completions])

    def theirs() -> Sample[Tokens]:
        with watch:
            input_ids, attention_mask = left_padded([request.prompt_ids for request in requests])
            output = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=LONGEST,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([OwnLength(PROMPT, lengths)]),
            )
            rows = output[:, input_ids.shape[1] :].tolist()
        require({len(row) for row in rows} == {LONGEST}, "model.generate did not go on to the longest row")
        return Sample(watch.seconds, [row[:n] for row, n in zip(rows, lengths, strict=True)])

    def check(a: Tokens, b: Tokens) -> None:
        require([len(row) for row in a] == [len(row) for row in b] == lengths, "numbers of tokens")

    values = alternate(ours, theirs, settings.pairs(), check)
    return Comparison(
        name="transformers engine",
        theirs_is="model.generate",
        unit=watch.unit,
        limit=LIMIT,
        ours=values[0],
        theirs=values[1],
        shapes=_shapes(lengths),
        note="Ours also gives the log-prob of every token; model.generate is not asked for them.",
    )


def _vllm(requests: list[RolloutRequest], settings: Settings) -> Comparison:
    """Our engine and its own vLLM object in turns: the same weights, cache and requests, the same tokens."""
    from vllm import SamplingParams

    folder = save(SHAPE, settings.seed, Path(tempfile.mkdtemp()))
    engine = VllmEngine(str(folder), make_tokenizer(SHAPE.vocab))
    raw = engine._llm
    watch = Stopwatch()
    prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]

    def ours() -> Sample[list[Completion]]:
        raw.reset_prefix_cache()
        with watch:
            completions = [one for (one,) in engine.generate(requests)]
        return Sample(watch.seconds, completions)

    def theirs() -> Sample[list[Completion]]:
        raw.reset_prefix_cache()
        with watch, torch.compiler.set_stance("force_eager"):
            parameters = [
                SamplingParams(
                    max_tokens=request.sampling.max_tokens,
                    seed=derive_seed(request.sampling.seed, 0),
                    logprobs=0,
                    flat_logprobs=True,
                )
                for request in requests
            ]
            outputs = raw.generate(prompts, parameters, use_tqdm=False)
        answers = [output.outputs[0] for output in outputs]
        completions = [
            Completion(tuple(one.token_ids), tuple(one.logprobs.logprobs), "length", one.text)
            for one in answers
        ]
        return Sample(watch.seconds, completions)

    def check(a: list[Completion], b: list[Completion]) -> None:
        require([one.token_ids for one in a] == [one.token_ids for one in b], "tokens")
        pairs = zip(a, b, strict=True)
        same = all(np.allclose(one.logprobs, other.logprobs, atol=1e-5) for one, other in pairs)
        require(same, "log-probs")

    try:
        values = alternate(ours, theirs, settings.pairs(), check)
    finally:
        engine.close()
    return Comparison(
        name="vllm engine",
        theirs_is="LLM.generate of the same vLLM object, seeds and log-probs included",
        unit=watch.unit,
        limit=VLLM_LIMIT,
        ours=values[0],
        theirs=values[1],
        shapes=_shapes([request.sampling.max_tokens for request in requests]),
    )


def _shapes(lengths: list[int]) -> dict[str, object]:
    return {
        "model": SHAPE.describe(),
        "prompts": PROMPTS,
        "group": GROUP,
        "prompt": PROMPT,
        "completions": lengths,
    }
