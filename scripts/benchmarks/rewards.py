"""Scoring: mathematics against TRL's, a reward behind HTTP against its bound, a reward model in batches.

What scores is started, and its libraries are imported, before the clock runs. Of mathematics every pair of
runs has problems of its own, in a random order of kinds; in the warm-up pair before them both sides' parsers
learn their grammar, which takes seconds once in a process.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import cast

import numpy as np
from benchmarks.completions import make_rollouts
from benchmarks.harness import Comparison, Sample, Settings, Stopwatch, alternate, one_thread, require
from benchmarks.models import ModelShape, make_tokenizer

from posttrain.recipe.schema import RewardModelConfig, RewardOptions, RewardSpec
from posttrain.rewards.builtin import answer_pair
from posttrain.rewards.model import RewardModel
from posttrain.rewards.scorer import Scorer
from posttrain.rollout.types import Rollout

PROMPTS, GROUP = 250, 8
MATHS_LIMIT, WITHOUT_SHARING_LIMIT = 0.25, 0.50
WORKERS = 2

REQUESTS, CONCURRENCY, ANSWER_SECONDS = 640, 32, 0.2
HTTP_LIMIT = 1 / 0.95
"""Of the seconds that so many requests take at least."""

MODELS = {
    "tiny, short texts": (
        ModelShape(hidden=64, layers=2, heads=2, key_value_heads=1, intermediate=256, vocab=1024),
        10,
        20,
    ),
    "larger, long texts": (ModelShape(), 64, 100),
}
"""Model, tokens of the prompt, and of the median completion.

Batches save what a pass costs whatever is in it: nearly all of it for a tiny model on short texts, and little
for a larger one on one CPU thread, where arithmetic decides.
"""
TEXTS, BATCH_TOKENS = 128, 4096
MODEL_LIMIT, LARGER_LIMIT = 0.30, 1.00
SCORE_TOLERANCE = 1e-4

Values = list[float | None]


def compare(settings: Settings) -> list[Comparison]:
    return [
        _maths(settings, share=True),
        _maths(settings, share=False),
        _http(settings),
        *(_reward_model(settings, name, *sizes) for name, sizes in MODELS.items()),
    ]


# --- mathematics ------------------------------------------------------------------------------------------


def _maths(settings: Settings, share: bool) -> Comparison:
    from trl.rewards import accuracy_reward

    seeds = itertools.count(1000 * settings.seed)
    rollouts: list[Rollout] = []
    shapes: list[dict[str, int]] = []

    def ours() -> Sample[Values]:
        rollouts[:] = make_rollouts(next(seeds), PROMPTS, GROUP)
        start = time.perf_counter()
        scorer.score(rollouts)
        seconds = time.perf_counter() - start
        shapes.append(_shape(rollouts))
        return Sample(seconds, [rollout.rewards["math_answer"] for rollout in rollouts])

    def theirs() -> Sample[Values]:
        values: Values = []
        start = time.perf_counter()
        for _, group in itertools.groupby(rollouts, key=lambda rollout: rollout.request.group):
            texts, answers = zip(*((r.completion.text, r.request.example.answer) for r in group), strict=True)
            messages = [[{"role": "assistant", "content": text}] for text in texts]
            values += accuracy_reward(messages, list(answers))
        return Sample(time.perf_counter() - start, values)

    def check(a: Values, b: Values) -> None:
        differ = [at for at, (left, right) in enumerate(zip(a, b, strict=True)) if left != right]
        shown = [
            (rollouts[at].completion.text[-40:], rollouts[at].request.example.answer) for at in differ[:3]
        ]
        require(not differ, f"{len(differ)} of {len(a)} rewards, such as {shown}")

    with Scorer([RewardSpec(name="math_answer")], RewardOptions(workers=WORKERS), share=share) as scorer:
        values = alternate(ours, theirs, settings.pairs(), check)
    return Comparison(
        name=f"mathematics, {'equal answers once' if share else 'every completion by itself'}",
        theirs_is="a loop over groups with TRL's accuracy_reward",
        unit="seconds",
        limit=MATHS_LIMIT if share else WITHOUT_SHARING_LIMIT,
        ours=values[0],
        theirs=values[1],
        shapes={"prompts": PROMPTS, "group": GROUP, "workers": WORKERS, "cores": os.cpu_count()},
        note="" if share else "With Scorer(share=False).",
        details={"completions of each run, the warm-up first": shapes},
    )


def _shape(rollouts: Sequence[Rollout]) -> dict[str, int]:
    pairs = [answer_pair(rollout.completion, rollout.request.example) for rollout in rollouts]
    return {
        "different answers": len(set(pairs)),
        "right": sum(rollout.rewards["math_answer"] == 1 for rollout in rollouts),
        "without an answer": sum(answer is None for answer, _ in pairs),
        "median characters": sorted(len(rollout.completion.text) for rollout in rollouts)[len(rollouts) // 2],
    }


# --- a server ---------------------------------------------------------------------------------------------


def _http(settings: Settings) -> Comparison:
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_serve_scores, args=(sending,), daemon=True)
    process.start()
    args = {"url": f"http://127.0.0.1:{receiving.recv()}/", "concurrency": CONCURRENCY}
    rollouts = make_rollouts(settings.seed, REQUESTS // GROUP, GROUP)

    def ours() -> Sample[Values]:
        start = time.perf_counter()
        scorer.score(rollouts)
        seconds = time.perf_counter() - start
        return Sample(seconds, [rollout.rewards["http"] for rollout in rollouts])

    def bound() -> Sample[Values]:
        values: Values = [float(len(rollout.completion.text)) for rollout in rollouts]
        return Sample(REQUESTS / CONCURRENCY * ANSWER_SECONDS, values)

    try:
        with Scorer([RewardSpec(name="http", args=args)], RewardOptions(workers=WORKERS)) as scorer:
            values = alternate(ours, bound, settings.pairs(), lambda a, b: require(a == b, "scores differ"))
    finally:
        process.terminate()
        process.join()
    return Comparison(
        name="http",
        theirs_is="requests ÷ concurrency × the server's 0.2 s, computed, not measured",
        unit="seconds",
        limit=HTTP_LIMIT,
        ours=values[0],
        theirs=values[1],
        shapes={"requests": REQUESTS, "concurrency": CONCURRENCY, "seconds of an answer": ANSWER_SECONDS},
        note="The limit is 0.95 of the bound's throughput. The server is a process on this machine.",
    )


class _Waiting(asyncio.Protocol):
    """A connection to a server that answers with the length of the completion, ANSWER_SECONDS later.

    It stands for a server on another machine: it does no more than that, as its CPU time is taken from the
    client's.
    """

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, _, body = self._received.partition(b"\r\n\r\n")
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        if length is None or len(body) < int(length[1]):
            return
        self._received = b""
        score = len(json.loads(body)["completion"])
        asyncio.get_running_loop().call_later(ANSWER_SECONDS, self._answer, b'{"score": %d}' % score)

    def _answer(self, content: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        self._transport.write(head % len(content) + content)


def _serve_scores(port: Connection) -> None:
    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(_Waiting, "127.0.0.1", 0)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


# --- a reward model ---------------------------------------------------------------------------------------


def _reward_model(
    settings: Settings, name: str, shape: ModelShape, prompt: int, completion: int
) -> Comparison:
    """Batches of like length against one text after the other, of one model in one process."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    rng = np.random.default_rng(settings.seed)
    lengths = np.exp(rng.normal(np.log(completion), 0.7, TEXTS)).clip(4, 512).astype(int)
    words = [[f"w{token}" for token in rng.integers(3, shape.vocab, prompt + n)] for n in lengths]
    samples = [(" ".join(row[:prompt]), " " + " ".join(row[prompt:])) for row in words]
    tokenizer = make_tokenizer(shape.vocab)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(settings.seed)
        # Of Qwen2's checkpoints transformers takes the tokenizer for Qwen2's own, whatever it is.
        config = LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_value_heads,
            max_position_embeddings=shape.context,
            pad_token_id=0,
            num_labels=1,
        )
        LlamaForSequenceClassification(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        batched = RewardModel(RewardModelConfig(path=folder, device="cpu", batch_tokens=BATCH_TOKENS))
        plain = LlamaForSequenceClassification.from_pretrained(folder).eval()
    watch = Stopwatch()

    def ours() -> Sample[list[float]]:
        with watch:
            scores = batched.score(samples)
        return Sample(watch.seconds, [float(score.value or 0.0) for score in scores])

    @torch.inference_mode()
    def theirs() -> Sample[list[float]]:
        with watch:
            scores = [
                plain(**tokenizer(question + text, return_tensors="pt")).logits.item()
                for question, text in samples
            ]
        return Sample(watch.seconds, scores)

    def check(a: list[float], b: list[float]) -> None:
        worst = max(abs(x - y) for x, y in zip(a, b, strict=True))
        require(worst <= SCORE_TOLERANCE, f"scores differ by {worst}")

    with one_thread():
        values = alternate(ours, theirs, settings.pairs(), check)
    return Comparison(
        name=f"reward model, {name}",
        theirs_is="the same model on one text after the other",
        unit=watch.unit,
        limit=MODEL_LIMIT if name.startswith("tiny") else LARGER_LIMIT,
        ours=values[0],
        theirs=values[1],
        shapes={
            "model": {**shape.describe(), "family": "Llama"},
            "texts": TEXTS,
            "tokens": {"least": int(lengths.min()) + prompt, "most": int(lengths.max()) + prompt},
            "batch_tokens": BATCH_TOKENS,
        },
    )
