"""The part of the recipe's schema about MASA: the options of the method `masa`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from posttrain.recipe.data_schema import Section
from posttrain.recipe.meta_schema import AlignmentConfig, MetaFormat
from posttrain.recipe.stage_schema import CorrectConfig

if TYPE_CHECKING:
    from posttrain.recipe.schema import PolicyStage, Recipe


class GuardConfig(Section):
    """Guard rails of the efficient phase: ours, not the papers', whose static rule can starve exactly the
    problems that still teach something. `guard: null` is the papers' behaviour."""

    precision: float = Field(default=0.8, ge=0.0, le=1.0)
    """Gating begins when at least this share of what it would have gated was all right or all wrong."""
    leave_below: float = Field(default=0.7, ge=0.0, le=1.0)
    """Gating ends when the share falls below this."""
    evidence: int = Field(default=20, ge=1)
    """Problems (for the cap: correct solutions) that a share must be measured on."""
    window: int = Field(default=20, ge=1)
    """Steps over which shares are measured."""
    max_fraction: float = Field(default=0.8, ge=0.0, le=1.0)
    """Of a step's problems gated at most; the least sure ones are kept."""
    audit: float = Field(default=0.15, ge=0.0, le=1.0)
    """Share of the problems that are neither gated nor capped whatever was predicted. They are trained on: a
    gated problem gives no reward to its predictions, so nothing else would correct a wrong one."""
    cutoff_false_rate: float = Field(default=0.02, ge=0.0, le=1.0)
    """Solutions are capped only while at most this share of the correct ones would have been cut."""


class EfficientConfig(Section):
    """The efficient phase: self-predictions come first and decide about the solutions."""

    start: int = Field(default=80, ge=0)
    """Steps before it; 80 of 314 in version 2, 120 in version 1."""
    gate: bool = True
    """Leave out problems that are surely solved always or never."""
    sigma: float = Field(default=0.1, gt=0.0)
    """A problem is gated when its predicted pass rates have a smaller standard deviation; of version 1."""
    tolerance: float = Field(default=1 / 16, gt=0.0, le=0.5)
    """… and a mean so close to 0 or 1 (version 2): half a level, so that it rounds to 0 or 1."""
    min_valid: float = Field(default=0.5, ge=0.0, le=1.0)
    """… and at least this share of them could be read."""
    regate: Literal["static", "reevaluate"] = "static"
    """Whether a problem that was gated once stays so in later epochs (version 2) or is asked again."""
    cutoff: bool = True
    """Cap solutions at a multiple of the predicted length."""
    multiplier: float = Field(default=2.0, gt=0.0)
    """Of version 1; version 2 does not print its value."""
    statistic: Literal["mean", "median", "max"] = "mean"
    """Which of the predicted lengths counts."""
    min_limit: int = Field(default=128, ge=1)
    """The smallest cap."""
    hints: bool = False
    """Append the notions of one self-prediction, drawn for each solution, to the problem. The effect is small
    in both papers, and hinted words are then in solutions because they were hinted."""
    guard: GuardConfig | None = GuardConfig()


class ExpertConfig(Section):
    """Behaviour cloning of the best self-predictions with the truth put in (version 1 only)."""

    min_notion: float = Field(default=0.2, gt=0.0, le=1.0)
    """Least notion reward; each problem gives its best self-prediction at most."""
    batch: int = Field(default=128, ge=1)
    """Experts, over all ranks, that are collected before they are trained on and thrown away."""
    updates: int = Field(default=5, ge=1)
    """Steps whose loss has the term. The paper takes as many supervised steps of their own."""
    weight: float = Field(default=1.0, gt=0.0)
    """Of the term."""


class MasaConfig(Section):
    """Options of MASA. The defaults are the parallel phase of the papers."""

    group_size: int = Field(default=8, ge=2)
    """Self-predictions of one problem (M); 8 in version 2, 16 in version 1."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Cap on a self-prediction; None is that of a solution, as in the released code."""
    question: MetaFormat = MetaFormat.model_construct()
    reward: AlignmentConfig = AlignmentConfig.model_construct()
    correct: CorrectConfig = CorrectConfig.model_construct()
    """What counts as a correct solution; one that was cut never does."""
    efficient: EfficientConfig | None = None
    """None stays in the parallel phase."""
    experts: ExpertConfig | None = None
    """None clones nothing, as version 2."""


OPTIONS = MasaConfig


def problems(recipe: Recipe, stage: PolicyStage) -> Iterator[tuple[str, str]]:
    """What of a recipe and a policy stage MASA cannot be combined with: keys and sentences."""
    where, options = stage.method_options("masa") or ("", {})
    efficient = MasaConfig.model_validate(options).efficient
    mrt = stage.method_options("mrt")
    if efficient is not None and efficient.hints and mrt is not None and mrt[1].get("mode") == "online":
        text = (
            "gives every solution a prompt of its own, and mrt online forces first answers once for a problem"
        )
        yield f"{where}.efficient.hints", f"{text}: take false."
