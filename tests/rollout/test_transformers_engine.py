from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_contract import (
    MAX_MODEL_LEN,
    MIXED,
    EngineContract,
    EngineLifecycleContract,
    assert_sampled_from,
    load,
    perturbed,
    prefix_request,
    request,
    sampled_rollout,
    tokens_of,
)
from helpers import make_tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
)

from posttrain.errors import RolloutError
from posttrain.rollout.engine import RolloutEngine
from posttrain.rollout.transformers import TransformersEngine
from posttrain.rollout.types import Sampling
from posttrain.zip_rc.grid import VALUES, Grid


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("transformers") / "tiny")


def build(path: Path, **options: Any) -> TransformersEngine:
    tokenizer = AutoTokenizer.from_pretrained(path)
    return TransformersEngine(load(path), tokenizer, **{"max_model_len": MAX_MODEL_LEN, **options})


@pytest.fixture(scope="module")
def shared_engine(model_path: Path) -> RolloutEngine:
    return build(model_path)


class TestLifecycle(EngineLifecycleContract):
    build = staticmethod(build)


class TestContract(EngineContract):
    pass


def test_batch_size_does_not_change_completions(model_path: Path) -> None:
    whole = build(model_path).generate(MIXED)
    for batch_size in (1, 3):
        assert tokens_of(build(model_path, batch_size=batch_size).generate(MIXED)) == tokens_of(whole)


def test_context_defaults_to_the_models_own(model_path: Path) -> None:
    assert build(model_path, max_model_len=None).max_model_len == 256


def test_ids_that_the_configuration_reserves_are_never_sampled(model_path: Path) -> None:
    """With the same draws the others are sampled as if the reserved ones were not there."""
    policy, asked = load(model_path), request("1+2=", 40, n=4, seed=5)
    engine = TransformersEngine(policy, AutoTokenizer.from_pretrained(model_path))
    reserved = Grid(150, VALUES, (0, 4, 8, 16))
    (explicit,) = engine.generate([replace(asked, sampling=replace(asked.sampling, banned_ids=reserved.ids))])
    assert any(set(completion.token_ids) & set(reserved.ids) for completion in engine.generate([asked])[0])
    policy.config.zip_rc = reserved.to_config()
    assert engine.generate([asked]) == [explicit]


def test_samples_from_the_live_module(model_path: Path) -> None:
    """In training the optimiser changes the weights in place; nothing is copied."""
    policy = load(model_path)
    engine = TransformersEngine(
        policy, AutoTokenizer.from_pretrained(model_path), max_model_len=MAX_MODEL_LEN
    )
    with torch.no_grad():
        policy.model.norm.weight *= 1.5
    engine.sync(policy)
    assert_sampled_from(policy, MIXED, engine.generate(MIXED))


def test_training_mode_dropout_and_checkpointing_do_not_matter(model_path: Path) -> None:
    policy = load(model_path)
    engine = TransformersEngine(
        policy, AutoTokenizer.from_pretrained(model_path), max_model_len=MAX_MODEL_LEN
    )
    expected = engine.generate(MIXED)
    policy.config.attention_dropout = 0.5
    for layer in policy.model.layers:
        layer.self_attn.attention_dropout = 0.5
    policy.gradient_checkpointing_enable()
    policy.train()
    policy.model.norm.eval()
    assert engine.generate(MIXED) == expected
    assert policy.training
    assert policy.model.layers[0].self_attn.training
    assert not policy.model.norm.training
    # The module can still be trained after it was sampled from.
    policy(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert policy.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_bfloat16(model_path: Path) -> None:
    policy = load(model_path).to(torch.bfloat16)
    engine = TransformersEngine(
        policy, AutoTokenizer.from_pretrained(model_path), max_model_len=MAX_MODEL_LEN
    )
    assert_sampled_from(policy, MIXED, engine.generate(MIXED), tolerance=0.1)


def test_own_weights_change_at_a_sync_alone(model_path: Path) -> None:
    policy = load(model_path)
    engine = build(model_path, own_weights=True)
    before = engine.generate(MIXED)
    with torch.no_grad():
        policy.model.norm.weight *= 1.5
    assert engine.generate(MIXED) == before
    engine.sync(policy)
    assert_sampled_from(policy, MIXED, engine.generate(MIXED))
    with torch.no_grad():
        policy.model.norm.weight *= 1.5
    with pytest.raises(AssertionError):
        assert_sampled_from(policy, MIXED, engine.generate(MIXED), tolerance=0.05)
    tied = perturbed(model_path, only="embed_tokens")
    engine.sync(tied)
    assert_sampled_from(tied, MIXED, engine.generate(MIXED))


def test_own_weights_refuse_another_model(model_path: Path) -> None:
    policy = load(model_path)
    policy.model.layers.append(policy.model.layers[0])
    with pytest.raises(RolloutError, match=r"'model\.layers\.2\..* does not fit"):
        build(model_path, own_weights=True).sync(policy)
    del policy.model.layers[1:]
    with pytest.raises(RolloutError, match=r"has no weight 'model\.layers\.1\."):
        build(model_path, own_weights=True).sync(policy)


def test_finished_rows_leave_the_batch(model_path: Path) -> None:
    policy = load(model_path)
    rows = []
    policy.register_forward_pre_hook(
        lambda _, __, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    engine = TransformersEngine(
        policy, AutoTokenizer.from_pretrained(model_path), max_model_len=MAX_MODEL_LEN
    )
    engine.generate([request("1+2=", cap, n=2, temperature=0) for cap in (2, 4, 6)])
    # One prefill of the one distinct prompt, then a row for every completion that goes on.
    assert rows == [1, 6, 4, 4, 2, 2]


def test_a_fork_runs_its_trace_once(model_path: Path) -> None:
    policy = load(model_path)
    shapes = []
    policy.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    engine = TransformersEngine(
        policy, AutoTokenizer.from_pretrained(model_path), max_model_len=MAX_MODEL_LEN
    )
    rollout = sampled_rollout(engine, request("1+2=", 30, seed=1))
    shapes.clear()
    engine.fork(rollout, [0, 9, 20, 30], 2, Sampling(3, temperature=0))
    # The prompt and all 30 tokens, the last token before each cut, then a row for every continuation.
    assert shapes == [(1, 34), (4, 1), (8, 1), (8, 1)]


SHAPE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SHAPE),
        Qwen3Config(**SHAPE),
        MistralConfig(**SHAPE, sliding_window=12),
        Gemma3TextConfig(**SHAPE, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
        GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=2, n_positions=128, initializer_range=0.1),
    ],
    ids=lambda config: config.model_type,
)
def test_architectures(config: PretrainedConfig, attention: str, model_path: Path) -> None:
    """Cache layers of every kind, prompts of different lengths, rows that leave at different times."""
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    engine = TransformersEngine(
        policy, AutoTokenizer.from_pretrained(model_path), max_model_len=MAX_MODEL_LEN
    )
    requests = [*MIXED, request("1+2+3+4+5+6+7+8+9=", 100, n=3, seed=7)]  # longer than any cache's first room
    assert_sampled_from(policy, requests, engine.generate(requests))
    rollout = sampled_rollout(engine, request("1+2=", 40, seed=1))
    asked = [prefix_request(rollout, cut, Sampling(9, n=2)) for cut in (0, 5, 30, 40)]
    assert_sampled_from(policy, asked, engine.fork(rollout, [0, 5, 30, 40], 2, Sampling(9)))
