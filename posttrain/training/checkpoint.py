"""Checkpoints from which a stage goes on exactly, whatever ended it.

The Trainer writes what it knows (weights, optimiser, scheduler, random states, its counters) in the form of
the backend in use. To this is added what only the stage knows; then the folder gets a manifest of hashes, is
forced to disk and renamed to `step-000012`. A folder of that name is complete. Values in the reward cache are
on disk at once and need no checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from posttrain.errors import RecipeError, TrainingError
from posttrain.training.arguments import world_size
from posttrain.training.distributed import wait_for_all
from posttrain.training.manifest import (
    MANIFEST,
    STAGING,
    checkpoint_name,
    checkpoint_step,
    find_checkpoint,
    publish,
    remove_older,
    write_manifest,
)
from posttrain.training.ranks import highest, on_first_rank
from posttrain.training.record import Clock, free_space
from posttrain.training.stop import StopSignals


class Savable(Protocol):
    """Has state that a checkpoint must hold: JSON-compatible values, and tensors by name."""

    def state_dict(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What `load_state_dict` needs to go on as if nothing had happened."""

    def load_state_dict(self, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state_dict` gave."""


class Checkpointer(TrainerCallback):
    """Trains with checkpoints: goes on from the newest, writes one every `every` optimiser steps, and one
    when a signal asks to stop.
    """

    def __init__(
        self,
        folder: Path,
        *,
        stage: str,
        every: int | None,
        keep: int,
        stop: StopSignals,
        clock: Clock,
        say: Callable[[str], None],
        rank: int = 0,
    ):
        """`clock` counts the stage's seconds, over all attempts.

        Raises:
            RecipeError: the checkpoint is of another number of processes.
        """
        self.folder = folder
        self.stage = stage
        self.every = every
        self.keep = keep
        self.stop = stop
        self.clock = clock
        self.rank = rank
        self.part: Savable | None = None
        self._saving = False
        self.start = on_first_rank(lambda: self._find(say))

    @property
    def output_dir(self) -> str:
        """Where the Trainer is to write: the `output_dir` of its arguments."""
        return str(self.folder / STAGING)

    @property
    def step(self) -> int:
        """The optimiser step that training goes on from; 0 at the beginning."""
        return checkpoint_step(self.start) if self.start else 0

    def train(self, trainer: Trainer, part: Savable | None = None) -> None:
        """Run the trainer to its end. `part` is what it has beside the Trainer's own state.

        Raises:
            Stopped: a signal came; there is a checkpoint of the last step.
            TrainingError: a checkpoint could not be written.
        """
        self.part = part
        trainer.add_callback(self)
        with self._explain_failures(), self.stop.deferring():
            trainer.train(resume_from_checkpoint=str(self.start) if self.start else None)
        if trainer.state.global_step < trainer.state.max_steps:
            self.stop.check()
        on_first_rank(lambda: shutil.rmtree(self.output_dir, ignore_errors=True))

    # --- called by the Trainer -------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The Trainer has loaded its share of the checkpoint: load ours."""
        if self.start is None:
            return
        content = json.loads((self.start / f"posttrain-{self.rank}.json").read_text())
        tensors = self.start / f"posttrain-{self.rank}.safetensors"
        if self.part is not None:
            self.part.load_state_dict(content["state"], load_file(tensors) if tensors.is_file() else {})

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask the Trainer for a checkpoint when one is due, and to stop when a rank was told to.

        Not after the last step: the stage's model, written next, is its record.
        """
        wanted = highest(self.stop.received or 0)
        if wanted:
            self.stop.received = wanted
            control.should_training_stop = True
        due = self.every is not None and state.global_step % self.every == 0
        self._saving = (due or bool(wanted)) and state.global_step < state.max_steps
        control.should_save = self._saving

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The Trainer has written its part: add ours and make the checkpoint visible."""
        staged = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        values, tensors = self.part.state_dict() if self.part is not None else ({}, {})
        content = {"seconds": self.clock.seconds(), "state": values}
        (staged / f"posttrain-{self.rank}.json").write_text(json.dumps(content) + "\n")
        if tensors:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                staged / f"posttrain-{self.rank}.safetensors",
            )
        wait_for_all()  # every rank has written its files
        on_first_rank(lambda: self._publish(staged, state.global_step))
        self._saving = False

    # --- on the first rank -----------------------------------------------------------------------------

    def _publish(self, staged: Path, step: int) -> None:
        (staged / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
        for config in staged.glob("*/adapter_config.json"):
            # A frozen adapter, KL's reference: the stage's start has it. The Trainer, seeing such a folder,
            # would load it in place of the one that is trained.
            shutil.rmtree(config.parent)
        write_manifest(staged, stage=self.stage, step=step, processes=world_size())
        publish(staged, self.folder / checkpoint_name(step))
        remove_older(self.folder, step, self.keep)

    def _find(self, say: Callable[[str], None]) -> Path | None:
        found = find_checkpoint(self.folder, say)
        if found is None:
            return None
        processes = json.loads((found / MANIFEST).read_text())["processes"]
        if processes != world_size():
            raise RecipeError(
                f"{found} was written by {processes} processes; it cannot be resumed with {world_size()}"
            )
        self.clock.restart(json.loads((found / "posttrain-0.json").read_text())["seconds"])
        return found

    @contextmanager
    def _explain_failures(self) -> Iterator[None]:
        try:
            yield
        except UnpicklingError as error:
            raise TrainingError(
                f"{self.start} is not loaded: a file in it would run code, which no checkpoint needs"
            ) from error
        except (OSError, RuntimeError, SafetensorError) as error:
            if not self._saving:
                raise
            reason = (isinstance(error, OSError) and error.strerror) or str(error).partition("\n")[0]
            if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
                reason = "a file could not be written in full"  # what torch.save makes of every such error
            free = free_space(self.folder)
            shutil.rmtree(self.output_dir, ignore_errors=True)
            raise TrainingError(
                f"a checkpoint could not be written to {self.folder}: {reason} ({free}); the checkpoints "
                f"before it are untouched"
            ) from error
