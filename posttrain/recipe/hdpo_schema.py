"""The part of the recipe's schema about HDPO: the options of the method `hdpo`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from posttrain.recipe.data_schema import Section

if TYPE_CHECKING:
    from posttrain.recipe.schema import PolicyStage, Recipe


class HdpoConfig(Section):
    """Options of HDPO; the defaults are the paper's unless it says otherwise."""

    weight: float = Field(default=0.15, ge=0.0)
    """Of the efficiency channel beside the accuracy channel's 1. 0 is plain GRPO."""
    cost: Literal["calls", "seconds", "tokens"] = "calls"
    """What is saved: trips to tools (failed and malformed ones count), the seconds that tools took, or the
    tokens of the completion with all that tools said. Seconds are not the same in every run."""
    unit: float = Field(default=1.0, gt=0.0)
    """What counts as one unit of cost: with `tokens` 100 makes 1 / (1 + tokens / 100)."""
    shape: Literal["reciprocal", "linear"] = "reciprocal"
    """`reciprocal`: 1 / (1 + cost), which tells 0 from 1 better than 3 from 4. `linear`: -cost."""
    normalizer: Literal["all", "qualifying"] = "all"
    """Tokens that the channel's loss is divided by: those of all completions, as in the paper's formula, or
    of those with an advantage other than 0, as in the authors' code, which raises the weight of the few."""
    combine: Literal["loss", "advantage"] = "loss"
    """`loss`: two clipped losses. `advantage`: the sum of the advantages, in one."""
    divide_by_std: bool = True
    """Off: advantages are only centred (Dr. GRPO), where this method makes them."""
    conditional: bool = True
    """Off compares all completions, wrong ones with an economy of 0: the ablation that learns accuracy a
    second time."""
    reward: str | None = None
    """The reward that says what is correct; None is the one the recipe lists first."""
    threshold: float = 1.0
    """Correct is a reward of at least this."""
    compare_gradients: int | None = Field(default=None, ge=1)
    """Every how many steps the gradients of the two channels are compared, which takes another forward and
    backward pass of the completions with an advantage; None never does. Not where ranks hold parts of weights
    that are all trained (FSDP, ZeRO-3)."""


OPTIONS = HdpoConfig


def problems(recipe: Recipe, stage: PolicyStage) -> Iterator[tuple[str, str]]:
    """What of a recipe and a policy stage HDPO cannot be combined with: keys and sentences."""
    where, options = stage.method_options("hdpo") or ("", {})
    config = HdpoConfig.model_validate(options)
    if config.cost != "tokens" and recipe.tools is None:
        text = f"there are no tools, so no completion costs any {config.cost}: take cost tokens."
        yield f"{where}.cost", text
    if config.combine == "advantage" and recipe.reward_options.combine == "normalize_then_sum":
        text = "advantage is made of the summed reward, and reward_options.combine asks for each by itself"
        yield f"{where}.combine", f"{text}: take loss."
    amft = stage.method_options("amft")
    learns = amft is not None and amft[1].get("schedule") is None and amft[1].get("rate") != 0
    if config.compare_gradients is not None and config.weight and learns:
        text = "amft's meta-gradient compares gradients, too, and a step has room for one comparison"
        yield f"{where}.compare_gradients", f"{text}: leave it out."
