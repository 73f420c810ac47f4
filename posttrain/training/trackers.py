"""Where a training's metrics go besides `metrics.jsonl`: to the Trainer's own trackers."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PROJECT = "posttrain"
OFF: Mapping[str, Any] = {"report_to": "none"}
"""Arguments of a training that nothing tracks."""
FOLDER = "trackers"
"""In the run folder: event files of TensorBoard, and what Weights & Biases keeps."""
_TENSORBOARD = os.environ.get("TENSORBOARD_LOGGING_DIR")


def track(trackers: Sequence[str], run_dir: Path, training: str) -> dict[str, Any]:
    """Arguments of `TrainingArguments` for one training; call this right before its trainer is made.

    The trackers take their places from the environment, which this sets where the user has not: projects are
    called `posttrain`, runs after run folder and training, and files are in the run folder. The Trainer's own
    default for TensorBoard is a folder that ends with the training.

    Args:
        trackers: `tensorboard`, `wandb`, `trackio`.
        run_dir: the run folder.
        training: the stage, and the part of it where it has several.
    """
    if not trackers:
        return dict(OFF)
    folder, run = run_dir / FOLDER, run_dir.name
    place = Path(_TENSORBOARD) / run if _TENSORBOARD else folder / "tensorboard"
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(place / training)
    if "wandb" in trackers:
        folder.mkdir(exist_ok=True)
        for name, value in (("PROJECT", PROJECT), ("DIR", str(folder)), ("RUN_GROUP", run)):
            os.environ.setdefault(f"WANDB_{name}", value)
        _finish_wandb()
    return {"report_to": list(trackers), "run_name": f"{run}/{training}", "project": PROJECT}


def _finish_wandb() -> None:
    """End the run of the training before: the Trainer would go on writing to it."""
    wandb = importlib.import_module("wandb")  # an extra
    if wandb.run is not None:
        wandb.finish()
