"""What reproductions that train a base of their own build it from: tokenizers of characters, tiny Qwen2s."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from reproductions.common import ROOT
from tokenizers import AddedToken
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from posttrain.recipe.schema import ModelConfig
from posttrain.rollout.build import load_tokenizer

PAD, END = "<|pad|>", "<|end|>"


def character_tokenizer(characters: Iterable[str], pieces: Sequence[str] = ()) -> Qwen2Tokenizer:
    """One token for each character, after padding and end; then one for each of the longer `pieces`."""
    spelt = {" ": "Ġ"}  # by byte-level BPE
    entries = [PAD, END, *(spelt.get(character, character) for character in characters)]
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(entries)},
        merges=[],
        unk_token=PAD,
        pad_token=PAD,
        eos_token=END,
        clean_up_tokenization_spaces=False,
    )
    if pieces:
        tokenizer.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in pieces])
    return tokenizer


def blank_model(tokenizer: Any, seed: int = 0, *, num_attention_heads: int, **shape: Any) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights, as many heads for keys as for queries, and tied embeddings unless `shape`,
    which is of `Qwen2Config`, says otherwise. Leaves the global random state where the weights left it.
    """
    torch.manual_seed(seed)
    config = Qwen2Config(
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_attention_heads,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{"tie_word_embeddings": True, **shape},
    )
    return Qwen2ForCausalLM(config)


def save_blank(folder: Path, seed: int = 0) -> Path:
    """The folder of an untrained model of 0.15M parameters with the tiny reasoner's tokenizer, as the string
    machine is learnt by; written if it is not there.
    """
    if (folder / "config.json").is_file():
        return folder
    tokenizer = load_tokenizer(ModelConfig(path=str(ROOT / "data" / "tiny-reasoner")))
    model = blank_model(
        tokenizer,
        seed,
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,  # the default, 0.02, is for widths of a thousand
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
