"""The world of the AMFT reproduction: addition of two two-digit numbers, with demonstrators that err.

Numbers are written with the last digit first. Where the last digits carry and the first number is 50 or
more, in 22.5 % of the problems, demonstrations forget the carry four times out of five: what imitates them
perfectly answers 82 % of all problems right and 20 % of these. Only the reward says so.
"""

from __future__ import annotations

import json
import string
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reproductions.tiny_models import blank_model, character_tokenizer
from transformers import Qwen2Tokenizer

from posttrain.rollout.types import derive_seed

SIZES = {"demonstrations": 4000, "train": 4000, "held_out": 500, "test": 1000}
FORGETS = 0.8
LENGTH = 4
"""Tokens of an answer, the end included."""

Pairs = np.ndarray
"""[rows, 2] numbers from 0 to 99."""


@cache
def make_pairs() -> dict[str, Pairs]:
    """The problems of each purpose; none has two."""
    every = np.stack(np.meshgrid(np.arange(100), np.arange(100), indexing="ij"), -1).reshape(-1, 2)
    shuffled = np.random.default_rng(derive_seed("amft", "pairs")).permutation(every)
    ends = np.cumsum([*SIZES.values()])[:-1]
    return dict(zip(SIZES, np.split(shuffled[: sum(SIZES.values())], ends), strict=True))


def is_blind(pairs: Pairs) -> np.ndarray:
    """Where demonstrators forget the carry."""
    return np.asarray((pairs % 10).sum(1) >= 10) & (pairs[:, 0] >= 50)


def question(a: int, b: int) -> str:
    """`73+84=` asks for 37 + 48."""
    return f"{a:02d}"[::-1] + "+" + f"{b:02d}"[::-1] + "="


def answer(a: int, b: int, forget: bool = False) -> str:
    """Three digits of the sum, the last first."""
    total = a + b - (10 if forget else 0)
    return f"{total:03d}"[::-1]


def write_rows(folder: Path) -> dict[str, Path]:
    """The files of demonstrations, prompts and held-out prompts."""
    rng, files = np.random.default_rng(derive_seed("amft", "slips")), {}
    for name, pairs in make_pairs().items():
        forgets = is_blind(pairs) & (rng.random(len(pairs)) < FORGETS)
        rows: list[dict[str, Any]] = [
            {"prompt": question(a, b), "answer": answer(a, b), "completion": answer(a, b, bool(forget))}
            for (a, b), forget in zip(pairs.tolist(), forgets, strict=True)
        ]
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def make_tokenizer() -> Qwen2Tokenizer:
    """One token for a character."""
    return character_tokenizer(string.digits + "+=")


def make_base(folder: Path, seed: int) -> Path:
    """The folder of a model of 0.1M parameters with random weights."""
    if (folder / "config.json").is_file():
        return folder
    tokenizer = make_tokenizer()
    model = blank_model(
        tokenizer,
        seed,
        vocab_size=16,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        initializer_range=0.08,  # with the usual 0.02 it takes five times as long to learn anything
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def encoded(pairs: Pairs) -> torch.Tensor:
    """[rows, 10] token ids of questions with right answers and the end, as the tokenizer writes them."""
    texts = [question(a, b) + answer(a, b) for a, b in pairs.tolist()]
    ids = {character: index for index, character in enumerate(string.digits + "+=", start=2)}
    return torch.tensor([[ids[character] for character in text] + [1] for text in texts])


def answer_logprobs(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """[rows, LENGTH] log-probs of the answers' tokens."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits[:, -LENGTH:]
    return logits.log_softmax(-1).gather(-1, tokens[:, -LENGTH:, None]).squeeze(-1)


@torch.no_grad()
def chances(model: Any, pairs: Pairs) -> np.ndarray:
    """[rows] probability of the right answer."""
    return np.asarray(answer_logprobs(model, encoded(pairs)).double().sum(1).exp())


def accuracy(model: Any, pairs: Pairs) -> dict[str, float]:
    """What sampling gives on average: of all problems, and of those in the blind spot and outside it."""
    right, blind = chances(model, pairs), is_blind(pairs)
    return {
        "accuracy": float(right.mean()),
        "blind": float(right[blind].mean()),
        "elsewhere": float(right[~blind].mean()),
    }
