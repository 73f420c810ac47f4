"""Tiny reward models with random weights and the tokenizer of `helpers`: a character is a token."""

from __future__ import annotations

from pathlib import Path

from helpers import VOCAB_SIZE, make_tokenizer


def make_reward_model(
    path: Path,
    head: str = "SequenceClassification",
    *,
    labels: int = 1,
    pad: bool = True,
    chat: bool = True,
    seed: int = 0,
    family: str = "Qwen2",
) -> Path:
    """Save a two-layer model with a head (`CausalLM` is none of a reward model); returns `path`."""
    import torch
    import transformers

    tokenizer = make_tokenizer()
    if not chat:
        tokenizer.chat_template = None
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if pad else None,
        num_labels=labels,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family}For{head}")(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Path(path)
