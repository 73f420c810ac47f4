"""Continuations from several cuts of one trace, against generating each from its whole prefix.

Ours is `engine.fork` of the transformers engine; theirs is one call of `model.generate` with every prefix
once for each of its continuations, which is how they would be drawn without a fork.
"""

from __future__ import annotations

import numpy as np
import torch
from benchmarks.harness import Comparison, Sample, Settings, Stopwatch, alternate, one_thread, require
from benchmarks.models import ModelShape, make_tokenizer, random_tokens

from posttrain.rollout.transformers import TransformersEngine
from posttrain.rollout.types import Completion, Example, Rollout, RolloutRequest, Sampling

TRACE, CUTS, CONTINUATIONS, NEW_TOKENS = 512, 8, 4, 32
LIMIT = 0.25
LOGPROB_TOLERANCE = 1e-4

Answer = list[tuple[tuple[int, ...], list[int], list[float]]]
"""Prefix, continuation, and its log-probs (empty where the side gives none)."""


def compare(settings: Settings) -> list[Comparison]:
    shape = ModelShape()
    model = shape.build(settings.seed).eval()
    tokenizer = make_tokenizer(shape.vocab)
    engine = TransformersEngine(model, tokenizer)
    trace = random_tokens(np.random.default_rng(settings.seed), TRACE, shape.vocab)
    start = TRACE // CUTS
    prompt, completion = tuple(trace[:start]), tuple(trace[start:])
    cuts = [start * index for index in range(CUTS)]
    sampling = Sampling(max_tokens=NEW_TOKENS, seed=settings.seed)
    request = RolloutRequest(prompt, Example("trace", ""), "trace", Sampling(max_tokens=len(completion)))
    rollout = Rollout(request, Completion(completion, (0.0,) * len(completion), "length", ""), 0, 0)
    watch = Stopwatch()

    def ours() -> Sample[Answer]:
        with watch:
            forks = engine.fork(rollout, cuts, CONTINUATIONS, sampling)
        answer = [
            ((*prompt, *completion[:cut]), list(one.token_ids), list(one.logprobs))
            for cut, continuations in zip(cuts, forks, strict=True)
            for one in continuations
        ]
        return Sample(watch.seconds, answer)

    prefixes = [(*prompt, *completion[:cut]) for cut in cuts for _ in range(CONTINUATIONS)]

    def theirs() -> Sample[Answer]:
        with watch:
            input_ids, attention_mask = left_padded(prefixes)
            output = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=NEW_TOKENS,
                pad_token_id=0,
            )
            rows = output[:, input_ids.shape[1] :].tolist()
        return Sample(watch.seconds, [(p, row, []) for p, row in zip(prefixes, rows, strict=True)])

    def check(a: Answer, b: Answer) -> None:
        require([row[0] for row in a] == [row[0] for row in b], "prefixes differ")
        lengths = {len(tokens) for _, tokens, _ in (*a, *b)}
        require(lengths == {NEW_TOKENS}, f"{NEW_TOKENS} new tokens were asked for, not {lengths}")
        check_logprobs(model, a)

    with one_thread():
        values = alternate(ours, theirs, settings.pairs(), check)
    return [
        Comparison(
            name=f"{CONTINUATIONS} continuations of {CUTS} cuts",
            theirs_is="model.generate on all prefixes in one batch",
            unit=watch.unit,
            limit=LIMIT,
            ours=values[0],
            theirs=values[1],
            shapes={
                "model": shape.describe(),
                "prompt": start,
                "trace": TRACE,
                "cuts": cuts,
                "continuations": CONTINUATIONS,
                "new_tokens": NEW_TOKENS,
            },
            note="Ours also gives the log-prob of every token; model.generate is not asked for them.",
        )
    ]


def left_padded(rows: list[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, padded on the left with 0."""
    width = max(map(len, rows))
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        input_ids[index, width - len(row) :] = torch.tensor(row)
        mask[index, width - len(row) :] = 1
    return input_ids, mask


@torch.no_grad()
def check_logprobs(model: torch.nn.Module, answer: Answer) -> None:
    """Every log-prob is the one of a plain forward pass over its prefix and continuation."""
    for prefix, tokens, logprobs in answer:
        logits = model(input_ids=torch.tensor([[*prefix, *tokens]]), logits_to_keep=len(tokens) + 1).logits
        expected = logits[0, :-1].log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        worst = float((expected - torch.tensor(logprobs)).abs().max())
        require(worst <= LOGPROB_TOLERANCE, f"log-probs differ by {worst} from those of a forward pass")
