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
    LONG,
    MAX_MODEL_LEN,
    MIXED,
    EngineContract,
    EngineLifecycleContract,
    adapted_policy,
    assert_sampled_from,
    fingerprint,
    load,
    perturbed,
    request,
    tokens_of,
)
from helpers import make_tiny_model
from transformers import AutoTokenizer

import posttrain.rollout.vllm as vllm_engine
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


def broken_step() -> None:
    raise RuntimeError("the kernel is gone")


def break_core(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the core of vLLM that runs now, and no later one, fail in the middle of its work."""
    core = engine._llm.llm_engine.engine_core.engine_core
    step, calls = core.step_fn, iter(range(3))
    monkeypatch.setattr(core, "step_fn", lambda: step() if next(calls, None) is not None else broken_step())


def test_a_second_failure_ends_it(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.core import EngineCore

    engine = build(model_path)
    monkeypatch.setattr(EngineCore, "step", lambda _: broken_step())
    break_core(engine, monkeypatch)
    with pytest.raises(RolloutError, match="failed again after a restart: the kernel is gone"):
        engine.generate(MIXED)
    with pytest.raises(RolloutError, match="closed"):
        engine.generate(MIXED)


class TestLoraAndFaults:
    """An engine that takes adapters, and in the end breaks. The order of the tests saves starts of vLLM."""

    @pytest.fixture(scope="class")
    def engine(self, model_path: Path) -> Iterator[VllmEngine]:
        engine = build(model_path, lora_rank=4)
        yield engine
        engine.close()

    def test_adapters_travel_alone(
        self, engine: VllmEngine, model_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        policy = load(model_path)
        assert_sampled_from(policy, MIXED, engine.generate(MIXED))
        adapted = adapted_policy(policy)
        monkeypatch.delattr(vllm_engine, "named_weights")  # no other weight can be sent
        folders = []
        for scale in (1.0, 0.5):
            with torch.no_grad():
                for name, weight in adapted.named_parameters():
                    if "lora_B" in name:
                        weight *= scale
            before = fingerprint(adapted)
            engine.sync(adapted)
            assert fingerprint(adapted) == before
            assert_sampled_from(adapted, [*MIXED, *LONG], engine.generate([*MIXED, *LONG]))
            assert engine._adapter is not None
            folders.append(Path(engine._adapter.folder.name))
        assert [folder.exists() for folder in folders] == [False, True]
        with pytest.raises(AssertionError), adapted.disable_adapter():
            assert_sampled_from(adapted, MIXED, engine.generate(MIXED), tolerance=0.05)

    def test_vllm_serves_a_saved_adapter_folder(
        self, engine: VllmEngine, model_path: Path, tmp_path: Path
    ) -> None:
        """Without posttrain: the folder is what checkpoints and `models/` hold of a LoRA policy."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        adapted = adapted_policy(load(model_path))
        adapted.save_pretrained(tmp_path / "adapter")
        (output,) = engine._llm.generate(
            [{"prompt_token_ids": [5, 6, 7, 8]}],
            SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=0),
            use_tqdm=False,
            lora_request=LoRARequest("saved", 1000, str(tmp_path / "adapter")),
        )
        (answer,) = output.outputs
        ids = torch.tensor([[5, 6, 7, 8, *answer.token_ids]])
        with torch.no_grad():
            logprobs = adapted(ids).logits[0, 3:-1].log_softmax(-1)
        assert logprobs.argmax(-1).tolist() == list(answer.token_ids)
        served = [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        assert served == pytest.approx(logprobs.max(-1).values.tolist(), abs=1e-4)

    def test_policies_that_must_be_merged_come_in_between(self, engine: VllmEngine, model_path: Path) -> None:
        changed = perturbed(model_path)
        engine.sync(changed)
        assert_sampled_from(changed, MIXED, engine.generate(MIXED))
        adapted = adapted_policy(load(model_path))
        engine.sync(adapted)
        assert_sampled_from(adapted, MIXED, engine.generate(MIXED))
        large = adapted_policy(load(model_path), r=16)
        engine.sync(large)
        assert_sampled_from(large, MIXED, engine.generate(MIXED))

    def test_one_failure_changes_nothing(
        self,
        engine: VllmEngine,
        model_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        adapted = adapted_policy(load(model_path))
        engine.sync(adapted)
        version, expected = engine.version, engine.generate(MIXED)
        break_core(engine, monkeypatch)
        answers = engine.generate(MIXED)
        assert tokens_of(answers) == tokens_of(expected)
        assert_sampled_from(adapted, MIXED, answers)
        assert "started again: the kernel is gone" in caplog.text
        assert engine.version == version
        assert tokens_of(engine.generate(MIXED)) == tokens_of(expected)

    def test_other_weights_after_a_restart_are_noticed(
        self, engine: VllmEngine, model_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        policy = perturbed(model_path)
        engine.sync(policy)
        with torch.no_grad():
            policy.model.norm.weight *= 1.001
        break_core(engine, monkeypatch)
        with pytest.raises(RolloutError, match="other weights after a restart"):
            engine.generate(MIXED)


class TestContract(EngineContract):
    """After all tests that build engines of their own: the shared one stays open to the end."""

    @pytest.mark.parametrize("temperature", [0.001, 2.5])
    def test_temperatures_that_vllm_does_not_offer(self, engine: RolloutEngine, temperature: float) -> None:
        with pytest.raises(RolloutError, match="vLLM samples at temperature 0 or"):
            engine.generate([*MIXED, request(temperature=temperature)])
        assert engine.generate(MIXED)
