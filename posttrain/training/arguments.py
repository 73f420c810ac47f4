"""From a recipe's optimiser section to `transformers.TrainingArguments`."""

from __future__ import annotations

import os
from typing import Any

import torch

from posttrain.errors import RecipeError
from posttrain.recipe.schema import OptimizerConfig


def world_size() -> int:
    """Number of training processes, as the launcher set it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def batch_arguments(batch_size: int, micro_batch_size: int | None, stage: str) -> dict[str, int]:
    """Keyword arguments for a batch of `batch_size` rows over all devices, in micro-batches on each.

    Raises:
        RecipeError: it does not divide; the message names the kind of stage.
    """
    share, rest = divmod(batch_size, world_size())
    micro = micro_batch_size or share
    if rest or share % (micro or 1):
        raise RecipeError(
            f"{stage}.batch_size {batch_size} does not divide into {world_size()} devices "
            f"with micro-batches of {micro}"
        )
    return {
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": share // micro,
    }


def optimizer_arguments(optimizer: OptimizerConfig, *, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments shared by every stage that trains: optimiser, precision, device.

    `dtype` is what the model computes in; bfloat16 is done by autocast, over weights in float32.
    """
    on_cpu = not torch.cuda.is_available()
    # The library's own "constant" takes no notice of a warm-up.
    warm_constant = optimizer.schedule == "constant" and optimizer.warmup_steps > 0
    return {
        "optim": optimizer.name,
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if warm_constant else optimizer.schedule,
        "warmup_steps": optimizer.warmup_steps,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "max_grad_norm": optimizer.max_grad_norm,
        "bf16": dtype == torch.bfloat16,
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        # The Trainer would replace a NaN in the log by the mean of the steps before it.
        "logging_nan_inf_filter": False,
    }
