"""A training process that shares replicas with another: `replica_rank.py MODEL`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import psutil
import torch.distributed as dist
from fake_replica import tokens_for
from transformers import AutoModelForCausalLM, AutoTokenizer

import posttrain.rollout.vllm_server as vllm_server
from posttrain.recipe.schema import ServerConfig
from posttrain.rollout.types import Example, RolloutRequest, Sampling, derive_seed
from posttrain.rollout.weight_files import checksum

FAKE = [sys.executable, str(Path(__file__).parent / "fake_replica.py"), "--slow", "0.05"]


def main(path: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    vllm_server.serve_command = lambda path, options, transfer: lambda port: [*FAKE, "--port", str(port)]
    engine = vllm_server.VllmServerEngine(
        path, AutoTokenizer.from_pretrained(path), server=ServerConfig(replicas=2, heartbeat=3.0)
    )
    policy = AutoModelForCausalLM.from_pretrained(path)

    def ask(n: int) -> list[tuple[int, ...]]:
        sampling = Sampling(max_tokens=4, n=n, seed=rank)
        (completions,) = engine.generate([RolloutRequest((1, 2), Example("a", "b"), "g", sampling)])
        return [completion.token_ids for completion in completions]

    def expected(weights: str, n: int) -> list[tuple[int, ...]]:
        body = {"model": "policy", "prompt": [1, 2], "max_tokens": 4}
        return [tuple(tokens_for(weights, {**body, "seed": derive_seed(rank, i)})) for i in range(n)]

    assert ask(3) == expected("initial", 3)
    engine.sync(policy)
    folders = list(engine.scratch.glob("weights-*"))
    assert len(folders) == (rank == 0)  # written once
    weights = [checksum(folder) for folder in folders] or [""]
    dist.broadcast_object_list(weights, 0)
    assert ask(3) == expected(weights[0], 3)
    if rank == 0:
        psutil.Process(engine.process_ids[0]).children()[0].kill()
    assert ask(200) == expected(weights[0], 200)
    dist.barrier()
    engine.sync(policy)
    assert ask(40) == expected(weights[0], 40)
    assert engine.restarts == len(engine.process_ids) // 2 == (rank == 0)
    assert len(set(engine.urls)) == 2
    dist.barrier()
    engine.close()


if __name__ == "__main__":
    main(sys.argv[1])
