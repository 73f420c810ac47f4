"""Where the Trainer calls back: before the first step, and right before and after the optimiser steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from posttrain.training.policy import PolicyTrainer


class AroundUpdate(TrainerCallback):
    """Has a `PolicyTrainer` look at the weights when training begins, and at gradients and updates."""

    def __init__(self, trainer: PolicyTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The weights are where they will be trained."""
        self.trainer.watch.begin(self.trainer.policy)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The gradients are complete."""
        self.trainer.before_optimizer_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimiser has stepped."""
        self.trainer.after_update()
