"""The part of the recipe's schema about preferences: DPO, reward models, and how reliable their data is."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from posttrain.recipe.data_schema import DataSource, Section
from posttrain.recipe.model_schema import LoraConfig, ModelConfig
from posttrain.recipe.stage_schema import OptimizerConfig

Treatment = Literal["none", "drop", "flip", "smooth", "margin", "smooth_margin"]

REWARD_OPTIMIZER: dict[str, Any] = {"learning_rate": 1e-5, "schedule": "cosine"}
DPO_OPTIMIZER: dict[str, Any] = {"learning_rate": 1e-6, "schedule": "linear", "warmup_steps": 10}


class PairStage(Section):
    """What all stages that train on preference pairs have in common."""

    name: str
    """Name of the stage in the run folder; different for every stage of a recipe."""
    data: DataSource
    """Pairs: columns `prompt` (see `columns.prompt`), `chosen` and `rejected`, text or messages; optionally
    `margin`, `target` and `weight`. Rows of weight 0 are left out."""
    epochs: float = Field(default=1.0, gt=0.0)
    """Passes over the pairs. 1: with more the model learns noisy labels by heart (Wang et al., "Secrets of
    RLHF in large language models, part II", 2024)."""
    max_steps: int | None = Field(default=None, ge=1)
    """Overrides `epochs`."""
    batch_size: int = Field(default=32, ge=1)
    """Pairs of one optimiser step, over all devices."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Pairs of one forward pass on one device; None is all of the device's share."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens of a prompt with its answer; longer pairs are an error. None is the model's context."""


class DpoStage(PairStage):
    """Train the policy on preference pairs without a reward model (DPO, Rafailov et al., arXiv:2305.18290),
    by TRL's DPOTrainer. The reference is the policy that the stage before handed on.

    Of the columns `target` and `margin` only target 0 (the other way round) is known to DPO.
    """

    name: str = "dpo"
    """Name of the stage in the run folder; different for every stage of a recipe."""
    beta: float = Field(default=0.1, gt=0.0)
    """How much the policy is held to the reference; the paper's 0.1."""
    optimizer: OptimizerConfig = OptimizerConfig.model_construct(**DPO_OPTIMIZER)
    """Defaults here: learning rate 1e-6, as in the paper, and a linear schedule after 10 steps of warm-up."""
    log_every: int = Field(default=10, ge=1)
    """Optimiser steps between two lines of metrics."""
    save_steps: int | None = Field(default=None, ge=1)
    """A checkpoint every so many optimiser steps; None writes one only when the run is asked to stop."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """The newest ones that are kept: the last may turn out damaged, then the one before is used."""

    @field_validator("optimizer", mode="before")
    @classmethod
    def _supervised_defaults(cls, optimizer: Any) -> Any:
        return {**DPO_OPTIMIZER, **optimizer} if isinstance(optimizer, dict) else optimizer


class PreferenceStage(PairStage):
    """What the stages have in common that train reward models."""

    model: ModelConfig | None = None
    """What to start from: a language model, which gets a new scalar head, or a sequence-classification
    checkpoint with one label. None is the policy that the stage before handed on."""
    lora: LoraConfig | None = None
    """Train an adapter and the head alone; both are merged into what is saved. None trains all weights."""
    optimizer: OptimizerConfig = OptimizerConfig.model_construct(**REWARD_OPTIMIZER)
    """Defaults here: learning rate 1e-5 and a cosine schedule."""

    @field_validator("optimizer", mode="before")
    @classmethod
    def _supervised_defaults(cls, optimizer: Any) -> Any:
        return {**REWARD_OPTIMIZER, **optimizer} if isinstance(optimizer, dict) else optimizer

    @field_validator("model")
    @classmethod
    def _plain(cls, model: ModelConfig | None) -> ModelConfig | None:
        if model is not None and (model.lora is not None or model.adapter is not None):
            raise ValueError("takes neither lora nor adapter; lora is a key of the stage")
        return model


class RewardModelStage(PreferenceStage):
    """Train a reward model on preference pairs (Bradley–Terry), by TRL's RewardTrainer.

    Later stages can list it in their `rewards` under the stage's name. The policy is handed on as it was.
    """

    name: str = "reward_model"
    """Name of the stage in the run folder, and of the reward; different for every stage of a recipe."""
    eval: DataSource | None = None
    """Held-out pairs, scored at the end. A column `flipped` says which of them have the wrong order: then
    the accuracy is also given against the right one."""
    log_every: int = Field(default=10, ge=1)
    """Optimiser steps between two lines of metrics."""
    save_steps: int | None = Field(default=None, ge=1)
    """A checkpoint every so many optimiser steps; None writes one only when the run is asked to stop."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """The newest ones that are kept: the last may turn out damaged, then the one before is used."""


class AnnotatePreferencesStage(PreferenceStage):
    """Measure how strong every preference is, by the votes of reward models that have not seen it.

    The rows it writes (`data: {stage: NAME}`) have the mean and standard deviation of the votes, and the
    `margin`, `target` and `weight` that the treatment gives them. Votes find labels that are wrong at random.
    They do not find labels that are wrong in a systematic way: every voter learns the same mistake.
    """

    name: str = "annotate_preferences"
    """Name of the stage in the run folder; different for every stage of a recipe."""
    members: int = Field(default=5, ge=1)
    """Votes on every pair; the paper has 10. Every member costs about as much as `folds` - 1 trainings on all
    pairs."""
    folds: int = Field(default=2, ge=1)
    """A member splits the pairs at random into so many folds, trains a model on all but one of them for each,
    and each model votes on the fold it has not seen: a model that was trained on a wrong label votes for it.
    2 costs as much as training every member on all pairs once; k folds cost (k - 1) times that, for models
    that have seen more. 1 trains and votes on all pairs, as in the paper: then keep to one epoch."""
    treatment: Treatment = "drop"
    """What to do with suspect pairs. `none` only annotates; `drop` gives them weight 0; `flip` target 0, the
    opposite label; `smooth` target 1 - `alpha`. `margin` gives every pair its mean vote as a margin, on a
    common scale; `smooth_margin` does both. `drop` is the default because it does as well as `flip` where
    votes are right and less harm where they are wrong."""
    threshold: float = 0.0
    """Pairs with a mean vote below it are suspect."""
    share: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Instead of `threshold`: this share of the pairs is suspect, those with the lowest mean votes."""
    alpha: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Smoothing of suspect pairs. 0.5 says that nothing is known about their order."""
    audit: int = Field(default=50, ge=0)
    """Suspect pairs, drawn at random, that are written to `audit.jsonl` to be read by somebody."""

    @model_validator(mode="after")
    def _one_rule(self) -> AnnotatePreferencesStage:
        if self.share is not None and self.threshold != 0.0:
            raise ValueError("share and threshold exclude each other")
        return self
