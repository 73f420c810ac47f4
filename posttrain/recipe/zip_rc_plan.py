"""What `posttrain plan` knows about ZIP-RC: its steps before anything starts, and what cannot work."""

from __future__ import annotations

from collections.abc import Iterator

from posttrain.recipe.schema import Recipe, ZipRcStage
from posttrain.recipe.spelling import did_you_mean


def zip_rc_line(stage: ZipRcStage, rows: int | None, cap: int) -> str:
    """One line of the plan; `cap` is on a completion."""
    heads = "two heads one after the other" if stage.trainings == 2 else "one head"
    what = f"{stage.samples} rollouts of every prompt, then {heads} of {stage.variant} ZIP-RC"
    if rows is None:
        return what
    rollouts, steps = rows * stage.samples, stage.trainings * stage.steps_for(rows * stage.samples)
    return f"{what}: {rollouts:,} rollouts, at most {rollouts * cap:,} sampled tokens, {steps:,} steps"


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
    if recipe.model.lora is not None and stage.variant == "full":
        yield f"{key}.variant", "full trains all weights, and model.lora asks for an adapter: take lite."
    after = recipe.stages[[spec.config for spec in recipe.stages].index(stage) + 1 :]
    for later in after:
        if later.kind == "sft":
            text = f"comes after stage {stage.name}, but normalises over its slice: train forecasts last."
            yield f"stages[{[spec.config for spec in recipe.stages].index(later.config)}].sft", text
