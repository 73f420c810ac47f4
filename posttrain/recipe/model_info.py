"""Sizes of a model: of a folder, from its config.json and the headers of its safetensors files; of a name on
the hub, from the hub's cache on this machine, or from what is known of it. Nothing is downloaded.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import DataError
from posttrain.recipe.known_models import known_config

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_HEADER_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_MAX_HEADER = 1 << 27
IN_FOLDER = "in this folder"


@dataclass(frozen=True)
class ModelInfo:
    """Shape of a decoder in the style of Llama, Qwen2 and Qwen3.

    `parameters` counts tied embeddings once; None where neither weights nor configuration tell. `linear`
    has the (inputs, outputs) of every linear layer of one block, by the name that adapters target; `tied` is
    whether embedding and output head are the same.
    """

    architecture: str
    parameters: int | None
    dtype: str
    layers: int
    hidden: int
    vocabulary: int
    key_value_width: int
    context: int | None
    linear: dict[str, tuple[int, int]]
    tied: bool = False

    @property
    def block(self) -> int:
        """Parameters of the linear layers of one block."""
        return sum(inputs * outputs for inputs, outputs in self.linear.values())


def find_model_info(name: str, revision: str | None = None) -> tuple[ModelInfo, str] | None:
    """Sizes of the model that a recipe names, and how they are known; None if they are not.

    Raises:
        DataError: as `read_model_info`.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return read_model_info(folder), IN_FOLDER
    cached = _cached(name, revision or "main")
    if cached is not None:
        return read_model_info(cached), "in the hub's cache"
    config = known_config(name)
    if config is None:
        return None
    return _from_config(config, name, None, None), "its shape is known, it is not on this machine"


def _cached(name: str, revision: str) -> Path | None:
    """The snapshot of a model in the hub's cache, if its configuration is there."""
    home = Path(os.environ.get("HF_HOME") or Path("~/.cache/huggingface").expanduser())
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{name.replace('/', '--')}"
    try:
        commit = (cache / "refs" / revision).read_text().strip()
    except OSError:
        commit = revision
    folder = cache / "snapshots" / commit
    return folder if (folder / "config.json").is_file() else None


def read_model_info(folder: Path) -> ModelInfo:
    """Sizes of the model in a folder.

    Raises:
        DataError: config.json or a weight file cannot be read, or the configuration lacks the sizes.
    """
    stored, dtype = _read_weights(folder)
    return _from_config(_read_config(folder / "config.json"), str(folder), stored, dtype)


def _from_config(config: dict[str, Any], name: str, stored: int | None, dtype: str | None) -> ModelInfo:
    text = config.get("text_config", config)
    try:
        hidden, layers, heads = text["hidden_size"], text["num_hidden_layers"], text["num_attention_heads"]
        vocabulary, inner = text["vocab_size"], text["intermediate_size"]
    except KeyError as error:
        raise DataError(f"{name}/config.json has no {error.args[0]}") from None
    head = text.get("head_dim") or hidden // heads
    queries, keys = heads * head, (text.get("num_key_value_heads") or heads) * head
    linear = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
    tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    counted = None
    if not any("expert" in key for key in text):
        block = sum(inputs * outputs for inputs, outputs in linear.values()) + 2 * hidden
        counted = layers * block + hidden + vocabulary * hidden * (1 if tied else 2)
    return ModelInfo(
        architecture=str((config.get("architectures") or ["unknown"])[0]),
        parameters=stored or counted,
        dtype=dtype or str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        layers=layers,
        hidden=hidden,
        vocabulary=vocabulary,
        key_value_width=keys,
        context=text.get("max_position_embeddings"),
        linear=linear,
        tied=tied,
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError):
        raise DataError(f"{path} is not valid JSON") from None
    if not isinstance(config, dict):
        raise DataError(f"{path} is not a JSON object")
    return config


def _read_weights(folder: Path) -> tuple[int | None, str | None]:
    """Number of parameters and their most frequent type, from the headers alone; None without safetensors."""
    sizes: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in _read_header(path).items():
            if name != "__metadata__":
                sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + math.prod(entry["shape"])
    if not sizes:
        return None, None
    return sum(sizes.values()), _HEADER_DTYPES.get(max(sizes, key=lambda dtype: sizes[dtype]))


def _read_header(path: Path) -> dict[str, Any]:
    """A safetensors file begins with the header's length (8 bytes, little-endian) and the header as JSON."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, _MAX_HEADER)))
    except (OSError, ValueError, struct.error):
        raise DataError(f"{path} is not a complete safetensors file") from None
    return dict(header)
