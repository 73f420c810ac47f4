"""The engine contract on real `vllm serve` processes, and what happens when they die or hang."""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from engine_contract import (
    MAX_MODEL_LEN,
    MIXED,
    EngineContract,
    assert_sampled_from,
    child_processes,
    load,
    perturbed,
    request,
)
from helpers import make_tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

from posttrain.errors import RolloutError
from posttrain.recipe.schema import ServerConfig
from posttrain.rollout.engine import RolloutEngine
from posttrain.rollout.vllm_server import VllmServerEngine

pytestmark = pytest.mark.slow

LONG_ONES = [request(f"{row}+1=", 100, n=8, seed=row) for row in range(16)]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("server") / "tiny")


@pytest.fixture(scope="module")
def shared_engine(model_path: Path) -> Iterator[VllmServerEngine]:
    """Two replicas: starting takes longest, and one is as long as two. The heartbeat suits a busy machine."""
    before = child_processes()
    engine = VllmServerEngine(
        str(model_path),
        AutoTokenizer.from_pretrained(model_path),
        server=ServerConfig(replicas=2, heartbeat=15.0, timeout=120.0),
        max_model_len=MAX_MODEL_LEN,
        kv_cache_gib=0.25,
        memory_fraction=0.1,
        lora_rank=4,
    )
    assert len(child_processes() - before) >= 6  # of each a guard, a server and its engine
    yield engine
    engine.close()
    engine.close()
    assert child_processes() <= before
    with pytest.raises(RolloutError, match="closed"):
        engine.generate(MIXED)
    with pytest.raises(RolloutError, match="closed"):
        engine.sync(load(model_path))


def adapted(path: Path, **options: Any) -> PeftModel:
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options})
    model = get_peft_model(load(path), config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return model


class TestContract(EngineContract):
    @pytest.mark.parametrize("temperature", [0.001, 2.5])
    def test_temperatures_that_vllm_does_not_offer(self, engine: RolloutEngine, temperature: float) -> None:
        with pytest.raises(RolloutError, match="vLLM samples at temperature 0 or"):
            engine.generate([*MIXED, request(temperature=temperature)])


def test_adapters_are_sent_as_adapters_and_dora_is_merged(
    shared_engine: VllmServerEngine, model_path: Path, tmp_path: Path
) -> None:
    shared_engine.sync(load(model_path))
    for scale in (1.0, 2.0):
        model = adapted(model_path, lora_alpha=int(8 * scale))
        shared_engine.sync(model)
        assert "adapter" in shared_engine.served_name
        assert_sampled_from(model, MIXED, shared_engine.generate(MIXED))
    dora = adapted(model_path, use_dora=True)
    shared_engine.sync(dora)
    assert "adapter" not in shared_engine.served_name
    assert_sampled_from(dora, MIXED, shared_engine.generate(MIXED))


def test_replicas_that_die_or_hang_are_replaced_and_nothing_changes(
    shared_engine: VllmServerEngine, model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed = perturbed(model_path)
    shared_engine.sync(changed)
    expected = shared_engine.generate(LONG_ONES)
    assert_sampled_from(changed, LONG_ONES, expected)
    restarts = shared_engine.restarts
    guards = [psutil.Process(pid) for pid in shared_engine.process_ids]
    servers = [guard.children()[0] for guard in guards]

    def strike() -> None:
        servers[0].send_signal(signal.SIGKILL)
        servers[1].send_signal(signal.SIGSTOP)

    timer = threading.Timer(0.3, strike)
    timer.start()
    with caplog.at_level(logging.WARNING):
        answers = shared_engine.generate(LONG_ONES)
    timer.join()
    assert answers == expected
    assert shared_engine.generate(MIXED)
    assert shared_engine.restarts == restarts + 2
    assert not [guard for guard in guards if guard.is_running() and guard.status() != psutil.STATUS_ZOMBIE]
    assert "is started again" in caplog.text


RECIPE = """
name: small
output_dir: {out}
model: {{path: {model}}}
data:
  train: {{task: arithmetic, size: 40, split: train, args: {{max_terms: 3, min_terms: 3}}}}
  eval: {{task: arithmetic, size: 8, split: test, args: {{max_terms: 3, min_terms: 3}}}}
rollout: {{engine: vllm_server, max_tokens: 8, max_model_len: 96, server: {{urls: {urls}}}}}
rewards: [math_answer]
stages:
  - policy: {{steps: 2, prompts_per_step: 3, group_size: 4, optimizer: {{learning_rate: 1e-3}}}}
  - evaluate: {{samples: 2, metrics: [pass@1]}}
"""


def test_a_recipe_trains_on_running_replicas(
    shared_engine: VllmServerEngine, model_path: Path, tmp_path: Path
) -> None:
    from posttrain import load_recipe, run_recipe

    recipe = tmp_path / "small.yaml"
    recipe.write_text(RECIPE.format(out=tmp_path, model=model_path, urls=json.dumps(shared_engine.urls)))
    run_recipe(load_recipe(recipe))
    lines = [json.loads(line) for line in (tmp_path / "small" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "policy"]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line["sampling/logprob_difference"] < 1e-4 for line in steps)
    summary = json.loads((tmp_path / "small" / "summary.json").read_text())
    assert summary["tokens_sampled"] > 0
