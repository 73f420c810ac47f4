from pathlib import Path

import pytest
import torch
from engine_contract import load
from helpers import make_tiny_model
from transformers import AttentionInterface

from posttrain.rollout.attention import decode_attention, grouped_attention


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("attention") / "tiny")


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_grouped_attention_is_that_of_transformers(tokens: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(3, heads, length, 8, generator=generator)
        for heads, length in ((6, tokens), (2, 11), (2, 11))
    )
    mask = (torch.arange(11) >= torch.tensor([0, 4, 10])[:, None])[:, None, None] if masked else None
    module = torch.nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment]
    expected, _ = AttentionInterface()["sdpa"](module, query, key, value, mask, scaling=0.3)
    found, weights = grouped_attention("sdpa", module, query, key, value, mask, scaling=0.3)
    assert weights is None
    torch.testing.assert_close(found, expected)


def test_a_model_gets_its_own_attention_back(model_path: Path) -> None:
    model = load(model_path)
    assert model.config._attn_implementation == "sdpa"  # the attribute that the module must read
    with decode_attention(model):
        assert model.config._attn_implementation == "sdpa_decode"
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with decode_attention(model):
        assert model.config._attn_implementation == "eager"
