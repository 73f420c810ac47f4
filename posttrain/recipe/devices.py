"""How a recipe's training is spread over devices: processes, and what each holds of the training state."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from posttrain.recipe.model_info import ModelInfo
from posttrain.recipe.schema import Recipe

Backend = Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]

LIVE_PARAMETERS = 1_000_000_000
"""ZeRO-3 lets go of gathered weights above this (DeepSpeed's `stage3_max_live_parameters`)."""


@dataclass(frozen=True)
class Layout:
    """Processes of a run and what is split over them.

    `offload_weights` and `offload_optimizer` are kept in main memory. With `reshard` off, FSDP2 keeps the
    layers that it has gathered.
    """

    backend: Backend = "ddp"
    processes: int = 1
    machines: int = 1
    offload_weights: bool = False
    offload_optimizer: bool = False
    reshard: bool = True

    @property
    def splits_weights(self) -> bool:
        """Whether a process holds a part of the weights only; an engine in it then has a copy of its own."""
        return self.backend in ("zero3", "fsdp2")

    @property
    def per_machine(self) -> int:
        """Processes of one machine."""
        return -(-self.processes // self.machines)

    def weights(self, size: int) -> int:
        """Of weights of this size, what stays on a device."""
        if self.offload_weights:
            return 0
        return size // self.processes if self.splits_weights else size

    def gradients(self, size: int) -> int:
        """Of gradients of this size, what stays on a device."""
        return size // self.processes if self.splits_weights or self.backend == "zero2" else size

    def optimizer(self, size: int) -> int:
        """Of optimiser state of this size, what stays on a device."""
        if self.offload_optimizer or (self.offload_weights and self.backend == "fsdp2"):
            return 0
        return size if self.backend == "ddp" else size // self.processes

    def gathered(self, info: ModelInfo, element: int) -> int:
        """Bytes of the weights that are whole on a device for a moment, while it computes with them.

        FSDP2 gathers the block it is in, the next one, and, to the end of the pass, what is in no block:
        embedding and head. DeepSpeed's default gathers up to `LIVE_PARAMETERS`.
        """
        total = info.parameters or 0
        if not self.splits_weights:
            return 0
        if self.backend == "zero3":
            return element * min(total, LIVE_PARAMETERS)
        outside = info.vocabulary * info.hidden * (1 if info.tied else 2)
        return element * (min(outside + 2 * info.block, total) if self.reshard else total)

    @property
    def text(self) -> str:
        """`8 processes, ZeRO-3`."""
        if self.processes == 1:
            return "1 process"
        names = {"ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}
        machines = f" on {self.machines} machines" if self.machines > 1 else ""
        return f"{self.processes} processes{machines}, {names[self.backend]}"


def layout_of(recipe: Recipe) -> Layout:
    """What the recipe's `launch` asks for; a configuration that cannot be read is accelerate's to refuse."""
    launch = recipe.launch
    if launch is None:
        return Layout()
    config = {} if launch.config_file is None else _read(Path(launch.config_file))
    processes = launch.num_processes if launch.num_processes > 1 else _count(config.get("num_processes"))
    machines = min(_count(config.get("num_machines")), processes)
    if config.get("distributed_type") == "DEEPSPEED":
        return _deepspeed(config.get("deepspeed_config") or {}, processes, machines)
    if config.get("distributed_type") == "FSDP":
        fsdp = config.get("fsdp_config") or {}
        return Layout(
            backend="fsdp2",
            processes=processes,
            machines=machines,
            offload_weights=bool(fsdp.get("fsdp_offload_params")),
            reshard=fsdp.get("fsdp_reshard_after_forward") is not False,
        )
    return Layout(processes=processes, machines=machines)


def _deepspeed(config: dict[str, Any], processes: int, machines: int) -> Layout:
    stage, zero = config.get("zero_stage"), config
    offload = {
        part: config.get(f"offload_{part}_device") not in (None, "none") for part in ("optimizer", "param")
    }
    if isinstance(config.get("deepspeed_config_file"), str):
        zero = _read(Path(config["deepspeed_config_file"])).get("zero_optimization") or {}
        stage = zero.get("stage")
        offload = {
            part: (zero.get(f"offload_{part}") or {}).get("device") not in (None, "none")
            for part in ("optimizer", "param")
        }
    backends: dict[Any, Backend] = {1: "zero1", 2: "zero2", 3: "zero3"}
    return Layout(
        backend=backends.get(stage, "ddp"),
        processes=processes,
        machines=machines,
        offload_weights=offload["param"],
        offload_optimizer=offload["optimizer"],
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _count(value: Any) -> int:
    try:
        return max(int(value), 1)
    except (TypeError, ValueError):
        return 1
