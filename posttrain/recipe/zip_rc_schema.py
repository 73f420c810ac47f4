"""The part of the recipe's schema about ZIP-RC: training forecasts of reward and remaining length."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from posttrain.recipe.data_schema import DataSource, Section
from posttrain.recipe.rewards_schema import RewardSpec, reward_specs
from posttrain.recipe.stage_schema import CorrectConfig, OptimizerConfig

MOST_CELLS = 128
"""Cells that a grid may have: vLLM reads so many log-probs of given ids at a token."""
FULL_OPTIMIZER: dict[str, Any] = {"learning_rate": 3e-5, "schedule": "cosine", "betas": (0.9, 0.95)}
LITE_OPTIMIZER: dict[str, Any] = {**FULL_OPTIMIZER, "learning_rate": 1e-3}


class CriticConfig(Section):
    """The throw-away head that learns right and wrong, and whose values the final one forecasts."""

    variant: Literal["full", "lite"] = "full"
    """What of it learns. All weights, as in the official code, also where the final head is `lite`: nothing
    of it is kept but the values. `lite` saves their memory and values answers less well."""
    kl: float = Field(default=0.0, ge=0.0)
    """As the stage's, of the `full` one; the official code's 0. With a large learning rate and few rollouts
    some of it keeps what the model knows about its answers."""
    optimizer: OptimizerConfig = OptimizerConfig.model_construct(**FULL_OPTIMIZER)
    """Defaults as the stage's, by its own variant."""
    separation: float | None = Field(default=None, ge=0.0, le=1.0)
    """The stage ends with an error if mean values of right and of wrong rollouts are less than this apart: a
    final head has nothing to learn from labels that do not tell them apart. None does not look."""

    @model_validator(mode="before")
    @classmethod
    def _supervised_defaults(cls, values: Any) -> Any:
        return _with_optimizer(values)

    @model_validator(mode="after")
    def _fits(self) -> CriticConfig:
        _refuse_decay(self)
        return self


class ZipRcStage(Section):
    """Train the model to forecast reward and remaining length at every token of its own rollouts (ZIP-RC,
    Manvi et al., arXiv 2512.01457). The forecasts live in logits of ids that nothing else uses.
    """

    name: str = "zip_rc"
    """Name of the stage in the run folder; different for every stage of a recipe."""
    data: DataSource | None = None
    """Prompts; None is `data.train`."""
    rewards: list[RewardSpec] | None = None
    """None is the recipe's `rewards`."""
    correct: CorrectConfig = CorrectConfig.model_construct()
    """What counts as a right answer."""
    samples: int = Field(default=2, ge=1)
    """Rollouts of a prompt. Those that are cut off or unscored are left out: their remaining length, or
    their reward, is not known."""
    variant: Literal["full", "lite"] = "full"
    """`full` trains all weights and holds the policy with the KL term; `lite` trains only the slice's rows of
    the head, which leaves the policy as it is to the last bit, and forecasts clearly less well."""
    label: Literal["value", "outcome"] = "value"
    """What is forecast as reward. `value`: a throw-away head first learns right and wrong, and its mean over
    the end of a rollout is the label of the final one, in `reward_bins`. That is what an answer will be
    picked by. `outcome`: right and wrong themselves, in one training; forecasts then overrate further
    samples."""
    critic: CriticConfig = CriticConfig.model_construct()
    """How the throw-away head is trained, with label `value`."""
    reward_bins: int = Field(default=7, ge=2)
    """Levels from 0 to 1, with label `value`. The official code's 7."""
    length_bins: int = Field(default=8, ge=1)
    """Bins of remaining length, with edges at quantiles of the rollouts. The official code's 8."""
    length_edges: list[int] | None = None
    """Edges of those bins instead, from 0 upwards; the official code has 0, 256, 512, … 32768."""
    value_tokens: int = Field(default=512, ge=1)
    """Positions at the end of a rollout over which its value is the mean; the official code's 512. Few enough
    for the rollouts of a task to be longer."""
    epochs: float = Field(default=2.0, gt=0.0)
    """Passes over the rollouts, of each of the trainings."""
    max_steps: int | None = Field(default=None, ge=1)
    """Overrides `epochs`."""
    batch_size: int = Field(default=128, ge=1)
    """Rollouts of one optimiser step, over all devices."""
    micro_batch_tokens: int = Field(default=16384, ge=1)
    """Tokens of one forward and backward pass: sets the peak memory, never the result."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    kl: float = Field(default=10.0, ge=0.0)
    """Weight of KL(model before the stage || model), over the tokens outside the slice; not in `lite`, where
    it is 0. The official code's 10."""
    kl_top: int | None = Field(default=None, ge=1)
    """Only the so many likeliest tokens of the model before the stage, renormalised: the official code's 32.
    It sharpens the policy a little; None, all tokens, does not."""
    optimizer: OptimizerConfig = OptimizerConfig.model_construct(**FULL_OPTIMIZER)
    """Defaults here: learning rate 3e-5 (`lite`: 1e-3), betas 0.9 and 0.95, a cosine schedule."""
    log_every: int = Field(default=10, ge=1)
    """Optimiser steps between two lines of metrics."""
    save_steps: int | None = Field(default=None, ge=1)
    """A checkpoint every so many optimiser steps; None writes one only when the run is asked to stop."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """The newest ones that are kept: the last may turn out damaged, then the one before is used."""

    @field_validator("rewards", mode="before")
    @classmethod
    def _names(cls, rewards: Any) -> Any:
        return reward_specs(rewards)

    @model_validator(mode="before")
    @classmethod
    def _supervised_defaults(cls, values: Any) -> Any:
        return _with_optimizer(values)

    @model_validator(mode="after")
    def _fits(self) -> ZipRcStage:
        edges = self.length_edges
        if edges is not None and (len(edges) < 2 or edges[0] != 0 or sorted(set(edges)) != edges):
            raise ValueError(f"length_edges should ascend from 0, found {edges}")
        if self.cells > MOST_CELLS:
            raise ValueError(f"the grid has {self.cells} cells; vLLM reads at most {MOST_CELLS} at a token")
        _refuse_decay(self)
        return self

    @property
    def cells(self) -> int:
        """Most token ids that a grid of this stage takes."""
        lengths = self.length_bins if self.length_edges is None else len(self.length_edges) - 1
        return lengths * (self.reward_bins if self.label == "value" else 2)

    def steps_for(self, rollouts: int) -> int:
        """Optimiser steps of one training on so many rollouts."""
        return self.max_steps or math.ceil(self.epochs * rollouts / self.batch_size)

    @property
    def trainings(self) -> int:
        """How many heads are trained, one after the other."""
        return 2 if self.label == "value" else 1

    @property
    def trains_all(self) -> bool:
        """Whether all weights are trained at some time, or never more than the head."""
        return "full" in (self.variant, self.critic.variant if self.label == "value" else "lite")

    @property
    def has_reference(self) -> bool:
        """Whether a training has a KL term, for which the model before is held beside."""
        critic = self.critic
        in_critic = self.label == "value" and critic.variant == "full" and critic.kl > 0
        return in_critic or (self.variant == "full" and self.kl > 0)


def _with_optimizer(values: Any) -> Any:
    """A section's values with what its variant's optimiser has by default."""
    if not isinstance(values, dict):
        return values
    given = values.get("optimizer") or {}
    defaults = LITE_OPTIMIZER if values.get("variant") == "lite" else FULL_OPTIMIZER
    return {**values, "optimizer": {**defaults, **given}} if isinstance(given, dict) else values


def _refuse_decay(section: CriticConfig | ZipRcStage) -> None:
    if section.variant == "lite" and section.optimizer.weight_decay:
        raise ValueError("variant lite leaves the policy as it is: optimizer.weight_decay must be 0")
