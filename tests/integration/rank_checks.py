"""Checks that run inside the ranks of distributed tests, by name; a failed assertion fails the rank."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict

from posttrain.recipe.schema import ModelConfig
from posttrain.rollout.build import load_model
from posttrain.rollout.weights import named_weights, saved_weights
from posttrain.training.distributed import check_backend, splits_weights, start_processes


def weights_are_put_together(model_path: str) -> None:
    """A split model gives the names and values of a whole one, with and without adapters, tied and not."""
    rank, world = start_processes()
    assert world == 2
    assert splits_weights()
    for path in sorted(Path(model_path).iterdir()):
        for adapted in (False, True):
            model, expected = make(path, adapted), make(path, adapted)
            _compare(model, expected, rank)


def make(path: Path, adapted: bool) -> torch.nn.Module:
    """A model, the same at every call; with adapters that change it."""
    model = load_model(ModelConfig(path=str(path)))
    if not adapted:
        return model
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


def _compare(model: torch.nn.Module, expected: torch.nn.Module, rank: int) -> None:
    accelerator = Accelerator()  # on the CPU: the processes have been joined so
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    model, _ = accelerator.prepare(model, torch.optim.SGD(trained, lr=0.1))
    check_backend(accelerator)
    policy = accelerator.unwrap_model(model)
    local = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in policy.parameters())
    assert local < sum(weight.numel() for weight in expected.parameters()), "nothing is split"

    wholes = dict(named_weights(expected))
    names = []
    for name, weight in named_weights(policy):
        names.append(name)
        torch.testing.assert_close(weight, wholes[name], rtol=0, atol=1e-6, msg=name)
    assert names == list(wholes)

    saved = saved_weights(policy, keep=rank == 0)
    if rank != 0:
        assert saved == {}
    elif hasattr(expected, "peft_config"):
        adapter = get_peft_model_state_dict(expected)
        kept = get_peft_model_state_dict(policy, state_dict=saved)
        assert kept.keys() == adapter.keys()
        assert all(torch.equal(kept[name], weight) for name, weight in adapter.items())
    else:
        assert saved.keys() == expected.state_dict().keys()
        assert all(torch.equal(saved[name], weight) for name, weight in expected.state_dict().items())
        tied = expected.config.tie_word_embeddings
        assert (saved["lm_head.weight"] is saved["model.embed_tokens.weight"]) == tied
    accelerator.free_memory()
