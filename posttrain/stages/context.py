"""What a stage is given and what it gives back."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import Trainer

from posttrain.recipe.schema import (
    DataSource,
    DpoStage,
    ModelConfig,
    PolicyStage,
    Recipe,
    RewardModelConfig,
    RewardModelStage,
    RewardSpec,
    SftStage,
    ZipRcStage,
)
from posttrain.rewards.scorer import Scorer
from posttrain.rewards.shared import SharedEngine
from posttrain.rollout.weights import saved_weights
from posttrain.training.checkpoint import Checkpointer
from posttrain.training.manifest import STAGING, publish
from posttrain.training.ranks import on_first_rank
from posttrain.training.record import Clock, MetricsFile, remove_rollouts
from posttrain.training.stop import StopSignals
from posttrain.training.trackers import track

ROWS = "rows.parquet"
"""In `data/STAGE`: the rows that a stage wrote for later ones."""


def rows_file(split: str) -> str:
    """The file of a split of them; `train` is the one that every such stage writes."""
    return ROWS if split == "train" else f"rows-{split}.parquet"


@dataclass(frozen=True)
class StageResult:
    """The model the next stage starts from, and what the run's summary says about this stage."""

    model: ModelConfig
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StageContext:
    """A stage's place in its run. `model` is what the stage before handed on."""

    recipe: Recipe
    run_dir: Path
    name: str
    kind: str
    model: ModelConfig
    metrics: MetricsFile
    show: Callable[[int, int, dict[str, Any]], None]
    """Progress display: (step, number of steps, metrics)."""
    say: Callable[[str], None]
    """One line on the terminal and in the run's log."""
    stop: StopSignals
    clock: Clock = field(default_factory=Clock)
    rank: int = 0
    world: int = 1

    def folder(self, kind: str) -> Path:
        """`run_dir/<kind>/<stage>`, made on first use."""
        path = self.run_dir / kind / self.name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def data(self, source: DataSource | None) -> DataSource:
        """A source of this stage; rows that an earlier stage wrote are the file they are in."""
        assert source is not None  # the recipe's checks ask for it
        if source.stage is None:
            return source
        index = [spec.config.name for spec in self.recipe.stages].index(source.stage)
        rows = self.run_dir / "data" / self.recipe.stage_folder(index) / rows_file(source.split)
        return source.model_copy(update={"stage": None, "parquet": str(rows)})

    @property
    def reward_models(self) -> dict[str, RewardModelConfig]:
        """The recipe's reward models and those that earlier stages have trained, by name."""
        folders = [self.recipe.stage_folder(index) for index in range(len(self.recipe.stages))]
        before = folders.index(self.name)
        trained = {
            name: RewardModelConfig(path=str(self.run_dir / "models" / folder))
            for name, folder in self.recipe.trained_rewards(before).items()
        }
        return {**self.recipe.reward_models, **trained}

    def scorer(self, rewards: Sequence[RewardSpec], engine: SharedEngine) -> Scorer:
        """What scores this stage's rollouts, with the values that the run knows already.

        Every process has a file of values of its own; those of the other processes and stages are beside it.
        A signal ends the waiting for a server that is away, wherever in a step that is.
        """
        return Scorer(
            rewards,
            self.recipe.reward_options,
            self.run_dir / "cache" / "rewards" / f"{self.rank}.jsonl",
            say=self.say,
            check=self.stop.check,
            engine=engine,
            models=self.reward_models,
            logs=self.run_dir / "logs",
        )

    def log_step(self, step: int, steps: int, metrics: dict[str, Any]) -> None:
        """Write one line of `metrics.jsonl` and show it."""
        self.metrics.write(stage=self.name, kind=self.kind, step=step, metrics=metrics)
        self.show(step, steps, metrics)

    def track(self, part: str = "") -> dict[str, Any]:
        """The Trainer's arguments for the recipe's trackers; a stage of several trainings names each part."""
        return track(self.recipe.report_to, self.run_dir, f"{self.name}-{part}" if part else self.name)

    def checkpointer(
        self,
        stage: SftStage | DpoStage | PolicyStage | RewardModelStage | ZipRcStage,
        updates_per_step: int = 1,
        *,
        part: str = "",
        before: int = 0,
    ) -> Checkpointer:
        """What trains this stage, from its newest checkpoint if there is one.

        What the run folder has of later steps is removed: it is about to be written again. A stage of several
        trainings names the `part` that this one is, and how many steps its metrics have of those `before`.
        """
        checkpointer = Checkpointer(
            self.folder("checkpoints") / part,
            stage=self.name,
            every=stage.save_steps and stage.save_steps * updates_per_step,
            keep=stage.keep_checkpoints,
            stop=self.stop,
            clock=self.clock,
            say=self.say,
            rank=self.rank,
        )
        on_first_rank(lambda: self._rewind(checkpointer, before + checkpointer.step))
        return checkpointer

    def _rewind(self, checkpointer: Checkpointer, step: int) -> None:
        self.metrics.cut(self.name, step)
        remove_rollouts(self.run_dir / "rollouts" / self.name, step)
        if checkpointer.start is not None:
            self.say(f"   resumed from {checkpointer.start}")

    def hand_over(self, trainer: Trainer, summary: dict[str, Any] | None = None) -> StageResult:
        """Save the model or its adapter under `models/<stage>`, in the ordinary format.

        Every process calls this: the model may be split over them.
        """
        policy = trainer.accelerator.unwrap_model(trainer.model)
        return StageResult(self.save(policy, trainer.processing_class), summary or {})

    def save(self, policy: Any, tokenizer: Any, name: str | None = None) -> ModelConfig:
        """Save a model or its adapter as `hand_over` does, under the stage's name or another."""
        models = self.run_dir / "models"
        staged, folder = models / STAGING / (name or self.name), models / (name or self.name)
        is_adapted = isinstance(policy, PeftModel)
        weights = saved_weights(policy, keep=self.rank == 0)

        def finish() -> None:
            # Not the adapter that KL keeps as its reference.
            only = {"selected_adapters": policy.active_adapters} if is_adapted else {}
            policy.save_pretrained(staged, state_dict=weights, **only)
            tokenizer.save_pretrained(staged)
            publish(staged, folder)
            shutil.rmtree(models / STAGING)

        on_first_rank(finish)
        if is_adapted:
            return self.model.model_copy(update={"adapter": str(folder)})
        return self.model.model_copy(update={"path": str(folder), "revision": None})
