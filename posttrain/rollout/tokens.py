"""What both engines read off a model and a tokenizer: context length, end-of-sequence tokens, completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from posttrain.errors import PosttrainError
from posttrain.rollout.types import Completion


def model_context(config: PretrainedConfig) -> int:
    """Longest sequence a model was made for, in tokens.

    Raises:
        PosttrainError: the model's configuration does not say; the recipe must.
    """
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    if length is None:
        raise PosttrainError("the model has no max_position_embeddings: set rollout.max_model_len")
    return length


def end_of_sequence_ids(
    generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """Tokens that end a completion: those of the generation configuration and the tokenizer's own."""
    configured: Any = generation.eos_token_id if generation is not None else None
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*ids, tokenizer.eos_token_id) if token is not None)


def decode_texts(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> list[str]:
    """Text of token ids without special tokens; nothing else is stripped or cleaned up."""
    if not rows:  # an empty batch would be taken for one empty row
        return []
    return tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def visible_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> np.ndarray:
    """Which of the model's `vocab_size` token ids have text: neither special tokens nor unused ids do."""
    visible = np.zeros(vocab_size, dtype=bool)
    visible[list(tokenizer.get_vocab().values())] = True
    visible[tokenizer.all_special_ids] = False
    return visible


def make_completions(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[list[int]],
    logprobs: Sequence[list[float]],
    stopped: Sequence[bool],
) -> list[Completion]:
    """Completions from token ids, their log-probs, and whether they stopped by themselves."""
    return [
        Completion(tuple(tokens), tuple(values), "stop" if ended else "length", text)
        for tokens, values, ended, text in zip(
            rows, logprobs, stopped, decode_texts(tokenizer, list(rows)), strict=True
        )
    ]
