"""The engine contract on the real vLLM, in this process."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from engine_contract import (
    MAX_MODEL_LEN,
    MIXED,
    EngineContract,
    EngineLifecycleContract,
    assert_sampled_from,
    load,
    request,
    tokens_of,
)
from helpers import make_tiny_model
from transformers import AutoTokenizer

from posttrain.errors import RolloutError
from posttrain.recipe.schema import ModelConfig, RolloutConfig
from posttrain.rollout.build import build_engine, load_tokenizer
from posttrain.rollout.engine import RolloutEngine
from posttrain.rollout.vllm import VllmEngine

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("vllm") / "tiny")


def build(path: Path, **options: Any) -> VllmEngine:
    options = {"max_model_len": MAX_MODEL_LEN, "kv_cache_gib": 0.25, "memory_fraction": 0.1, **options}
    return VllmEngine(str(path), AutoTokenizer.from_pretrained(path), **options)


@pytest.fixture(scope="module")
def shared_engine(model_path: Path) -> Iterator[RolloutEngine]:
    engine = build(model_path)
    yield engine
    engine.close()


class TestLifecycle(EngineLifecycleContract):
    """Before the shared engine is built: vLLM cannot be open twice in a process."""

    build = staticmethod(build)

    def test_start_and_close_leave_the_process_as_it_was(self, model_path: Path) -> None:
        threads = torch.set_num_threads
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        engine = build(model_path)
        engine.generate(MIXED)
        resident = psutil.Process().memory_info().rss
        engine.close()
        assert torch.set_num_threads is threads
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert np.random.get_state()[1].tolist() == states[2]
        assert not dist.is_initialized()
        if not torch.cuda.is_available():
            assert psutil.Process().memory_info().rss < resident - 0.2 * 2**30  # most of the cache's 0.25 GiB

    def test_a_cache_too_small_for_the_batch_changes_nothing(self, model_path: Path) -> None:
        """vLLM then drops running sequences and starts them again where they were."""
        requests = [request(f"{row}+1=", 60, n=8, seed=row) for row in range(12)]
        answers = []
        for kv_cache_gib in (0.25, 0.003):
            engine = build(model_path, kv_cache_gib=kv_cache_gib)
            answers.append(tokens_of(engine.generate(requests)))
            engine.close()
        assert answers[0] == answers[1]

    def test_a_refused_start_leaves_nothing_behind(self, model_path: Path) -> None:
        with pytest.raises(RolloutError, match="vLLM cannot serve"):
            build(model_path, max_model_len=10**6)
        assert not dist.is_initialized()
        engine = build(model_path)
        with pytest.raises(RolloutError, match="is open in this process"):
            build(model_path)
        assert engine.generate(MIXED)
        engine.close()


def test_build_engine_serves_the_checkpoint_in_its_own_type(model_path: Path) -> None:
    config = ModelConfig(path=str(model_path))
    rollout = RolloutConfig(
        engine="vllm", max_model_len=MAX_MODEL_LEN, kv_cache_gib=0.25, memory_fraction=0.1
    )
    engine = build_engine(rollout, config, load_tokenizer(config))
    assert engine.max_model_len == MAX_MODEL_LEN
    assert_sampled_from(load(model_path), MIXED, engine.generate(MIXED))
    engine.close()


class TestContract(EngineContract):
    @pytest.mark.parametrize("temperature", [0.001, 2.5])
    def test_temperatures_that_vllm_does_not_offer(self, engine: RolloutEngine, temperature: float) -> None:
        with pytest.raises(RolloutError, match="vLLM samples at temperature 0 or"):
            engine.generate([*MIXED, request(temperature=temperature)])
        assert engine.generate(MIXED)
