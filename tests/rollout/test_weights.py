from pathlib import Path

import pytest
import torch
from engine_contract import fingerprint, load
from helpers import make_tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from posttrain.rollout.weights import named_weights


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("weights") / "tiny")


def adapted(base: PreTrainedModel, **options: object) -> PeftModel:
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def test_plain_model_gives_its_own_tensors_and_the_tied_head(model_path: Path) -> None:
    model = load(model_path)
    weights = dict(named_weights(model))
    assert weights.keys() == model.state_dict().keys()
    assert weights["lm_head.weight"].data_ptr() == weights["model.embed_tokens.weight"].data_ptr()


@pytest.mark.parametrize("dora", [False, True])
def test_merged_adapters_have_the_names_and_the_function_of_a_plain_model(
    model_path: Path, dora: bool
) -> None:
    model = adapted(load(model_path), use_dora=dora)
    before = fingerprint(model)
    merged = load(model_path)
    assert dict(named_weights(model)).keys() == merged.state_dict().keys()
    merged.load_state_dict(dict(named_weights(model)))
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=1e-4, rtol=0)
        assert (merged(ids).logits - load(model_path)(ids).logits).abs().max() > 0.1
    assert fingerprint(model) == before


def test_adapters_can_be_left_out(model_path: Path) -> None:
    base = load(model_path).state_dict()
    weights = dict(named_weights(adapted(load(model_path)), merge=False))
    assert weights.keys() == base.keys()
    assert all(torch.equal(weights[name], base[name]) for name in base)


def test_sixteen_bit_base_is_merged_in_float32_and_rounded_once(model_path: Path) -> None:
    model = adapted(load(model_path).to(torch.bfloat16))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    update = 2.0 * layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
    expected = (layer.base_layer.weight.float() + update).to(torch.bfloat16)
    for _ in range(3):
        merged = dict(named_weights(model))["model.layers.0.self_attn.q_proj.weight"]
        assert merged.dtype is torch.bfloat16
        assert torch.equal(merged, expected)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_only_active_adapters_count(model_path: Path) -> None:
    model = adapted(load(model_path))
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    first = dict(named_weights(model))
    model.set_adapter("other")  # freshly initialised: changes nothing
    plain = load(model_path).state_dict()
    assert all(torch.equal(weight, plain[name]) for name, weight in named_weights(model))
    assert first.keys() == plain.keys()
    assert not torch.equal(
        first["model.layers.0.mlp.up_proj.weight"], plain["model.layers.0.mlp.up_proj.weight"]
    )


def test_weights_that_are_already_merged_are_not_merged_twice(model_path: Path) -> None:
    model = adapted(load(model_path))
    expected = dict(named_weights(model))
    model.merge_adapter()
    for name, weight in named_weights(model):
        torch.testing.assert_close(weight, expected[name])


def test_modules_trained_in_full_replace_their_originals(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "untied", tie=False)
    model = adapted(load(path), modules_to_save=["lm_head"])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "modules_to_save" in name:
                weight += 1.0
    weights = dict(named_weights(model))
    assert weights.keys() == load(path).state_dict().keys()
    torch.testing.assert_close(weights["lm_head.weight"], load(path).lm_head.weight + 1.0)
