"""What `posttrain plan` knows about ZIP-RC: its steps before anything starts, and what cannot work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from posttrain.recipe.pareto_schema import FORECAST_METRICS
from posttrain.recipe.schema import DpoStage, EvaluateStage, Recipe, SftStage, ZipRcStage
from posttrain.recipe.spelling import did_you_mean


def zip_rc_line(stage: ZipRcStage, rows: int | None, cap: int) -> str:
    """One line of the plan; `cap` is on a completion."""
    heads = "two heads one after the other" if stage.trainings == 2 else "one head"
    what = f"{stage.samples} rollouts of every prompt, then {heads} of {stage.variant} ZIP-RC"
    if rows is None:
        return what
    rollouts, steps = rows * stage.samples, stage.trainings * stage.steps_for(rows * stage.samples)
    return f"{what}: {rollouts:,} rollouts, at most {rollouts * cap:,} sampled tokens, {steps:,} steps"


def forecast_problems(recipe: Recipe, stage: EvaluateStage, key: str) -> Iterator[tuple[str, str]]:
    """Keys and sentences about metrics that need forecasts where there are none."""
    asked = [metric for metric in stage.metrics if metric in FORECAST_METRICS]
    if not asked:
        return
    if not _forecasters(recipe, stage) and _foresees(recipe.model.path) is False:
        yield (
            f"{key}.metrics",
            f"{asked[0]} needs a model that forecasts: put a stage zip_rc before this one.",
        )
    if recipe.tools is not None:
        yield f"{key}.metrics", f"{asked[0]} cannot be measured with tools."
    if recipe.rollout.engine != "transformers" and (stage.top_p < 1 or stage.top_k):
        text = f"{asked[0]} cannot be measured with top_p or top_k on engine {recipe.rollout.engine}."
        yield f"{key}.metrics", text


def sft_problems(recipe: Recipe, stage: SftStage | DpoStage, key: str) -> Iterator[tuple[str, str]]:
    """Keys and sentences about a model with forecasts, whose slice a trainer of TRL's would train."""
    before = _forecasters(recipe, stage)
    if before:
        yield key, f"comes after stage {before[0]}, but normalises over its slice: train forecasts last."
    elif _foresees(recipe.model.path):
        yield key, f"normalises over the slice of the forecasts of {recipe.model.path}: train forecasts last."


def _forecasters(recipe: Recipe, stage: EvaluateStage | SftStage | DpoStage) -> list[str]:
    """Names of the stages before this one that train forecasts."""
    before = recipe.stages[: [spec.config for spec in recipe.stages].index(stage)]
    return [spec.config.name for spec in before if spec.kind == "zip_rc"]


def _foresees(path: str) -> bool | None:
    """Whether a model folder has a grid; None if that cannot be told from here."""
    file = Path(path).expanduser() / "config.json"
    try:
        return "zip_rc" in json.loads(file.read_bytes())  # CONFIG_KEY of zip_rc/grid.py, which needs numpy
    except (OSError, ValueError):
        return None


def zip_rc_problems(recipe: Recipe, stage: ZipRcStage, key: str) -> Iterator[tuple[str, str]]:
    """Keys and sentences about what would end the stage later."""
    if stage.data is None and recipe.data.train is None:
        yield key, "has no data: set data.train, or data in the stage."
    names = [spec.name for spec in recipe.rewards_of(stage)]
    if not names:
        yield key, "cannot tell what is right: there are no rewards."
    wanted = stage.correct.reward
    if names and wanted is not None and wanted not in names:
        text = f"there is no reward {wanted!r}; there are {', '.join(names)}."
        yield f"{key}.correct.reward", text + did_you_mean(wanted, names)
    if recipe.tools is not None:
        yield "tools", f"stage {stage.name} cannot give its model tools."
    text = "full trains all weights, and model.lora asks for an adapter: take lite."
    if recipe.model.lora is not None and stage.variant == "full":
        yield f"{key}.variant", text
    elif recipe.model.lora is not None and stage.trains_all:
        yield f"{key}.critic.variant", text
