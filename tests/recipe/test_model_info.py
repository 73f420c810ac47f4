from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from posttrain.errors import DataError
from posttrain.recipe.model_info import read_model_info

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 77,
}


def test_sizes_from_the_configuration(model_folder: Callable[..., Path]) -> None:
    info = read_model_info(model_folder())
    assert (info.architecture, info.dtype, info.context) == ("Qwen2ForCausalLM", "bfloat16", 1024)
    assert info.linear["k_proj"] == (128, 64)
    # embeddings + 4 blocks of q, o (128²), k, v (128·64), three MLP matrices and two norms + final norm
    block = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 512 + 2 * 128
    assert info.parameters == 256 * 128 + 4 * block + 128


def test_weight_headers_are_believed(model_folder: Callable[..., Path]) -> None:
    info = read_model_info(model_folder({"a": [10, 20], "b": [5]}))
    assert (info.parameters, info.dtype) == (205, "float32")


def test_experts_cannot_be_counted_from_the_configuration(model_folder: Callable[..., Path]) -> None:
    assert read_model_info(model_folder(num_experts=8)).parameters is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("config", "model"),
    [(Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM), (LlamaConfig, LlamaForCausalLM)],
)
def test_real_models(config: type, model: type, tied: bool, tmp_path: Path) -> None:
    network = model(config(**SIZES, tie_word_embeddings=tied))
    network.config.save_pretrained(tmp_path)
    counted = read_model_info(tmp_path).parameters
    network.save_pretrained(tmp_path)
    stored = read_model_info(tmp_path)

    assert stored.parameters == sum(parameter.numel() for parameter in network.parameters())
    # Without weights biases and the norms of queries and keys are left out: far below one percent.
    assert counted == pytest.approx(stored.parameters, rel=0.01)
    modules = dict(network.model.layers[0].named_modules())
    for name, shape in stored.linear.items():
        module = next(module for key, module in modules.items() if key.endswith(name))
        assert shape == (module.in_features, module.out_features)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("config.json", "{", "config.json is not valid JSON"),
        ("config.json", "[]", "config.json is not a JSON object"),
        ("config.json", "{}", "config.json has no hidden_size"),
        ("model.safetensors", "short", "model.safetensors is not a complete safetensors file"),
    ],
)
def test_broken_folders(name: str, content: str, text: str, model_folder: Callable[..., Path]) -> None:
    folder = model_folder()
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=text):
        read_model_info(folder)
