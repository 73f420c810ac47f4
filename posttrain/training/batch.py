"""From rollouts and channels to padded micro-batches of flat completion tokens.

Names of axes: B rows of a micro-batch, L its longest row, N its trained completion tokens, one after the
other. A loss never sees padding: it gets `[N]` tensors and each token's row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from posttrain.methods.base import Channel, LossTerm
from posttrain.rollout.types import Rollout


@dataclass
class TrainRow:
    """One sequence to train on.

    Arrays are over the trained tokens of the completion, those whose `positions` (indices into `token_ids`)
    are listed: tool output and prompt are not among them. `advantages` and `nll_weights` are keyed by channel
    and term; a row without a key is not part of that loss.
    """

    token_ids: tuple[int, ...]
    positions: np.ndarray
    advantages: dict[str, np.ndarray] = field(default_factory=dict)
    nll_weights: dict[str, np.ndarray] = field(default_factory=dict)
    sampling_logprobs: np.ndarray | None = None
    old_logprobs: np.ndarray | None = None
    reference_logprobs: np.ndarray | None = None

    @property
    def is_rollout(self) -> bool:
        """Whether the policy sampled this row (else it is supervised text)."""
        return self.sampling_logprobs is not None


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together.

    `input_ids`, `attention_mask`: [B, L]. `row`, `position`, `targets`: [N], the row of each trained token,
    the position whose hidden state predicts it, and the token itself.
    """

    rows: list[TrainRow]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    row: torch.Tensor
    position: torch.Tensor
    targets: torch.Tensor

    def flat(self, name: str) -> torch.Tensor:
        """An array of all rows, concatenated: [N] float32 on the micro-batch's device."""
        arrays = [getattr(row, name) for row in self.rows]
        return _tensor(arrays, self.targets.device)

    def select(self, kind: str, term: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of one channel (`kind` "advantages") or term ("nll_weights").

        Returns:
            Boolean mask [N] of the tokens that belong to it, and their values [sum of the mask].
        """
        tables = [getattr(row, kind) for row in self.rows]
        member = np.concatenate(
            [np.full(len(row.positions), term in table) for row, table in zip(self.rows, tables, strict=True)]
        )
        values = [table[term] for table in tables if term in table]
        device = self.targets.device
        return torch.from_numpy(member).to(device), _tensor(values, device)


def _tensor(arrays: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    flat = np.concatenate(arrays) if arrays else np.zeros(0)
    return torch.from_numpy(flat.astype(np.float32)).to(device)


def rollout_row(rollout: Rollout, channels: Iterable[Channel]) -> TrainRow | None:
    """The row of a rollout, or None when no channel trains it or it has no trained token."""
    prompt, completion = rollout.request.prompt_ids, rollout.completion
    kept = np.flatnonzero(
        np.ones(len(completion.token_ids)) if completion.loss_mask is None else completion.loss_mask
    )
    advantages = {}
    for channel in channels:
        if rollout.id in channel.advantages:
            value = np.asarray(channel.advantages[rollout.id], dtype=np.float64)
            advantages[channel.name] = np.broadcast_to(value, (len(completion.token_ids),))[kept]
    if not advantages or len(kept) == 0:
        return None
    return TrainRow(
        token_ids=(*prompt, *completion.token_ids),
        positions=kept + len(prompt),
        advantages=advantages,
        sampling_logprobs=np.asarray(completion.logprobs, dtype=np.float64)[kept],
    )


def supervised_rows(term: LossTerm) -> list[TrainRow]:
    """The rows of a supervised term."""
    return [
        TrainRow(
            token_ids=(*prompt, *completion),
            positions=np.arange(len(prompt), len(prompt) + len(completion)),
            nll_weights={term.name: np.ones(len(completion))},
        )
        for prompt, completion in term.rows
        if len(completion) > 0
    ]


def split_rows(rows: Sequence[TrainRow], max_tokens: int) -> list[list[TrainRow]]:
    """Cut rows into micro-batches of at most `max_tokens` tokens, padding included.

    Longest first, so that rows of like length share a micro-batch; a single row may exceed the budget.
    """
    micro_batches: list[list[TrainRow]] = []
    for row in sorted(rows, key=lambda row: -len(row.token_ids)):
        if micro_batches:
            longest = len(micro_batches[-1][0].token_ids)
            if longest * (len(micro_batches[-1]) + 1) <= max_tokens:
                micro_batches[-1].append(row)
                continue
        micro_batches.append([row])
    return micro_batches


def collate(rows: Sequence[TrainRow], pad_token_id: int, device: torch.device) -> MicroBatch:
    """Right-padded tensors of a micro-batch."""
    length = max(len(row.token_ids) for row in rows)
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
    for index, row in enumerate(rows):
        input_ids[index, : len(row.token_ids)] = torch.tensor(row.token_ids)
        attention_mask[index, : len(row.token_ids)] = 1
    row_of_token = torch.from_numpy(np.repeat(np.arange(len(rows)), [len(row.positions) for row in rows]))
    token_at = torch.from_numpy(np.concatenate([row.positions for row in rows]))
    return MicroBatch(
        rows=list(rows),
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        row=row_of_token.to(device),
        position=(token_at - 1).to(device),
        targets=input_ids[row_of_token, token_at].to(device),
    )


def empty_row(pad_token_id: int) -> TrainRow:
    """A row without a trained token: it pads a rank's number of micro-batches where collectives need it."""
    return TrainRow(token_ids=(pad_token_id, pad_token_id), positions=np.zeros(0, dtype=np.int64))
