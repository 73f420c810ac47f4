"""Arithmetic of a recipe: steps, rollouts, tokens, and disk. Memory is in `posttrain.recipe.memory`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from posttrain.recipe.memory import Stage, trainable_parameters
from posttrain.recipe.model_info import ModelInfo
from posttrain.recipe.pareto_schema import FORECAST_METRICS
from posttrain.recipe.preference_schema import PairStage
from posttrain.recipe.schema import (
    AnnotatePreferencesStage,
    DataSource,
    EvaluateStage,
    HardSubsetStage,
    PolicyStage,
    Recipe,
    RewardModelStage,
    SftStage,
    SoarStage,
    StarStage,
    ZipRcStage,
)
from posttrain.recipe.soar_plan import soar_cost

COUNTED_BYTES = 64 * 2**20
"""Rows of a jsonl file are counted up to this size."""
BYTES_PER_LOGGED_TOKEN = 12
"""Token id, log-prob and text of a sampled token in the rollouts' parquet files, before compression."""


@dataclass(frozen=True)
class StageSize:
    """What a stage will do; None is unknown before the data is read. Tokens are an upper bound."""

    rows: int | None
    steps: int | None
    rollouts: int | None
    sampled_tokens: int | None


def count_rows(source: DataSource) -> int | None:
    """Rows a source will give, where that can be told cheaply."""
    rows = source.size
    if source.jsonl is not None:
        path = Path(source.jsonl).expanduser()
        if path.stat().st_size <= COUNTED_BYTES:
            with path.open("rb") as lines:
                rows = sum(1 for line in lines if line.strip())
    if source.limit is None:
        return rows
    return source.limit if rows is None else min(rows, source.limit)


def size_of(stage: Stage, recipe: Recipe) -> StageSize:
    """Rows, steps, rollouts and sampled tokens of a stage; steps are those of all models that it trains."""
    source = stage.data or (recipe.data.eval if isinstance(stage, EvaluateStage) else recipe.data.train)
    rows = None if source is None else count_rows(source)
    match stage:
        case SftStage() | PairStage():
            models, seen = _trainings(stage, rows or 0)
            steps = stage.max_steps
            if steps is None and rows is not None:
                steps = math.ceil(seen / stage.batch_size * stage.epochs)
            return StageSize(rows, None if steps is None else models * steps, None, None)
        case PolicyStage():
            rollouts = stage.steps * stage.prompts_per_step * stage.group_size
            tokens = rollouts * recipe.rollout.max_tokens * (1 + stage.dynamic_sampling)
            return StageSize(rows, stage.steps, rollouts, tokens)
        case StarStage():
            traces = None if rows is None else rows * stage.samples
            return StageSize(rows, None, traces, traces and traces * recipe.rollout.max_tokens)
        case SoarStage():
            cost = soar_cost(stage, recipe.rollout.max_tokens)
            return StageSize(rows, cost.steps, cost.rollouts, cost.tokens)
        case HardSubsetStage():
            drawn = None if rows is None else rows * stage.samples
            return StageSize(rows, None, drawn, drawn and drawn * recipe.rollout.max_tokens)
        case ZipRcStage():
            if rows is None:
                return StageSize(None, stage.max_steps and stage.trainings * stage.max_steps, None, None)
            drawn = rows * stage.samples
            steps = stage.trainings * stage.steps_for(drawn)
            return StageSize(rows, steps, drawn, drawn * recipe.rollout.max_tokens)
        case EvaluateStage():
            if rows is None:
                return StageSize(None, None, None, None)
            of_samples = ("mean_length", "meta", *FORECAST_METRICS)
            sampled = any("@" in metric or metric in of_samples for metric in stage.metrics)
            answers = rows * (stage.samples * sampled + ("greedy" in stage.metrics))
            told = rows * stage.meta.samples * ("meta" in stage.metrics)
            cap = stage.max_tokens or recipe.rollout.max_tokens
            tokens = answers * cap + told * (stage.meta.max_tokens or cap)
            return StageSize(rows, None, answers + told, tokens)


def _trainings(stage: SftStage | PairStage, rows: int) -> tuple[int, int]:
    """How many models a stage trains, and on how many of the rows each."""
    if not isinstance(stage, AnnotatePreferencesStage):
        return 1, rows
    return stage.members * stage.folds, rows if stage.folds == 1 else rows - rows // stage.folds


def disk_of(recipe: Recipe, info: ModelInfo) -> int:
    """Bytes that the run folder will take at most: models, checkpoints with optimiser state, rollouts.

    Trained weights and Adam's two moments are float32; a new checkpoint is written before the oldest goes.
    """
    trained = 4 * trainable_parameters(info, recipe.model.lora)
    total = 0
    for spec in recipe.stages:
        stage = spec.config
        if isinstance(stage, EvaluateStage | AnnotatePreferencesStage | StarStage | HardSubsetStage):
            continue
        if isinstance(stage, SoarStage):
            # Teacher and student; in a checkpoint these and Adam's moments.
            total += trained * (2 + 4 * stage.keep_checkpoints)
            continue
        if isinstance(stage, RewardModelStage):
            total += 4 * (info.parameters or 0) if stage.model is None else 0
            continue
        total += trained
        size = size_of(stage, recipe)
        every = getattr(stage, "save_steps", None)
        if every:
            total += min((size.steps or every) // every, stage.keep_checkpoints + 1) * 3 * trained
        if isinstance(stage, PolicyStage) and stage.log_rollouts:
            total += (size.sampled_tokens or 0) // stage.log_rollouts * BYTES_PER_LOGGED_TOKEN
    return total
