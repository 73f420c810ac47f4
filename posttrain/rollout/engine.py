"""The rollout engine: the one interface through which every stage and method samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from posttrain.errors import RolloutError
from posttrain.rollout.types import Completion, Fork, Rollout, RolloutRequest, Sampling, derive_seed


class RolloutEngine(Protocol):
    """Answers rollout requests with the current policy weights.

    `version` counts the syncs: every completion is of the version that was current when it was asked for.
    """

    version: int
    max_model_len: int
    """Longest prompt plus completion, in tokens."""

    def generate(self, requests: Sequence[RolloutRequest]) -> list[list[Completion]]:
        """Complete every request `sampling.n` times.

        Order is kept, and requests of one call may differ in every sampling field. The same weights,
        requests and seeds give the same completions. Log-probs are those of the model, finite or not: see
        `require_finite`.

        Raises:
            RolloutError: a prompt is empty, or does not fit with at least one new token.
        """
        ...

    def fork(
        self, rollout: Rollout, cuts: Sequence[int], n: int, sampling: Sampling
    ) -> list[list[Completion]]:
        """Continue a rollout `n` times from each cut; the tokens before it are computed once.

        Args:
            rollout: finished, or cut short by its token cap.
            cuts: how many tokens of its completion each continuation keeps, 0 to all of them.
            n: continuations of each cut.
            sampling: of the continuations; its own `n` does not count.

        Returns:
            For each cut its continuations, without the tokens that were kept.

        Raises:
            RolloutError: a cut outside the completion, or no room for a new token.
        """
        ...

    def sync(self, model: Any) -> None:
        """Take over the weights of `model` (a `PreTrainedModel` or `PeftModel`, which is not written to)."""
        ...

    def close(self) -> None:
        """Free memory and processes. The engine cannot be used afterwards; closing twice is harmless."""
        ...


def check_requests(requests: Sequence[RolloutRequest], max_model_len: int, vocab_size: int) -> None:
    """Refuse requests that no engine could answer, naming the example.

    Raises:
        RolloutError: empty prompt, prompt too long for the context, caps below one token, or a banned or
            scored id outside the vocabulary.
    """
    for request in requests:
        length = len(request.prompt_ids)
        if length == 0:
            raise RolloutError(f"prompt of example {request.example.id!r} is empty")
        if length >= max_model_len:
            raise RolloutError(
                f"prompt of example {request.example.id!r} has {length} tokens, "
                f"which leaves no room in the context of {max_model_len}"
            )
        if request.sampling.max_tokens < 1 or request.sampling.n < 1:
            raise RolloutError(
                f"request for example {request.example.id!r} asks for n={request.sampling.n}, "
                f"max_tokens={request.sampling.max_tokens}; both must be at least 1"
            )
        ids = (*request.sampling.banned_ids, *request.sampling.scored_ids)
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            wrong = next(token for token in ids if not 0 <= token < vocab_size)
            raise RolloutError(
                f"request for example {request.example.id!r} bans or scores token id {wrong}; the model has "
                f"{vocab_size}"
            )


def fork_requests(
    rollout: Rollout, cuts: Sequence[int], n: int, sampling: Sampling, suffix: tuple[int, ...] = ()
) -> list[RolloutRequest]:
    """The requests whose completions continue a rollout: `RolloutEngine.fork` is `generate` of these.

    Prompt, kept tokens and `suffix` become the prompt. A cut's seed derives from the sampling's, the
    rollout's id and the cut, so that the continuations of different cuts and of different rollouts are
    independent.

    Raises:
        RolloutError: a cut outside the completion.
    """
    request, tokens = rollout.request, rollout.completion.token_ids
    for cut in cuts:
        if not 0 <= cut <= len(tokens):
            raise RolloutError(f"rollout {rollout.id!r} has {len(tokens)} tokens: it cannot be cut at {cut}")
    return [
        replace(
            request,
            prompt_ids=request.prompt_ids + tokens[:cut] + suffix,
            sampling=replace(sampling, n=n, seed=derive_seed(sampling.seed, rollout.id, cut)),
            fork=Fork(rollout.id, cut),
        )
        for cut in cuts
    ]


def require_finite(requests: Sequence[RolloutRequest], answers: Sequence[Sequence[Completion]]) -> None:
    """Refuse an engine's answers if the model that gave them is broken.

    Raises:
        RolloutError: a log-prob is not finite; names the example.
    """
    for request, completions in zip(requests, answers, strict=True):
        if not all(math.isfinite(value) for completion in completions for value in completion.logprobs):
            raise RolloutError(
                f"log-probs of example {request.example.id!r} are not finite: the model's weights or its "
                "activations are broken"
            )
