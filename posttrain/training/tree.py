"""Rows that share prefixes, trained as a forest in which every distinct token is computed once.

The rows of a micro-batch are sorted, and each adds to one packed row only what it does not share with the row
before it: a group's prompt, a common beginning of forked completions, a duplicate are there once. Position
ids go on from the fork in every branch, and a token sees its own path and nothing else. Gradients add up at
the shared places, so loss and gradients equal those of padded rows.

Attention runs block by block. A block is a stretch of the packed row whose keys are a few other stretches
(its ancestors) and itself, so its work is queries times keys of that path, and a mask over all pairs of
tokens never exists. The stretches come from one `split` of keys and values, whose backward pass is one
concatenation; gathering by index would scatter gradients instead. Short neighbouring branches share a block
when their masked product costs less than one more call.

There is one implementation for every device, `scaled_dot_product_attention`: transformers offers it for every
model that takes a custom attention function, it has a fused kernel on every device, and unlike FlexAttention
it needs no compiler and no block size that would round short branches up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface

from posttrain.rollout.attention import attention_of
from posttrain.training.batch import MicroBatch, TrainRow, flat_batch

ATTENTION = "posttrain_tree"

_SDPA = AttentionInterface()["sdpa"]

PIECE = 512
"""Most queries of a block with a mask, which bounds the mask; longer branches are cut."""

CALL_COST = {"cpu": 1_000, "cuda": 250_000}
"""What one more block costs, in query-key pairs: 0.15 ms forward and backward on a CPU at a hidden size of
256 (measured); launching a dozen kernels on a GPU (estimated)."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Consecutive tokens of one path: those with the indices `start` to `stop` of `path`.

    `path` [≥ stop] holds the places in the packed row of the tokens from the root on, so an index on the path
    is a position id.
    """

    path: np.ndarray
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class Block:
    """Neighbouring pieces that go through attention together.

    The keys are the ancestors of the first piece with the indices `low` and above, which include those of the
    others, and the block itself. A block of one piece needs no mask of its own: query i sees the keys up to
    the i-th of its own.
    """

    pieces: Sequence[Piece]
    low: int

    @property
    def first(self) -> int:
        """Place of the first query."""
        return int(self.pieces[0].path[self.pieces[0].start])

    @property
    def queries(self) -> int:
        """Number of queries."""
        return sum(piece.length for piece in self.pieces)

    @property
    def is_chain(self) -> bool:
        """Whether every query sees all keys up to its own."""
        return len(self.pieces) == 1

    @property
    def ancestors(self) -> np.ndarray:
        """Places of the keys before the block."""
        return self.pieces[0].path[self.low : self.pieces[0].start]

    def key_runs(self) -> list[tuple[int, int]]:
        """The keys as stretches (start, stop) of the packed row, in order."""
        ancestors = self.ancestors
        breaks = np.flatnonzero(np.diff(ancestors) != 1) + 1
        runs = [(int(run[0]), int(run[-1]) + 1) for run in np.split(ancestors, breaks) if len(run)]
        return [*runs, (self.first, self.first + self.queries)]

    def mask(self, window: int | None) -> np.ndarray:
        """Which key [ancestors and block] each query [queries] sees."""
        before = len(self.ancestors)
        allowed = np.zeros((self.queries, before + self.queries), dtype=bool)
        for piece in self.pieces:
            places = piece.path[: piece.stop]
            index = np.arange(piece.stop)
            inside = places >= self.first
            columns = np.where(inside, places - self.first + before, index - self.low)
            kept = inside | (index >= self.low)
            query = index[piece.start :, None]
            seen = index <= query
            if window is not None:
                seen &= index > query - window
            row = int(places[piece.start]) - self.first
            allowed[row : row + piece.length, columns[kept]] = seen[:, kept]
        return allowed


class Tree:
    """A forest of token sequences laid out in one row, and how attention runs over it.

    Attributes:
        tokens: [T], parents before children.
        positions: [T] position ids, the depths.
        paths: places in the row of every sequence's tokens, in the order of the sequences given.
        windows: the sliding windows that attention layers asked for so far, None for full attention.
    """

    def __init__(self, sequences: Sequence[Sequence[int]]):
        order = sorted(range(len(sequences)), key=lambda index: tuple(sequences[index]))
        self.paths: list[np.ndarray] = [np.zeros(0, dtype=np.int64)] * len(sequences)
        self.windows: set[int | None] = set()
        self._pieces: list[Piece] = []
        self._plans: dict[tuple[int | None, str, torch.dtype], _Plan] = {}
        tokens, positions, size = [], [], 0
        last = path = np.zeros(0, dtype=np.int64)
        for index in order:
            sequence = np.asarray(sequences[index], dtype=np.int64)
            shared = common_prefix(last, sequence)
            new = len(sequence) - shared
            path = np.concatenate([path[:shared], np.arange(size, size + new)])
            if new:
                self._pieces.append(Piece(path, shared, len(sequence)))
                tokens.append(sequence[shared:])
                positions.append(np.arange(shared, len(sequence)))
            self.paths[index] = path
            last, size = sequence, size + new
        self.tokens = np.concatenate(tokens)
        self.positions = np.concatenate(positions)

    def plan(self, window: int | None, device: torch.device, dtype: torch.dtype) -> _Plan:
        """The blocks of a layer with this sliding window; made once for all layers alike."""
        self.windows.add(window)
        if window is not None and window > self.positions.max():
            window = None
        key = (window, str(device), dtype)
        if key not in self._plans:
            blocks = partition(self._pieces, window, CALL_COST.get(device.type, CALL_COST["cuda"]))
            self._plans[key] = _Plan(blocks, window, device, dtype)
        return self._plans[key]


def common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """Length of the longest common prefix."""
    shorter = min(len(one), len(other))
    different = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(different[0]) if len(different) else shorter


def partition(pieces: Sequence[Piece], window: int | None, call_cost: int) -> list[Block]:
    """Cut long pieces, then join neighbours into the blocks of least cost, by dynamic programming.

    A block costs its queries times its keys plus `call_cost`. A root is never cut where it takes the causal
    kernel, which needs no mask.
    """
    short: list[Piece] = []
    for piece in pieces:
        step = piece.length if piece.start == 0 and window is None else PIECE
        short += [
            Piece(piece.path, start, min(start + step, piece.stop))
            for start in range(piece.start, piece.stop, step)
        ]
    best: list[tuple[float, int]] = [(0.0, 0)]  # cost of the first pieces, and where their last block starts
    for stop in range(1, len(short) + 1):
        alone = short[stop - 1]
        keys = alone.stop - _low(alone.start, window)
        options = [(best[stop - 1][0] + alone.length * keys / (1 if alone.start else 2), stop - 1)]
        queries, lowest = alone.length, alone.start
        for start in range(stop - 2, -1, -1):
            queries += short[start].length
            if queries > PIECE:
                break
            lowest = min(lowest, short[start].start)
            keys = short[start].start - _low(lowest, window) + queries
            options.append((best[start][0] + queries * keys, start))
        cost, start = min(options)
        best.append((cost + call_cost, start))
    blocks: list[Block] = []
    stop = len(short)
    while stop > 0:
        start = best[stop][1]
        blocks.append(Block(short[start:stop], _low(min(piece.start for piece in short[start:stop]), window)))
        stop = start
    return blocks[::-1]


def _low(start: int, window: int | None) -> int:
    """The first key that a query at position `start` sees."""
    return 0 if window is None else max(0, start - window + 1)


@dataclass(frozen=True)
class _Call:
    """One call of attention: the parts of the split keys it takes, and its mask.

    `mask` is added to the scores [queries, keys]; None means causal, aligned to the last query and key.
    """

    parts: list[int]
    queries: int
    keys: int
    mask: torch.Tensor | None


class _Plan:
    """What a layer does with a tree: where queries and keys are split, and the calls.

    Blocks of one piece share one band of mask values and differ only in where they look at it.
    """

    def __init__(self, blocks: Sequence[Block], window: int | None, device: torch.device, dtype: torch.dtype):
        runs = [block.key_runs() for block in blocks]
        bounds = sorted({bound for block in runs for run in block for bound in run})
        part = {bound: index for index, bound in enumerate(bounds)}
        self.query_sizes = [block.queries for block in blocks]
        self.key_sizes = np.diff(bounds).tolist()
        self.calls: list[_Call] = []

        banded = [block for block in blocks if block.is_chain and not _causal(block, window, device)]
        before = max((len(block.ancestors) for block in banded), default=0)
        rows = max((block.queries for block in banded), default=0)
        band = additive(band_mask(rows, before + rows, window), device, dtype)
        for block, block_runs in zip(blocks, runs, strict=True):
            ancestors, queries = len(block.ancestors), block.queries
            if _causal(block, window, device):
                mask = None
            elif block.is_chain:
                mask = band[:queries, before - ancestors : before + queries]
            else:
                mask = additive(block.mask(window), device, dtype)
            parts = [index for start, stop in block_runs for index in range(part[start], part[stop])]
            self.calls.append(_Call(parts, queries, ancestors + queries, mask))


def _causal(block: Block, window: int | None, device: torch.device) -> bool:
    """Whether a kernel needs no mask for it; on a CPU only when queries and keys are the same tokens."""
    return block.is_chain and window is None and (device.type != "cpu" or len(block.ancestors) == 0)


def band_mask(queries: int, keys: int, window: int | None) -> np.ndarray:
    """Causal mask [queries, keys] whose last query sees the last key, and no key `window` or more before."""
    distance = np.arange(queries)[:, None] + (keys - queries) - np.arange(keys)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def additive(allowed: np.ndarray, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """0 where a boolean mask is true, minus infinity elsewhere."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
    return mask.masked_fill_(torch.from_numpy(~allowed).to(device), float("-inf"))


# --- attention ---------------------------------------------------------------------------------------------


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    tree: Tree | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function "posttrain_tree" of transformers' `AttentionInterface`.

    With a `tree` among the model's keyword arguments the one row of the batch is a packed forest; the mask is
    then ignored. Without one this is transformers' own "sdpa", except that the soft cap of attention scores
    (Gemma 2), which "sdpa" leaves out, is applied.

    Args:
        query: [B, heads, L, D]; key and value: [B, key heads, S, D].

    Returns:
        [B, L, heads, D], and None for the attention weights.
    """
    if tree is None:
        if softcap is None:
            return _SDPA(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        mask = _additive_mask(attention_mask, query, key)
        output = _capped(query, key, value, mask, dropout, scaling, softcap)
        return output.transpose(1, 2).contiguous(), None
    plan = tree.plan(sliding_window, query.device, query.dtype)
    keys, values = (states.split(plan.key_sizes, dim=2) for states in (key, value))
    outputs = []
    for queries, call in zip(query.split(plan.query_sizes, dim=2), plan.calls, strict=True):
        k, v = (_joined([states[part] for part in call.parts]) for states in (keys, values))
        output = _attend(queries, k, v, call, dropout, scaling, softcap)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    call: _Call,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of one block: [1, heads, queries, D]."""
    mask = call.mask
    if softcap is not None:
        if mask is None:
            mask = additive(band_mask(call.queries, call.keys, None), query.device, query.dtype)
        return _capped(query, key, value, mask, dropout, scaling, softcap)
    if mask is None and call.queries == call.keys:
        options: dict[str, Any] = {"is_causal": True}
    else:
        options = {"attn_mask": causal_lower_right(call.queries, call.keys) if mask is None else mask}
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.device.type == "cpu":
        options["enable_gqa"] = True
    elif groups > 1:  # CUDA's fused kernels take grouped heads only without a mask
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    return functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, scale=scaling, **options
    )


def _capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    """Attention with soft-capped scores, `softcap·tanh(scores / softcap)`, which no fused kernel offers."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * (scale / softcap))
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    return functional.dropout(weights, dropout) @ value


def _additive_mask(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """The mask that transformers made for "sdpa": boolean, additive, or None for causal."""
    if mask is None and query.shape[2] > 1:
        return additive(band_mask(query.shape[2], key.shape[2], None), query.device, query.dtype)
    if mask is not None and mask.dtype == torch.bool:
        # A row of padding sees nothing; the lowest number keeps its average finite where infinity would not.
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
    return mask


# --- models ------------------------------------------------------------------------------------------------


def unsupported(model: Any) -> str | None:
    """Why rows of this model cannot be packed as a tree; None if they can.

    Args:
        model: `PreTrainedModel` without adapters around it.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if not model.is_backend_compatible():
        return "its attention cannot be replaced"
    if kinds:
        return f"it has layers of the kind {', '.join(sorted(kinds))}"
    if getattr(config, "attention_chunk_size", None):
        return "its attention works in chunks"
    if attention_of(model) not in ("sdpa", ATTENTION):
        return f"it uses the attention implementation {attention_of(model)}"
    return None


def enable_tree(model: Any) -> None:
    """Make a model take trees; `unsupported` has said that it can. All else goes on as with "sdpa"."""
    AttentionInterface.register(ATTENTION, tree_attention)
    AttentionMaskInterface.register(ATTENTION, AttentionMaskInterface()["sdpa"])
    if attention_of(model) != ATTENTION:
        model.set_attn_implementation(ATTENTION)


# --- packing -----------------------------------------------------------------------------------------------


class TreePacking:
    """Rows as a forest in one row of the batch."""

    name = "tree"

    def split(self, rows: Sequence[TrainRow], max_tokens: int) -> list[list[TrainRow]]:
        """Micro-batches of at most `max_tokens` distinct tokens; a single row may exceed that.

        Rows are sorted, so that those which share tokens are neighbours. A micro-batch ends where its row and
        the next share least, among the places that leave it at least half full.
        """
        rows = sorted(rows, key=lambda row: row.token_ids)
        paths = [np.asarray(row.context) for row in rows]
        shared = [0, *(common_prefix(one, other) for one, other in pairwise(paths))]
        micro_batches: list[list[TrainRow]] = []
        start = 0
        while start < len(rows):
            sizes = [len(paths[start])]  # distinct tokens after each row
            while start + len(sizes) < len(rows):
                at = start + len(sizes)
                total = sizes[-1] + len(paths[at]) - shared[at]
                if total > max_tokens:
                    break
                sizes.append(total)
            stop = start + len(sizes)
            if stop < len(rows):
                enough = [at for at in range(start + 1, stop + 1) if 2 * sizes[at - start - 1] >= sizes[-1]]
                stop = min(enough, key=lambda at: (shared[at], -at))
            micro_batches.append(rows[start:stop])
            start = stop
        return micro_batches

    def collate(self, rows: Sequence[TrainRow], device: torch.device) -> MicroBatch:
        """See `Packing.collate`."""
        tree = Tree([row.context for row in rows])
        inputs = {
            "input_ids": torch.from_numpy(tree.tokens)[None].to(device),
            "position_ids": torch.from_numpy(tree.positions)[None].to(device),
            # Four dimensions mean that a mask is ready: the model then makes none of its own.
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
            "tree": tree,
        }
        return flat_batch(rows, inputs, tree.paths, device)
