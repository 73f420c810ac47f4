"""From a recipe's optimiser section to `transformers.TrainingArguments`."""

from __future__ import annotations

import os
from typing import Any

import torch

from posttrain.recipe.schema import OptimizerConfig


def world_size() -> int:
    """Number of training processes, as the launcher set it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def optimizer_arguments(optimizer: OptimizerConfig, *, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments shared by every stage that trains: optimiser, precision, device.

    `dtype` is what the model computes in; bfloat16 is done by autocast, over weights in float32.
    """
    on_cpu = not torch.cuda.is_available()
    return {
        "optim": optimizer.name,
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": optimizer.schedule,
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
