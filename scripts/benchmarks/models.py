"""Randomly initialised models, a tokenizer for them, and groups of ragged completions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class ModelShape:
    """A Qwen2 model with tied embeddings."""

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    intermediate: int = 1024
    vocab: int = 8192
    context: int = 1024

    def build(self, seed: int, device: str = "cpu") -> Any:
        """The model in float32, in training mode. The same seed gives the same weights."""
        from transformers import Qwen2Config, Qwen2ForCausalLM

        config = Qwen2Config(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
            dtype="float32",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Qwen2ForCausalLM(config)
        return model.to(device).train()

    def describe(self) -> dict[str, Any]:
        return {"family": "Qwen2", **asdict(self)}


QWEN_HALF_BILLION = ModelShape(896, 24, 14, 2, 4864, 151_936, 4096)
"""Qwen2.5-0.5B."""


def make_tokenizer(vocab: int) -> Any:
    """One word per token id, and no end-of-sequence token: completions are as long as they are told to be."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", unk_token="w0")


def save(shape: ModelShape, seed: int, folder: Path) -> Path:
    """A model and its tokenizer as a checkpoint."""
    shape.build(seed).save_pretrained(folder)
    make_tokenizer(shape.vocab).save_pretrained(folder)
    return folder


def random_tokens(rng: np.random.Generator, count: int, vocab: int) -> list[int]:
    return rng.integers(3, vocab, count).tolist()


@dataclass(frozen=True)
class Group:
    """A prompt, its completions, and their advantages."""

    prompt: list[int]
    completions: list[list[int]]
    advantages: list[float]

    @classmethod
    def random(cls, seed: int, prompt: int, lengths: tuple[int, ...], vocab: int) -> Group:
        """`prompt` and `lengths` are numbers of tokens. The advantages do not cancel."""
        rng = np.random.default_rng(seed)
        return cls(
            random_tokens(rng, prompt, vocab),
            [random_tokens(rng, length, vocab) for length in lengths],
            rng.normal(0.5, 1.0, len(lengths)).tolist(),
        )

    def describe(self) -> dict[str, Any]:
        return {
            "group": len(self.completions),
            "prompt": len(self.prompt),
            "completions": [len(completion) for completion in self.completions],
        }
