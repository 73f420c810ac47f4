"""The part of the recipe's schema about AMFT: the options of the method `amft` (experimental)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, field_validator, model_validator

from posttrain.recipe.data_schema import DataSource, Section
from posttrain.recipe.mrt_schema import FROM_PREFIX
from posttrain.recipe.schema import PolicyStage, Recipe


class HeldOut(Section):
    """The held-out utility: mean reward of the policy's answers to prompts that nothing is trained on."""

    data: DataSource
    """Prompts with what the stage's rewards need, disjoint from the stage's own, from the demonstrations' and
    from the evaluations': the weight is fitted on them."""
    prompts: int = Field(default=16, ge=1)
    """Of one measurement, over all devices."""
    group_size: int = Field(default=8, ge=2)
    """Answers to each; advantages are r minus the mean of the others."""
    evidence: int = Field(default=4, ge=1)
    """Prompts whose answers differ in reward that a measurement needs, over all devices; with fewer it is not
    made. While nearly all answers are wrong, the few right ones point anywhere."""


class AmftConfig(Section):
    """Options of AMFT. The defaults are ours: those of the released code cannot move the weight visibly."""

    demonstrations: DataSource
    """Prompts with demonstrations (`columns.completion`; procedural tasks bring their own)."""
    batch_size: int = Field(default=64, ge=1)
    """Demonstrations of one step, over all devices."""
    mu: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Weight of imitation at the start, after the warm-up; the policy gradient has 1 - mu."""
    low: float = Field(default=0.05, gt=0.0, lt=1.0)
    """Lower bound of mu; of the released code."""
    high: float = Field(default=0.95, gt=0.0, lt=1.0)
    """Upper bound of mu; of the released code."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of imitation alone, without rollouts, at the beginning of the stage."""
    schedule: dict[int, float] | None = None
    """Mu by the step from which it holds, in place of the controller: {0: 1} is imitation alone, {0: 0} the
    policy gradient alone, {0: 1, 200: 0} one after the other, {0: 0.3} a fixed mixture."""
    held_out: HeldOut | None = None
    """Needed unless there is a schedule or `rate` is 0."""
    interval: int = Field(default=10, ge=1)
    """Steps between two measurements of the meta-gradient, which is 0 in between."""
    first: int = Field(default=10, ge=0)
    """Steps of the stage before the first: in Adam's first ones an update hardly depends on the gradient's
    size, so neither does it on mu."""
    rate: float = 0.1
    """Step of mu along the meta-gradient. 0 leaves it out; below 0 turns the controller around as a
    control."""
    scale: Literal["cosine", "raw", "per_lr"] = "cosine"
    """Of the meta-gradient: the cosine between the utility's gradient and the way from the policy gradient's
    step to imitation's, in [-1, 1]; the derivative itself, which is the learning rate times smaller than
    anything visible; or the derivative divided by the learning rate."""
    entropy_rate: float = 0.0
    """Step of mu along (target - entropy), every step. 0, because the sign that regulates depends on whether
    imitation or the policy gradient lowers entropy; below 0 is the other sign."""
    entropy_deadband: float = Field(default=0.0, ge=0.0)
    """Differences of the entropy below this are none."""
    target_entropy: float | None = Field(default=None, gt=0.0)
    """In nats a token, at the sampling temperature. None measures it in the first step after the warm-up."""

    @field_validator("schedule")
    @classmethod
    def _schedule_is_one(cls, schedule: dict[int, float] | None) -> dict[int, float] | None:
        if schedule is not None and 0 not in schedule:
            raise ValueError("a schedule begins at step 0")
        if schedule is not None and not all(step >= 0 and 0 <= mu <= 1 for step, mu in schedule.items()):
            raise ValueError("a schedule maps steps to weights between 0 and 1")
        return schedule

    @model_validator(mode="after")
    def _fits_together(self) -> AmftConfig:
        if not self.low <= self.mu <= self.high:
            raise ValueError(f"mu {self.mu:g} is not between low {self.low:g} and high {self.high:g}")
        if self.schedule is None and self.rate != 0 and self.held_out is None:
            raise ValueError("the meta-gradient needs held_out, prompts that nothing is trained on")
        return self

    @property
    def learns(self) -> bool:
        """Whether the meta-gradient moves mu."""
        return self.schedule is None and self.rate != 0


OPTIONS = AmftConfig


def problems(recipe: Recipe, stage: PolicyStage) -> Iterator[tuple[str, str]]:
    """Keys and sentences on what AMFT cannot be combined with, or is not made for."""
    where, options = stage.method_options("amft") or ("", {})
    config = AmftConfig.model_validate(options)
    if recipe.tools is not None:
        yield (
            "tools",
            "amft's demonstrations are single answers: it does not know how to show calls of tools.",
        )
    demonstrations = config.demonstrations
    if demonstrations.task is None and demonstrations.columns.completion is None:
        yield f"{where}.demonstrations.columns", "amft imitates demonstrations: set columns.completion."
    if config.warmup_steps >= stage.steps:
        yield f"{where}.warmup_steps", f"the stage has {stage.steps} steps: nothing comes after the warm-up."
    trained, held_out = stage.data or recipe.data.train, config.held_out
    if held_out is not None and held_out.data == trained:
        yield f"{where}.held_out.data", "these are the prompts that are trained on."
    if held_out is not None and held_out.data == recipe.data.eval:
        yield (
            f"{where}.held_out.data",
            "these are the problems of the evaluation: mu would be fitted on them.",
        )
    yield from _order(stage, config, where)


def _order(stage: PolicyStage, config: AmftConfig, where: str) -> Iterator[tuple[str, str]]:
    """In steps of imitation alone nothing is sampled, unless a method before this one does so in its plan."""
    alone = config.warmup_steps > 0 if config.schedule is None else 1.0 in config.schedule.values()
    for name in stage.method_names[: stage.method_names.index("amft")] if alone else []:
        options = (stage.method_options(name) or ("", {}))[1]
        prefixes = name == "mrt" and options.get("mode", FROM_PREFIX[0]) in FROM_PREFIX
        if prefixes or (name == "masa" and options.get("efficient") is not None):
            yield where, f"{name} would sample for steps of imitation alone: list amft before it."
