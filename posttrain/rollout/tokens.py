"""What both engines read off a model and a tokenizer: context length, end-of-sequence tokens, completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from posttrain.errors import PosttrainError
from posttrain.rollout.types import Completion
from posttrain.zip_rc.grid import grid_of


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


def reserved_ids(config: PretrainedConfig) -> tuple[int, ...]:
    """Token ids that a checkpoint keeps for its forecasts: no token of a text has them.

    Their logits have no part in the policy's distribution, neither where it samples nor where it is trained.
    """
    grid = grid_of(config)
    return () if grid is None else grid.ids


def normalised_scores(logits: NDArray[np.floating]) -> NDArray[np.float32]:
    """`Completion.scored` from logits (T, K) of the scored ids, or from log-probs with any normaliser."""
    values = np.asarray(logits, dtype=np.float64)
    values = values - values.max(axis=-1, keepdims=True)
    values -= np.log(np.exp(values).sum(axis=-1, keepdims=True))
    return values.astype(np.float32)


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
    scores: Sequence[NDArray[np.floating] | None],
) -> list[Completion]:
    """Completions from token ids, their log-probs, whether they stopped by themselves, and the logits (T, K)
    of what they were scored on, up to a constant for each position.
    """
    texts = decode_texts(tokenizer, list(rows))
    return [
        Completion(
            tuple(tokens),
            tuple(values),
            "stop" if ended else "length",
            text,
            scored=None if read is None else normalised_scores(read),
        )
        for tokens, values, ended, text, read in zip(rows, logprobs, stopped, texts, scores, strict=True)
    ]
