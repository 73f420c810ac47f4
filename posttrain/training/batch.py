"""From rollouts and channels to micro-batches of flat completion tokens.

Names of axes: B rows of the model's input, L their length, N the trained completion tokens of a micro-batch,
one after the other. A loss never sees how rows are packed: it gets `[N]` tensors and each token's row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

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
    def context(self) -> tuple[int, ...]:
        """What the model must see: everything before the last trained token, at least one token."""
        return self.token_ids[: max(int(self.positions[-1]), 1) if len(self.positions) else 1]

    @property
    def is_rollout(self) -> bool:
        """Whether the policy sampled this row (else it is supervised text)."""
        return self.sampling_logprobs is not None


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together.

    Attributes:
        rows: in the order of the flat arrays below.
        inputs: keyword arguments of the model's forward; `input_ids` is [B, L].
        row: [N] the row of each trained token.
        targets: [N] the token itself.
        places: [U] where distinct predictions are made: indices into the B·L hidden states.
        place_targets: [U] what is predicted there.
        prediction: [N] the prediction each trained token is; rows with a common prefix share them.
    """

    rows: list[TrainRow]
    inputs: dict[str, Any]
    row: torch.Tensor
    targets: torch.Tensor
    places: torch.Tensor
    place_targets: torch.Tensor
    prediction: torch.Tensor

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
    weights = term.row_weights or [1.0] * len(term.rows)
    return [
        TrainRow(
            token_ids=(*prompt, *completion),
            positions=np.arange(len(prompt), len(prompt) + len(completion)),
            nll_weights={term.name: np.full(len(completion), weight)},
        )
        for (prompt, completion), weight in zip(term.rows, weights, strict=True)
        if len(completion) > 0
    ]


class Packing(Protocol):
    """How rows are laid out for the model."""

    name: str

    def split(self, rows: Sequence[TrainRow], max_tokens: int) -> list[list[TrainRow]]:
        """Micro-batches of at most `max_tokens` tokens as this packing computes them.

        Depends on nothing but the rows. A single row may exceed the budget.
        """

    def collate(self, rows: Sequence[TrainRow], device: torch.device) -> MicroBatch:
        """The tensors of a micro-batch."""


class PaddedPacking:
    """One row of the batch per sequence, padded on the right: any model takes it."""

    name = "padded"

    def split(self, rows: Sequence[TrainRow], max_tokens: int) -> list[list[TrainRow]]:
        """See `Packing.split`: padding counts. Longest first, so that rows of like length are together."""
        micro_batches: list[list[TrainRow]] = []
        for row in sorted(rows, key=lambda row: -len(row.context)):
            if micro_batches:
                longest = len(micro_batches[-1][0].context)
                if longest * (len(micro_batches[-1]) + 1) <= max_tokens:
                    micro_batches[-1].append(row)
                    continue
            micro_batches.append([row])
        return micro_batches

    def collate(self, rows: Sequence[TrainRow], device: torch.device) -> MicroBatch:
        """See `Packing.collate`."""
        contexts = [row.context for row in rows]
        length = max(map(len, contexts))
        input_ids = torch.zeros((len(rows), length), dtype=torch.long)
        attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
        for index, context in enumerate(contexts):
            input_ids[index, : len(context)] = torch.tensor(context)
            attention_mask[index, : len(context)] = 1
        inputs = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
        paths = [index * length + np.arange(len(context)) for index, context in enumerate(contexts)]
        return flat_batch(rows, inputs, paths, device)


class PaddingFreePacking:
    """All sequences one after the other in one row, position ids starting again with each.

    transformers tells flash attention from them where a sequence begins.
    """

    name = "padding-free"

    def split(self, rows: Sequence[TrainRow], max_tokens: int) -> list[list[TrainRow]]:
        """See `Packing.split`: the tokens of all rows count."""
        micro_batches: list[list[TrainRow]] = []
        used = 0
        for row in rows:
            if micro_batches and used + len(row.context) <= max_tokens:
                micro_batches[-1].append(row)
            else:
                micro_batches.append([row])
                used = 0
            used += len(row.context)
        return micro_batches

    def collate(self, rows: Sequence[TrainRow], device: torch.device) -> MicroBatch:
        """See `Packing.collate`."""
        lengths = [len(row.context) for row in rows]
        starts = np.cumsum([0, *lengths[:-1]])
        tokens = np.concatenate([np.asarray(row.context) for row in rows])
        positions = np.concatenate([np.arange(length) for length in lengths])
        inputs = {
            "input_ids": torch.from_numpy(tokens)[None].to(device),
            "position_ids": torch.from_numpy(positions)[None].to(device),
        }
        paths = [start + np.arange(length) for start, length in zip(starts, lengths, strict=True)]
        return flat_batch(rows, inputs, paths, device)


def flat_batch(
    rows: Sequence[TrainRow], inputs: dict[str, Any], paths: Sequence[np.ndarray], device: torch.device
) -> MicroBatch:
    """A micro-batch from the model's inputs and the place of every row's tokens in them."""
    places = np.concatenate([path[row.positions - 1] for row, path in zip(rows, paths, strict=True)])
    targets = np.concatenate([np.asarray(row.token_ids, dtype=np.int64)[row.positions] for row in rows])
    pairs = places * (targets.max(initial=0) + 1) + targets
    _, first, prediction = np.unique(pairs, return_index=True, return_inverse=True)
    numbers = np.repeat(np.arange(len(rows)), [len(row.positions) for row in rows])
    arrays = (numbers, targets, places[first], targets[first], prediction)
    return MicroBatch(list(rows), inputs, *(torch.from_numpy(array).to(device) for array in arrays))


def empty_row() -> TrainRow:
    """A row without a trained token: it pads a rank's number of micro-batches where collectives need it."""
    return TrainRow(token_ids=(0,), positions=np.zeros(0, dtype=np.int64))
