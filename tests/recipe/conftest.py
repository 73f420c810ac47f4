from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 512,
    "max_position_embeddings": 1024,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "vocab_size": 256,
}


@pytest.fixture
def model_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model folder without weights, or with the header of a weight file."""

    def write(shapes: dict[str, list[int]] | None = None, name: str = "model", **config: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(QWEN2 | config))
        (folder / "tokenizer.json").write_text("{}")
        if shapes is not None:
            entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            entries |= {key: {"dtype": "F32", "shape": shape} for key, shape in shapes.items()}
            header = json.dumps(entries).encode()
            (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        return folder

    return write
