"""One training step on a group, three ways: ours, TRL's, and padded with full logits.

Each is log-probs, loss (dapo, first update) and backward pass. A step is a function of no arguments that
returns the loss and leaves the gradients in its model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from benchmarks.models import Group, make_tokenizer

from posttrain.recipe.schema import LossConfig, PolicyStage
from posttrain.training.batch import TrainRow
from posttrain.training.forward import choose_packing, policy_logprobs, prepare_model
from posttrain.training.losses import Denominators, policy_loss

Step = Callable[[], torch.Tensor]
CHANNEL = "outcome"
LOSS = LossConfig(kind="dapo")
BUDGET = PolicyStage(steps=1, prompts_per_step=1).micro_batch_tokens


def autocast(device: str) -> AbstractContextManager[Any]:
    """How both sides compute: float32 on a CPU, bfloat16 on a GPU, over float32 weights."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def our_step(model: Any, group: Group) -> Step:
    """As `PolicyTrainer` does it, from the rows of the rollouts on."""
    prompt, device = group.prompt, model.device
    rows = [
        TrainRow(
            token_ids=(*prompt, *completion),
            positions=np.arange(len(prompt), len(prompt) + len(completion)),
            advantages={CHANNEL: np.full(len(completion), advantage)},
        )
        for completion, advantage in zip(group.completions, group.advantages, strict=True)
    ]
    denominators = Denominators(len(rows), sum(map(len, group.completions)), max(map(len, group.completions)))
    prepare_model(model)
    packing = choose_packing(model)

    def step() -> torch.Tensor:
        total = torch.zeros((), device=device)
        for part in packing.split(rows, BUDGET):
            micro = packing.collate(part, device)
            with autocast(device.type):
                logprobs, entropy = policy_logprobs(model, model, micro, temperature=1.0)
                member, advantages = micro.select("advantages", CHANNEL)
                loss, _ = policy_loss(
                    LOSS,
                    logprobs=logprobs[member],
                    advantages=advantages,
                    sequence=micro.row[member],
                    denominators=denominators,
                    entropy=entropy[member],
                )
            loss.backward()
            total += loss.detach()
        return total

    return step


def trl_step(model: Any, group: Group) -> Step:
    """TRL's `GRPOTrainer` from the padded batch on, with the loss it computes in every training step.

    `_compute_loss` is private, but it is the step; `tests/integration/test_trl_parity.py` pins it.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=len(group.completions),
            num_generations=len(group.completions),
            max_completion_length=max(map(len, group.completions)),
            loss_type=LOSS.kind,
            beta=0.0,
            use_cpu=model.device.type == "cpu",
            bf16=model.device.type == "cuda",
            gradient_checkpointing=False,
            report_to=[],
        ),
        train_dataset=Dataset.from_dict({"prompt": ["w3"] * len(group.completions)}),
        processing_class=make_tokenizer(model.config.vocab_size),
    )
    trainer.current_gradient_accumulation_steps = 1  # the Trainer sets it before a step
    inputs = padded(group, model.device)
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()

    def step() -> torch.Tensor:
        with autocast(model.device.type):
            loss = trainer._compute_loss(model, inputs)
        loss.backward()
        return loss.detach()

    return step


def full_logits_step(model: Any, group: Group) -> Step:
    """Padded rows, all logits of the completions at once, log_softmax and gather."""
    inputs = padded(group, model.device)
    input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    mask, targets = inputs["completion_mask"], inputs["completion_ids"]

    def step() -> torch.Tensor:
        with autocast(model.device.type):
            logits = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                use_cache=False,
                logits_to_keep=mask.shape[1] + 1,
            ).logits[:, :-1]
            logprobs = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
            ratio = (logprobs - logprobs.detach()).exp()
            loss = -(ratio * inputs["advantages"][:, None] * mask).sum() / mask.sum()
        loss.backward()
        return loss.detach()

    return step


def padded(group: Group, device: torch.device) -> dict[str, torch.Tensor]:
    """The batch as TRL has it after sampling: prompts, right-padded completions, and their masks."""
    rows, width = len(group.completions), max(map(len, group.completions))
    completion_ids = torch.zeros(rows, width, dtype=torch.long)
    completion_mask = torch.zeros(rows, width, dtype=torch.long)
    for row, completion in enumerate(group.completions):
        completion_ids[row, : len(completion)] = torch.tensor(completion)
        completion_mask[row, : len(completion)] = 1
    prompt_ids = torch.tensor(group.prompt).expand(rows, -1)
    batch = {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": torch.tensor(group.advantages),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}
