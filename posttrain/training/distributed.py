"""The processes of a run: how many there really are, and what splits the weights over them.

Accelerate starts the processes and wraps the model. Three of its configurations do silently something else
than what was asked for; here they become errors.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, disable_fsdp_ram_efficient_loading
from transformers.utils import strtobool

from posttrain.errors import TrainingError

TIMEOUT = timedelta(hours=2)
"""How long a process waits for the others: one may be sampling far longer completions than they are, or be in
a pause for a server that is away (`reward_options.max_outage`, an hour)."""


def start_processes() -> tuple[int, int]:
    """Join the processes that a launcher has started. Returns this one's rank and their number.

    Raises:
        TrainingError: several processes were asked for, and this one is alone.
    """
    if "LOCAL_RANK" not in os.environ:
        _check_alone()
        return 0, 1
    if _asked("ACCELERATE_USE_FSDP"):
        # With it transformers would load the weights in the first process alone, also of models that are
        # not to be trained and that nobody would send to the other processes.
        disable_fsdp_ram_efficient_loading()
    # Without `cpu=True` every process on a machine without GPUs would believe to be the only one.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != expected:
        raise TrainingError(
            f"the launcher started {expected} processes, but accelerate sees {state.num_processes}"
        )
    return state.process_index, state.num_processes


def _check_alone() -> None:
    # `accelerate launch --cpu --num_processes 2` sets the address to meet at, and starts one process.
    if "WORLD_SIZE" not in os.environ and _asked("ACCELERATE_USE_CPU") and "MASTER_ADDR" in os.environ:
        raise TrainingError(
            "accelerate was asked for several processes on the CPU but started one: leave out --cpu "
            "(use_cpu in its configuration) and give --multi_gpu, or use torchrun"
        )


def wait_for_all() -> None:
    """Wait until every process has come here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def splits_weights() -> bool:
    """Whether the launcher asked for the weights to be split over processes, by FSDP or ZeRO-3."""
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        return DeepSpeedPlugin().zero_stage == 3
    return _asked("ACCELERATE_USE_FSDP")


def check_backend(accelerator: Any) -> None:
    """Refuse to train when accelerate distributes in another way than the launcher was told.

    Raises:
        TrainingError: FSDP was asked for and is not there.
    """
    if _asked("ACCELERATE_USE_FSDP"):
        if accelerator.distributed_type != DistributedType.FSDP:
            raise TrainingError(
                f"the launcher was told to use FSDP, but accelerate uses "
                f"{accelerator.distributed_type.value}: it has FSDP on GPUs only, not on a CPU"
            )
        if not accelerator.is_fsdp2:
            raise TrainingError("FSDP1 is not supported; set fsdp_version: 2 in accelerate's configuration")


def _asked(variable: str) -> bool:
    """Whether accelerate's launcher has set a flag."""
    return bool(strtobool(os.environ.get(variable, "false")))
