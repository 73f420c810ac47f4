"""An engine of your own: the plainest one there can be, which runs the whole sequence for every new token.

Slow, and short enough to see all that an engine owes the rest: the order of the requests, each with its own
sampling, log-probs of the distribution that was sampled from, stops, seeds, and new weights at a sync.

    from grpo_from_scratch import Settings, train
    train(Settings(), engine=PlainEngine(model, tokenizer))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from posttrain.errors import RolloutError
from posttrain.rollout.engine import check_requests, fork_requests
from posttrain.rollout.sampling import RowSampler
from posttrain.rollout.tokens import end_of_sequence_ids, make_completions, model_context, reserved_ids
from posttrain.rollout.types import Completion, Rollout, RolloutRequest, Sampling


class PlainEngine:
    """A `RolloutEngine` that knows neither batches nor caches. Samples from `model` where it is."""

    def __init__(self, model: Any, tokenizer: Any):
        self.version = 0
        self.max_model_len = model_context(model.config)
        self._model = model
        self._tokenizer = tokenizer

    def generate(self, requests: Sequence[RolloutRequest]) -> list[list[Completion]]:
        """`sampling.n` completions of every request, in order."""
        if self._model is None:
            raise RolloutError("the rollout engine is closed")
        check_requests(requests, self.max_model_len, self._model.config.vocab_size)
        return [[self._complete(request, i) for i in range(request.sampling.n)] for request in requests]

    def fork(
        self, rollout: Rollout, cuts: Sequence[int], n: int, sampling: Sampling
    ) -> list[list[Completion]]:
        """Continue a rollout `n` times from each cut: ordinary requests with longer prompts."""
        return self.generate(fork_requests(rollout, cuts, n, sampling))

    def sync(self, model: Any) -> None:
        """Sample from these weights from now on."""
        if self._model is None:
            raise RolloutError("the rollout engine is closed")
        self._model = model
        self.version += 1

    def close(self) -> None:
        """Let go of the model."""
        self._model = None

    def _complete(self, request: RolloutRequest, index: int) -> Completion:
        sampling, model = request.sampling, self._model
        # Draws depend on the request's seed and the completion's index alone: whatever else is asked for,
        # before or after, a request gets the same completions.
        sampler = RowSampler([sampling], [index], model.device, reserved_ids(model.config))
        ends = end_of_sequence_ids(model.generation_config, self._tokenizer) | set(sampling.stop_token_ids)
        tokens: list[int] = []
        logprobs: list[float] = []
        read: list[Any] = []
        room = min(sampling.max_tokens, self.max_model_len - len(request.prompt_ids))
        stopped = False
        while len(tokens) < room and not stopped:
            ids = torch.tensor([[*request.prompt_ids, *tokens]], device=model.device)
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
            read.append(logits[0, list(sampling.scored_ids)].float().cpu().numpy())
            token, logprob = sampler(logits)
            tokens.append(int(token))
            logprobs.append(float(logprob))
            stopped = tokens[-1] in ends or self._says(tokens, sampling.stop)
        scores = np.stack(read) if sampling.scored_ids else None
        (completion,) = make_completions(self._tokenizer, [tokens], [logprobs], [stopped], [scores])
        return completion

    def _says(self, tokens: list[int], strings: Sequence[str]) -> bool:
        """Whether the text so far has one of the strings."""
        text = self._tokenizer.decode(tokens, skip_special_tokens=True) if strings else ""
        return any(string in text for string in strings)
