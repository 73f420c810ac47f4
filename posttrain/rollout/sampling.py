"""Drawing tokens from logits: one row is one completion, with its own parameters and its own random stream.

A row's draws depend on its logits, its seed and its index alone, never on the rows beside it.
Shapes: B rows decoded together, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from posttrain.rollout.types import Sampling, derive_seed

_SCALE = 2.0**52  # weights of all tokens sum to about this: exact in int64 and in float64
_MAX_ELEMENTS = 2**24  # rows are drawn in slices of this many logits, which bounds the scratch memory
_BLOCK = 64  # uniforms drawn at once per row


def truncate_logits(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Set the logits (B, V) outside the `top_k` (B,) best and outside the `top_p` (B,) nucleus to -inf.

    Top-k comes first, as in vLLM; 0 keeps all. The nucleus is the smallest set of most probable tokens
    that reaches `top_p` (Holtzman et al., 2020, section 3.1); the best token always stays.
    """
    vocab_size = logits.shape[-1]
    ordered, order = logits.sort(dim=-1, descending=True)
    limit = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size)
    lowest = ordered.gather(-1, limit[:, None] - 1)
    ordered = ordered.masked_fill(ordered < lowest, -torch.inf)
    probs = ordered.softmax(dim=-1)
    # A cumulative sum may round to a little below 1, so that top_p=1 must not be compared at all.
    outside = (probs.cumsum(dim=-1) - probs >= top_p[:, None]) & (top_p < 1)[:, None]
    outside[:, 0] = False
    ordered = ordered.masked_fill(outside, -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def draw(logprobs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Inverse-CDF sampling: tokens (B,) from log-probs (B, V) and uniforms (B,) in [0, 1).

    The cumulative sum is taken over integers (probabilities times 2^52), so that it is exact, the same on
    every device, and constant over tokens of probability zero, which therefore are never chosen.
    """
    weights = logprobs.exp().mul_(_SCALE).long()
    cumulative = weights.cumsum_(dim=-1)
    total = cumulative[:, -1:]
    threshold = (uniforms[:, None] * total.double()).long()
    tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    # Only non-finite log-probs lead past the end; they are for the caller to see, not for an index error.
    return tokens.clamp_(max=logprobs.shape[-1] - 1)


class RowSampler:
    """Samples one token for each active row; rows leave with `select`.

    `samplings[b]` and `indices[b]` are the parameters and the completion index of row b; `reserved` are token
    ids that no row samples.
    """

    def __init__(
        self,
        samplings: Sequence[Sampling],
        indices: Sequence[int],
        device: torch.device,
        reserved: Sequence[int] = (),
    ) -> None:
        self._device = device
        self._streams = [
            np.random.Philox(key=derive_seed(sampling.seed, index))
            for sampling, index in zip(samplings, indices, strict=True)
        ]
        self._uniforms = torch.empty(0)
        self._drawn = _BLOCK
        greedy = [sampling.temperature == 0 for sampling in samplings]
        temperatures = [sampling.temperature or 1.0 for sampling in samplings]
        self._greedy = torch.tensor(greedy, device=device)
        self._temperature = torch.tensor(temperatures, dtype=torch.float32, device=device)[:, None]
        self._top_k = torch.tensor([sampling.top_k for sampling in samplings], device=device)
        self._top_p = torch.tensor([sampling.top_p for sampling in samplings], device=device)
        bans = [(*reserved, *sampling.banned_ids) for sampling in samplings]
        most = max(map(len, bans))
        # (B, M), filled up with one of the row's own, or for a row without any, with one that stays as it is.
        padded = [(*ids, *(ids or (0,))[:1] * (most - len(ids))) for ids in bans]
        self._banned = torch.tensor(padded, dtype=torch.long, device=device)
        self._bans = torch.tensor([bool(ids) for ids in bans], device=device)[:, None]
        # Known on the host, so that the usual case costs no work and no wait for the device.
        self._any_banned = any(bans)
        self._any_greedy = any(greedy)
        self._any_scaled = any(temperature != 1.0 for temperature in temperatures)
        self._any_truncated = any(sampling.top_k > 0 or sampling.top_p < 1 for sampling in samplings)

    def __call__(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Next token (B,) and its log-probability (B,) for the active rows' logits (B, V).

        Where tokens are banned, the logits are overwritten.
        """
        rows = max(1, _MAX_ELEMENTS // logits.shape[-1])
        uniforms = self._next_uniforms()
        parts = [
            self._sample(
                logits[start : start + rows], uniforms[start : start + rows], slice(start, start + rows)
            )
            for start in range(0, len(logits), rows)
        ]
        return torch.cat([tokens for tokens, _ in parts]), torch.cat([logprobs for _, logprobs in parts])

    def select(self, rows: torch.Tensor, kept: Sequence[int]) -> None:
        """Keep only the given rows: `rows` on the device and `kept` on the host hold the same indices."""
        self._streams = [self._streams[row] for row in kept]
        self._uniforms = self._uniforms[rows]
        self._banned, self._bans = self._banned[rows], self._bans[rows]
        self._greedy = self._greedy[rows]
        self._temperature = self._temperature[rows]
        self._top_k = self._top_k[rows]
        self._top_p = self._top_p[rows]

    def _sample(
        self, logits: torch.Tensor, uniforms: torch.Tensor, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits.float()
        if self._any_banned:  # before all that looks at the other logits
            # In place, and only where it changes something: a copy would cost as much as the softmax.
            ids = self._banned[rows]
            logits.scatter_(1, ids, logits.gather(1, ids).masked_fill_(self._bans[rows], -torch.inf))
        if self._any_scaled:
            logits = logits / self._temperature[rows]
        if self._any_truncated:
            logits = truncate_logits(logits, self._top_k[rows], self._top_p[rows])
        logprobs = logits.log_softmax(dim=-1)
        tokens = draw(logprobs, uniforms)
        if self._any_greedy:
            tokens = torch.where(self._greedy[rows], logits.argmax(dim=-1), tokens)
        return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)

    def _next_uniforms(self) -> torch.Tensor:
        if self._drawn == _BLOCK:
            raw = np.stack([stream.random_raw(_BLOCK) for stream in self._streams])
            self._uniforms = torch.from_numpy((raw >> np.uint64(11)) * 2.0**-53).to(self._device)
            self._drawn = 0
        self._drawn += 1
        return self._uniforms[:, self._drawn - 1]
