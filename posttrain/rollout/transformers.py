"""The embedded engine: samples from a live transformers model, in training the trainer's own.

Then there is nothing to copy at a sync, and the log-probs are the trainer's up to rounding. A call is cut
into waves of `batch_size` rows. A wave prefills its prompts, but a long common beginning of several once
(`prefixes.py`), copies the cache for the completions, and decodes token by token; a row leaves the batch at
the step it finishes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.errors import RolloutError
from posttrain.rollout.attention import decode_attention
from posttrain.rollout.cache import can_fork, decoding_cache
from posttrain.rollout.engine import check_requests, fork_requests
from posttrain.rollout.prefixes import Host, Prompt, find_hosts, tail_length
from posttrain.rollout.sampling import RowSampler
from posttrain.rollout.tokens import (
    decode_texts,
    end_of_sequence_ids,
    make_completions,
    model_context,
    reserved_ids,
    visible_ids,
)
from posttrain.rollout.types import Completion, Rollout, RolloutRequest, Sampling
from posttrain.rollout.weights import named_weights

_ROOM = 64  # columns by which an attention mask grows


class TransformersEngine:
    """A `RolloutEngine` that decodes with the model object it is given.

    Args:
        model: `PreTrainedModel` or `PeftModel` (adapters stay active), on any device and of any dtype.
        tokenizer: turns token ids into text, and tells the end-of-sequence token beside the model's own.
        max_model_len: longest prompt plus completion; None is the model's limit.
        batch_size: rows decoded together. Sets memory and speed, never the result.
        own_weights: `model` is the engine's alone and has no adapters; `sync` copies weights into it. For a
            policy that is split over processes, and for generating while the policy is trained.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_model_len: int | None = None,
        batch_size: int = 256,
        own_weights: bool = False,
    ) -> None:
        self.version = 0
        self.max_model_len = max_model_len or model_context(model.config)
        self._model: PreTrainedModel | None = model
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._own_weights = own_weights
        self._eos = end_of_sequence_ids(model.generation_config, tokenizer)

    def generate(self, requests: Sequence[RolloutRequest]) -> list[list[Completion]]:
        """See `RolloutEngine.generate`."""
        if self._model is None:
            raise RolloutError("the rollout engine is closed")
        check_requests(requests, self.max_model_len, self._model.config.get_text_config().vocab_size)
        hosts = find_hosts({request.prompt_ids for request in requests})
        rows = [_Row(r, i) for r, request in enumerate(requests) for i in range(request.sampling.n)]
        # Rows of like length share a wave, so that little of it is padding, and so do those of one host.
        rows.sort(key=lambda row: _place(requests[row.request], hosts))
        answers: list[dict[int, Completion]] = [{} for _ in requests]
        with _inference(self._model), decode_attention(self._model):
            for start in range(0, len(rows), self._batch_size):
                wave = rows[start : start + self._batch_size]
                for row, completion in zip(wave, self._decode(requests, wave, hosts), strict=True):
                    answers[row.request][row.index] = completion
        return [[answer[index] for index in range(len(answer))] for answer in answers]

    def fork(
        self, rollout: Rollout, cuts: Sequence[int], n: int, sampling: Sampling
    ) -> list[list[Completion]]:
        """See `RolloutEngine.fork`. The longest prefix is run; the cache is copied for the others."""
        return self.generate(fork_requests(rollout, cuts, n, sampling))

    def sync(self, model: PreTrainedModel) -> None:
        """Sample from `model` from now on: from its weights where they are, or from a copy of them.

        Raises:
            RolloutError: with weights of its own, those of `model` do not fit them.
        """
        if self._model is None:
            raise RolloutError("the rollout engine is closed")
        if self._own_weights:
            _copy_weights(model, self._model)
        else:
            self._model = model
        self.version += 1

    def close(self) -> None:
        """Let go of the model."""
        self._model = None

    def _decode(
        self, requests: Sequence[RolloutRequest], wave: Sequence[_Row], hosts: Mapping[Prompt, Host]
    ) -> list[Completion]:
        """Complete the rows of one wave."""
        model: Any = self._model
        asked = [requests[row.request] for row in wave]
        batch, logits = _prefill(model, [request.prompt_ids for request in asked], hosts)
        samplings = [request.sampling for request in asked]
        sampler = RowSampler(
            samplings,
            [row.index for row in wave],
            logits.device,
            reserved_ids(model.config),
        )
        outcome = _Outcome(asked, self._eos, self.max_model_len, self._tokenizer, logits.shape[-1])
        logprobs = torch.empty(len(wave), outcome.longest, device=logits.device)
        scores = _Scores(samplings, outcome.longest, logits.device)
        active = torch.arange(len(wave), device=logits.device)
        for step in range(outcome.longest):
            scores.read(logits, active, step)
            tokens, logprobs[active, step] = sampler(logits)
            kept = outcome.add(tokens.cpu().numpy())
            if not kept:
                break
            if len(kept) < len(tokens):
                rows = torch.tensor(kept, device=logits.device)
                active, tokens = active[rows], tokens[rows]
                sampler.select(rows, kept)
                batch.select(rows)
            logits = batch.decode(tokens[:, None])
        return outcome.completions(logprobs.cpu().numpy(), scores.of_rows())


@dataclass(frozen=True)
class _Row:
    request: int
    index: int


class _Batch:
    """The rows being decoded, padded on the left to the longest: their cache, mask and positions."""

    def __init__(self, model: Any, cache: DynamicCache, lengths: Sequence[int]) -> None:
        self._model = model
        self._cache = cache
        self._width = 0
        self._positions: torch.Tensor  # (B, 1), of the next token
        self._mask: torch.Tensor | None  # (B, at least width), False where padded
        self._arrange(lengths)

    def prefill(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        """Run the whole rows; logits (B, V) of the tokens that follow."""
        input_ids = torch.zeros(len(prompts), self._width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            input_ids[row, self._width - len(prompt) :] = torch.tensor(prompt)
        positions = torch.arange(self._width, device=self._model.device) - self._width + self._positions
        return self._forward(input_ids.to(self._model.device), positions.clamp_(min=0))

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append tokens (B, T) to the rows; logits (B, V) of the next."""
        count = tokens.shape[1]
        self._width += count
        logits = self._forward(tokens, self._positions + torch.arange(count, device=tokens.device))
        self._positions = self._positions + count
        return logits

    def select(self, rows: torch.Tensor) -> None:
        """Keep only the given rows."""
        # The one operation of this kind that every type of cache layer has, linear attention included.
        self._cache.reorder_cache(rows)
        self._positions = self._positions[rows]
        if self._mask is not None:
            self._mask = self._mask[rows]

    def fork(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Make row b the first `lengths[b]` tokens of what row `rows[b]` was. The cache must allow it."""
        starts = (self._width - self._positions).squeeze(-1)[list(rows)].tolist()
        for layer in self._cache.layers:
            layer.fork(rows, starts, lengths)
        self._arrange(lengths)

    def _arrange(self, lengths: Sequence[int]) -> None:
        self._width = max(lengths)
        self._positions = torch.tensor(lengths, device=self._model.device)[:, None]
        self._mask = None
        if min(lengths) < self._width:
            columns = torch.arange(self._width, device=self._model.device)
            self._mask = columns >= self._width - self._positions

    def _forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        mask = None
        if self._mask is not None:
            if self._mask.shape[1] < self._width:  # every later token is seen: room is made ahead
                self._mask = F.pad(self._mask, (0, _ROOM), value=True)
            mask = self._mask[:, : self._width]
        output = self._model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


def _place(request: RolloutRequest, hosts: Mapping[Prompt, Host]) -> tuple[int, int, Prompt]:
    host = hosts[request.prompt_ids].prompt
    return len(host), request.sampling.max_tokens, host


def _prefill(
    model: Any, prompts: Sequence[Prompt], hosts: Mapping[Prompt, Host]
) -> tuple[_Batch, torch.Tensor]:
    """Run the prompts; the batch with one row for each, and the logits (B, V) of the tokens that follow.

    Of equal prompts only one is run, and of those that go with a host only their ends.
    """
    cache = decoding_cache(model.config)
    distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    tail = tail_length([(prompt, hosts[prompt]) for prompt in distinct])
    shared = can_fork(cache) and min(map(len, distinct)) > tail
    needed = dict.fromkeys(hosts[prompt].prompt for prompt in distinct) if shared else distinct
    batch = _Batch(model, cache, [len(prompt) for prompt in needed])
    logits = batch.prefill(list(needed))
    if len(needed) < len(distinct):
        place = {host: row for row, host in enumerate(needed)}
        batch.fork(
            [place[hosts[prompt].prompt] for prompt in distinct], [len(prompt) - tail for prompt in distinct]
        )
        logits = batch.decode(torch.tensor([prompt[-tail:] for prompt in distinct], device=model.device))
    rows = torch.tensor([distinct[prompt] for prompt in prompts], device=model.device)
    batch.select(rows)
    return batch, logits[rows]


class _Scores:
    """The logits of a wave's scored ids, as the model gave them: (rows, longest, most ids of a row)."""

    def __init__(self, samplings: Sequence[Sampling], longest: int, device: torch.device) -> None:
        self._counts = [len(sampling.scored_ids) for sampling in samplings]
        most = max(self._counts)
        padded = [sampling.scored_ids + (0,) * (most - len(sampling.scored_ids)) for sampling in samplings]
        self._ids = torch.tensor(padded, dtype=torch.long, device=device)
        self._read = torch.empty(len(samplings), longest, most, device=device) if most else None

    def read(self, logits: torch.Tensor, active: torch.Tensor, step: int) -> None:
        """Keep what the active rows' logits (B, V) say."""
        if self._read is not None:
            self._read[active, step] = logits.gather(1, self._ids[active]).float()

    def of_rows(self) -> list[np.ndarray | None]:
        """For each row (longest, its ids), or None if it has none; meaningless after its last token."""
        if self._read is None:
            return [None] * len(self._counts)
        read = self._read.cpu().numpy()
        return [read[row, :, :count] if count else None for row, count in enumerate(self._counts)]


class _Outcome:
    """The tokens of a wave, kept on the host, and the decision which rows go on."""

    def __init__(
        self,
        requests: Sequence[RolloutRequest],
        eos: frozenset[int],
        max_model_len: int,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
    ) -> None:
        samplings = [request.sampling for request in requests]
        self._caps = np.array(
            [min(r.sampling.max_tokens, max_model_len - len(r.prompt_ids)) for r in requests], dtype=np.int64
        )
        stops = [sorted(eos.union(sampling.stop_token_ids)) for sampling in samplings]
        self._stop_ids = np.full((len(stops), max(map(len, stops))), -1, dtype=np.int64)
        for row, ids in enumerate(stops):
            self._stop_ids[row, : len(ids)] = ids
        self._strings = [sampling.stop for sampling in samplings]
        self._any_strings = any(self._strings)
        self._tokenizer = tokenizer
        self._visible = visible_ids(tokenizer, vocab_size) if self._any_strings else np.empty(0)
        self._tokens = np.zeros((len(requests), self.longest), dtype=np.int64)
        self._lengths = np.zeros(len(requests), dtype=np.int64)
        self._stopped = np.zeros(len(requests), dtype=bool)
        self._active = np.arange(len(requests))
        self._step = 0

    @property
    def longest(self) -> int:
        """Most tokens that any row may still get."""
        return int(self._caps.max())

    def add(self, tokens: np.ndarray) -> list[int]:
        """Append a token to every active row; where the rows that go on, in their new order, have been."""
        self._tokens[self._active, self._step] = tokens
        self._step += 1
        stopped = (self._stop_ids[self._active] == tokens[:, None]).any(axis=1)
        if self._any_strings:
            stopped |= self._ends_with_string(~stopped)
        finished = stopped | (self._caps[self._active] == self._step)
        done = self._active[finished]
        self._stopped[done] = stopped[finished]
        self._lengths[done] = self._step
        kept = _without(finished)
        self._active = self._active[kept]
        return kept.tolist()

    def _ends_with_string(self, candidates: np.ndarray) -> np.ndarray:
        """Which of the candidates among the active rows got one of their stop strings with the last token.

        A token may be a single byte, hence a tail of as many tokens with text as the longest string has
        bytes; the few more keep a decoder that strips a leading space away from the match.
        """
        found = np.zeros(len(self._active), dtype=bool)
        rows = [(at, row) for at, row in enumerate(self._active) if candidates[at] and self._strings[row]]
        tails = []
        for _, row in rows:
            tokens = self._tokens[row, : self._step]
            longest = max(len(string.encode()) for string in self._strings[row])
            tails.append(tokens[self._visible[tokens]][-4 - longest :].tolist())
        for (at, row), text in zip(rows, decode_texts(self._tokenizer, tails), strict=True):
            found[at] = any(string in text for string in self._strings[row])
        return found

    def completions(self, logprobs: np.ndarray, scores: Sequence[np.ndarray | None]) -> list[Completion]:
        """The finished rows, in the order of the requests.

        `logprobs` is (rows, longest); `scores` has (longest, K) for every row that is scored.
        """
        lengths = self._lengths.tolist()
        return make_completions(
            self._tokenizer,
            [row[:length].tolist() for row, length in zip(self._tokens, lengths, strict=True)],
            [row[:length].tolist() for row, length in zip(logprobs, lengths, strict=True)],
            self._stopped.tolist(),
            [None if row is None else row[:length] for row, length in zip(scores, lengths, strict=True)],
        )


def _without(finished: np.ndarray) -> np.ndarray:
    """Positions of the rows that go on. The last ones fill the gaps, so that few rows move in memory."""
    count = int((~finished).sum())
    kept = np.arange(count)
    kept[np.flatnonzero(finished[:count])] = count + np.flatnonzero(~finished[count:])
    return kept


def _copy_weights(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Copy the weights of `source`, adapters merged, into those of `target`."""
    held = target.state_dict()
    missing = set(held)
    for name, weight in named_weights(source):
        if name not in held or held[name].shape != weight.shape:
            raise RolloutError(f"weight {name!r} of the policy does not fit the model that is sampled from")
        held[name].copy_(weight)
        missing.discard(name)
    if missing:
        raise RolloutError(f"the policy has no weight {min(missing)!r}, which the sampled model has")


@contextmanager
def _inference(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode comes back afterwards.

    `no_grad`, not `inference_mode`: some rotary embeddings store what they compute in a forward pass, and
    an inference tensor left there would break the next backward pass.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
