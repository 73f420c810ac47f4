"""Lines of metrics of the stages that leave the training loop to a trainer of TRL's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import TrainerCallback


class StepMeans(TrainerCallback):
    """Passes every `every`-th log line on, with the means since the one before.

    The Trainer logs every step and the means are taken here, because a checkpoint between two lines must hold
    the part of them that is known, and the Trainer's own does not.
    """

    LAST = ("grad_norm", "learning_rate")
    HIDDEN = ("epoch", "num_tokens")

    def __init__(self, every: int, log: Callable[[int, int, dict[str, Any]], None]):
        self.every = every
        self.log = log
        self._values: dict[str, list[float]] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """A step's line of the Trainer; other lines (of an evaluation, of the end) are left alone."""
        if "loss" not in logs or not state.is_world_process_zero:
            return
        for key, value in logs.items():
            if key not in self.HIDDEN:
                self._values.setdefault(key, []).append(float(value))
        if state.global_step % self.every == 0:
            metrics = {
                key: values[-1] if key in self.LAST else sum(values) / len(values)
                for key, values in self._values.items()
            }
            self._values = {}
            self.log(state.global_step, state.max_steps, metrics)

    def state_dict(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The values since the last line."""
        return {"values": self._values}, {}

    def load_state_dict(self, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self._values = {key: list(numbers) for key, numbers in values["values"].items()}
