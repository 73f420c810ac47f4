"""The part of the recipe's schema about thinking traces: episodes, forced answers, filtering of traces, and
the options of the method `mrt`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator

from posttrain.recipe.data_schema import DataSource, Section

if TYPE_CHECKING:
    from posttrain.recipe.schema import PolicyStage, Recipe

MARKERS = [
    "Wait",
    "But wait",
    "Alternatively",
    "Is there another way to think about this?",
    "But let me double-check",
    "But hold on",
]
THINKING_METRICS = ("regret", "budget_curve", "episode_votes", "continuation", "linearized")
"""Metrics of thinking that is cut short, and of thinking that is made to go on."""
STOP_CUE = (
    "\n\nTime is up.\n\nGiven the time I have spent and the approaches I have tried, I should stop thinking "
    "and write the final answer from what I have.\n</think>\n\n**Solution and answer**\n\n1. "
)


class EpisodeConfig(Section):
    """Where a thinking trace is cut into episodes: before a step that starts with a marker."""

    separator: str = Field(default="\n\n", min_length=1)
    """What ends a step: a blank line makes paragraphs, a line break or `;` makes tagged steps."""
    markers: list[str] = Field(default=MARKERS, min_length=1)
    """Beginnings of a step that opens an episode, case-sensitive. The default is how the R1 models write
    (Qu et al., 2025); another model needs its own. An empty marker matches every step."""
    min_gap: int = Field(default=3, ge=1)
    """Steps an episode has at least; a marker that comes earlier does not cut."""
    max_cuts: int | None = Field(default=None, ge=0)
    """Cuts of a trace; what follows the last is one episode. None does not limit them."""
    group_size: int = Field(default=1, ge=1)
    """Consecutive episodes that are merged into one."""


class ProbeConfig(Section):
    """Forced answers: the policy is made to stop thinking at the end of an episode and to answer."""

    episodes: EpisodeConfig = EpisodeConfig.model_construct()
    """How traces are cut."""
    branches: int = Field(default=4, ge=1)
    """Forced answers at one cut. 4 as in MRT-online; the estimate then has a variance of at most 1/16."""
    cue: str = Field(default=STOP_CUE, min_length=1)
    """Text put after the cut that ends the thinking, the closing tag included. Never trained on."""
    open: str = "<think>"
    """Beginning of the thinking; not looked for when empty, or where the prompt ends with it."""
    close: str = Field(default="</think>", min_length=1)
    """End of the thinking."""
    max_tokens: int = Field(default=256, ge=1)
    """Cap on a forced answer; shorter than the 4,096 of the paper's analysis, since probes are many."""


class ContinuationConfig(Section):
    """Metric `continuation`: thinking is made to go on where the policy would have ended it."""

    shares: list[Annotated[float, Field(gt=0)]] = Field(default=[0.5, 1.0], min_length=1)
    """Tokens it is made longer by, as shares of the cap on a completion, in rising order: 0.5 is +50 %."""
    words: list[str] = Field(default=["\nWait", "\nBut wait", "\nAlternatively"], min_length=1)
    """What is put in the place of an end, by turns."""

    @field_validator("shares")
    @classmethod
    def _rising(cls, shares: list[float]) -> list[float]:
        if shares != sorted(set(shares)):
            raise ValueError("shares must rise")
        return shares


class LinearConfig(Section):
    """Metric `linearized`: a backtracking search is made to go on for ever and forgets old attempts."""

    window: int = Field(default=2, ge=1)
    """Newest episodes that it goes on from."""
    word: str = Field(default="\nBacktrack to beginning\n", min_length=1)
    """What is put in the place of an end."""


class ThinkingConfig(Section):
    """What an evaluation's metrics of thinking are measured with."""

    probes: ProbeConfig = ProbeConfig.model_construct(branches=8, max_tokens=4096)
    """Forced answers; 8 of at most 4,096 tokens, as in the paper's analysis."""
    budgets: list[int] = Field(default=[4096, 8192, 12288, 16384], min_length=1)
    """Tokens, thinking and answer together, for which `regret`, `budget_curve`, `linearized` are reported."""
    continuation: ContinuationConfig = ContinuationConfig.model_construct()
    """How `continuation` makes thinking go on."""
    linear: LinearConfig = LinearConfig.model_construct()
    """How `linearized` makes a search go on."""


class StarStage(Section):
    """Sample traces, keep good ones, and write them as demonstrations for a later `sft` stage."""

    name: str = "star"
    """Name of the stage in the run folder; a later stage reads the rows with `data: {stage: NAME}`."""
    data: DataSource | None = None
    """None is `data.train`."""
    samples: int = Field(default=1, ge=1)
    """Traces of one prompt."""
    selection: Literal["correct", "best_prefix", "best_trace"] = "best_prefix"
    """`correct` keeps every trace with a right answer (STaR). `best_prefix` cuts each at the episode after
    which a forced answer is most often right and keeps it with a right forced answer; `best_trace` keeps the
    prompt's correct trace with the most progress (both MRT-STaR)."""
    threshold: float = 1.0
    """A trace or answer is right when its reward is at least this."""
    allow_empty_thinking: bool = False
    """With `best_prefix`, keep answers without any thinking where they are always right."""
    limit: int | None = Field(default=None, ge=1)
    """Rows that are written at most; for comparisons at an equal number of demonstrations."""
    probes: ProbeConfig = ProbeConfig.model_construct()
    """How traces are cut and forced answers are asked for."""


FROM_PREFIX = ("implicit_group", "termination_baseline", "explicit")
"""Modes of MRT whose rollouts go on from prefixes of earlier traces."""


class MrtConfig(Section):
    """Options of MRT."""

    mode: Literal["implicit_group", "termination_baseline", "explicit", "online", "backtrack"] = (
        "implicit_group"
    )
    """See `posttrain.methods.mrt`. `explicit` and `online` credit single episodes, the first two do not."""
    alpha: float = Field(default=1.0, ge=0.0)
    """Weight of the progress; the value of MRT-online. The paper's own is not published."""
    probes: ProbeConfig = ProbeConfig.model_construct()
    """How traces are cut and forced answers are asked for."""
    refresh_steps: int = Field(default=50, ge=1)
    """A prompt's stored trace, which prefixes are cut from, is replaced once it is this many steps old."""
    train_on_terminations: bool = True
    """`implicit_group` trains on the forced answers too: they are on-policy samples of the same group."""
    credit: Literal["local", "to_go"] = "local"
    """`online`: an episode gets its own progress, or all from it on."""
    backtrack: str = r"^Backtrack to (?:(?:Line|Node|Step) \d+|(?:the )?beginning)"
    """`backtrack`: regular expression of the line that returns to an earlier step."""


OPTIONS = MrtConfig


def problems(recipe: Recipe, stage: PolicyStage) -> Iterator[tuple[str, str]]:
    """What of a recipe and a policy stage MRT cannot be combined with: keys and sentences."""
    where, options = stage.method_options("mrt") or ("", {})
    mode = MrtConfig.model_validate(options).mode
    if mode in FROM_PREFIX:
        yield from _prefix_problems(stage, mode)
    if mode == "online":
        return  # its progress is a channel of its own; the other modes make the outcome's advantages
    if recipe.reward_options.combine == "normalize_then_sum":
        text = f"{mode} is made of the summed reward, and reward_options.combine asks for each by itself"
        yield f"{where}.mode", f"{text}: take sum_then_normalize, or mode online."
    hdpo = stage.method_options("hdpo")
    if hdpo is not None and hdpo[1].get("combine") == "advantage":
        text = f"mrt {mode} makes the advantages of the outcome, and so does combine advantage"
        yield f"{hdpo[0]}.combine", f"{text}: take loss, which adds a loss of its own."


def _prefix_problems(stage: PolicyStage, mode: str) -> Iterator[tuple[str, str]]:
    """What does not go with rollouts that begin in the middle of a solution."""
    if stage.dynamic_sampling:
        text = f"mrt {mode} begins at prefixes, and prompts that are put in the place of others have none"
        yield "dynamic_sampling", f"{text}: it takes 0."
    if mode == "implicit_group" and stage.group_size == 1:
        yield "group_size", "mrt implicit_group forces half of a group to answer, so it takes 2 or more."
    if (masa := stage.method_options("masa")) is not None:
        text = f"mrt {mode} samples the ends of solutions, and masa asks about whole ones"
        yield masa[0], f"{text}: take mrt's mode online or backtrack."
    mel = stage.method_options("mel")
    if mel is not None and mel[1].get("target") == "solution":
        text = f"mrt {mode} samples the ends of solutions, which cannot be learned from the problem alone"
        yield f"{mel[0]}.target", f"{text}: take another target."
