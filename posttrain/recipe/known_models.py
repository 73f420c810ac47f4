"""Shapes of models that recipes often name, for plans on a machine that does not have them.

Values of the published `config.json` files: (hidden, layers, heads, key-value heads, head size, inner,
vocabulary, tied embeddings, context). A test compares the parameters they give with the published counts.
"""

from __future__ import annotations

from typing import Any

_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
    "max_position_embeddings",
)
_SHAPES: dict[str, tuple[int | bool, ...]] = {
    "Qwen/Qwen2.5-0.5B": (896, 24, 14, 2, 64, 4864, 151_936, True, 32_768),
    "Qwen/Qwen2.5-1.5B": (1536, 28, 12, 2, 128, 8960, 151_936, True, 131_072),
    "Qwen/Qwen2.5-1.5B-Instruct": (1536, 28, 12, 2, 128, 8960, 151_936, True, 32_768),
    "Qwen/Qwen2.5-3B": (2048, 36, 16, 2, 128, 11_008, 151_936, True, 32_768),
    "Qwen/Qwen2.5-7B": (3584, 28, 28, 4, 128, 18_944, 152_064, False, 131_072),
    "Qwen/Qwen2.5-7B-Instruct": (3584, 28, 28, 4, 128, 18_944, 152_064, False, 32_768),
    "Qwen/Qwen2.5-14B": (5120, 48, 40, 8, 128, 13_824, 152_064, False, 131_072),
    "Qwen/Qwen2.5-14B-Instruct": (5120, 48, 40, 8, 128, 13_824, 152_064, False, 32_768),
    "Qwen/Qwen2.5-32B": (5120, 64, 40, 8, 128, 27_648, 152_064, False, 131_072),
    "Qwen/Qwen2.5-Math-1.5B": (1536, 28, 12, 2, 128, 8960, 151_936, True, 4096),
    "Qwen/Qwen2.5-Math-7B": (3584, 28, 28, 4, 128, 18_944, 152_064, False, 4096),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (1536, 28, 12, 2, 128, 8960, 151_936, False, 131_072),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": (3584, 28, 28, 4, 128, 18_944, 152_064, False, 131_072),
    "Qwen/Qwen3-0.6B": (1024, 28, 16, 8, 128, 3072, 151_936, True, 40_960),
    "Qwen/Qwen3-1.7B": (2048, 28, 16, 8, 128, 6144, 151_936, True, 40_960),
    "Qwen/Qwen3-4B": (2560, 36, 32, 8, 128, 9728, 151_936, True, 40_960),
    "Qwen/Qwen3-8B": (4096, 36, 32, 8, 128, 12_288, 151_936, False, 40_960),
    "Qwen/Qwen3-14B": (5120, 40, 40, 8, 128, 17_408, 151_936, False, 40_960),
    "Qwen/Qwen3-32B": (5120, 64, 64, 8, 128, 25_600, 151_936, False, 40_960),
    "Qwen/Qwen3-4B-Base": (2560, 36, 32, 8, 128, 9728, 151_936, True, 32_768),
    "Qwen/Qwen3-8B-Base": (4096, 36, 32, 8, 128, 12_288, 151_936, False, 32_768),
    "Qwen/Qwen3-14B-Base": (5120, 40, 40, 8, 128, 17_408, 151_936, False, 32_768),
    "meta-llama/Llama-3.2-1B": (2048, 16, 32, 8, 64, 8192, 128_256, True, 131_072),
    "meta-llama/Llama-3.2-3B": (3072, 28, 24, 8, 128, 8192, 128_256, True, 131_072),
    "meta-llama/Llama-3.1-8B": (4096, 32, 32, 8, 128, 14_336, 128_256, False, 131_072),
    "meta-llama/Llama-3.1-70B": (8192, 80, 64, 8, 128, 28_672, 128_256, False, 131_072),
    "meta-llama/Llama-3.3-70B": (8192, 80, 64, 8, 128, 28_672, 128_256, False, 131_072),
}


def known_config(name: str) -> dict[str, Any] | None:
    """What the configuration of a model on the hub says about its shape; None for one that is not listed.

    An instruction-tuned model has the shape of its base.
    """
    shape = _SHAPES.get(name) or _SHAPES.get(name.removesuffix("-Instruct"))
    if shape is None:
        return None
    family = "LlamaForCausalLM" if "Llama" in name else "Qwen3ForCausalLM" if "Qwen3" in name else None
    architecture = family or "Qwen2ForCausalLM"
    return {"architectures": [architecture], "dtype": "bfloat16", **dict(zip(_FIELDS, shape, strict=True))}
