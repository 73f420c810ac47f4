"""Tiny models that several test modules build for themselves."""

from __future__ import annotations

import string
from pathlib import Path

CHARACTERS = "\n" + "".join(sorted(string.ascii_letters + string.digits + string.punctuation + " "))
SPECIAL_TOKENS = ("<pad>", "<|im_start|>", "<|im_end|>")
MARKERS = ("<think>", "</think>")  # added tokens that are text: decoding keeps them
VOCAB_SIZE = 256  # ids above the tokenizer's stay unused, as in most real checkpoints

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer():
    """A character-level tokenizer of printable ASCII with a chat template.

    It is a byte-level BPE without merges and of Qwen2's own class, because `AutoTokenizer` loads every
    Qwen2 checkpoint as that class and puts its pre-tokenizer and decoder in place of any other.
    """
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    byte_level = {"\n": "Ċ", " ": "Ġ"}  # how byte-level BPE spells the two invisible ones
    entries = (*SPECIAL_TOKENS, *(byte_level.get(character, character) for character in CHARACTERS))
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(entries)},
        merges=[],
        unk_token="<pad>",
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in MARKERS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_tiny_model(path: Path, seed: int = 0, tie: bool = True, max_model_len: int = 256) -> Path:
    """Save a randomly initialised two-layer Qwen2 (float32, head size 64) and its tokenizer; returns `path`.

    The weights are drawn wide enough that the next-token distribution is far from uniform.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer()
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=max_model_len,
        tie_word_embeddings=tie,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Path(path)
