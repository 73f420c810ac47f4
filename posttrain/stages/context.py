"""What a stage is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.recipe.schema import ModelConfig, Recipe
from posttrain.training.record import MetricsFile


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
    rank: int = 0
    world: int = 1

    def folder(self, kind: str) -> Path:
        """`run_dir/<kind>/<stage>`, made on first use."""
        path = self.run_dir / kind / self.name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def log_step(self, step: int, steps: int, metrics: dict[str, Any]) -> None:
        """Write one line of `metrics.jsonl` and show it."""
        self.metrics.write(stage=self.name, kind=self.kind, step=step, metrics=metrics)
        self.show(step, steps, metrics)

    def hand_over(self, model: Any, tokenizer: Any, summary: dict[str, Any] | None = None) -> StageResult:
        """Save `model` (or its adapter) under `models/<stage>` in the ordinary format for the next stage."""
        folder = self.folder("models")
        if self.rank == 0:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        if hasattr(model, "peft_config"):
            trained = self.model.model_copy(update={"adapter": str(folder)})
        else:
            trained = self.model.model_copy(update={"path": str(folder), "revision": None})
        return StageResult(trained, summary or {})
