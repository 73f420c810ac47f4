"""The part of the recipe's schema about rewards: functions, reward models, and what happens around them."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from posttrain.recipe.data_schema import Section

OnError = Literal["redraw", "drop", "fail"]
Combine = Literal["sum_then_normalize", "normalize_then_sum"]
ServedBy = Literal["posttrain", "vllm_classify", "vllm_score", "vllm_pooling"]


class RewardSpec(Section):
    """One reward function and its weight in the sum."""

    name: str
    """A registered name, `package.module:function`, or `path/to/file.py:function`; any name with `use`."""
    use: str | None = None
    """What the reward is, where `name` is only what it is called: `{name: style, use: http, args: …}`. One
    reward can so be listed several times."""
    from_: str | None = Field(default=None, alias="from")
    """Python file or module that registers or defines the reward."""
    weight: float | dict[int, float] = 1.0
    """Factor in the total; 0 logs the reward without using it. `{0: 1.0, 200: 0.1}` is a schedule over the
    steps of a policy stage: linear in between, constant before and after."""
    clip: tuple[float, float] | None = None
    """[lowest, highest]: values outside are moved to the nearer end before weighting."""
    only_if: str | None = None
    """A condition on another reward, such as `math_answer > 0`: where it is not met, this one does not
    apply."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the reward."""
    timeout: float | None = Field(default=None, gt=0.0)
    """Seconds for one sample; None is the reward's own."""

    @property
    def code(self) -> str:
        """What the reward is, whatever it is called."""
        return self.use or self.name

    @field_validator("weight", mode="before")
    @classmethod
    def _schedule(cls, weight: Any) -> Any:
        if not isinstance(weight, dict):
            return weight
        if not weight or not all(str(step).isdecimal() for step in weight):
            raise ValueError("a schedule maps steps from 0 on to weights, such as {0: 1.0, 200: 0.1}")
        return {int(step): value for step, value in weight.items()}  # in a recipe all keys are text

    @field_validator("clip", mode="before")
    @classmethod
    def _pair(cls, clip: Any) -> Any:
        return tuple(clip) if isinstance(clip, list) else clip  # YAML has no tuples

    @field_validator("clip")
    @classmethod
    def _in_order(cls, clip: Any) -> Any:
        if clip is not None and not clip[0] < clip[1]:
            raise ValueError(f"should be [lowest, highest], found [{clip[0]:g}, {clip[1]:g}]")
        return clip


class RewardOptions(Section):
    """What happens around the rewards."""

    on_error: OnError = "redraw"
    """A sample without a score is sampled again, left out, or ends the run. Never a zero."""
    max_redraws: int = Field(default=2, ge=0)
    """Rounds of redrawing before a sample is left out."""
    max_outage: float = Field(default=3600.0, ge=0.0)
    """Seconds that the run pauses for a server that a reward asks and that is away, before it ends with an
    error. 0 does not wait: the samples are left without a score, as after any other error."""
    workers: int = Field(default=2, ge=1)
    """Processes that run reward functions."""
    memory_gib: float | None = Field(default=8.0, gt=0.0)
    """What each of these processes may allocate; more is an error of the sample. 8 leaves room for large
    libraries and stops what runs away; null sets no limit."""
    combine: Combine = "sum_then_normalize"
    """Advantages of the weighted sum; or `normalize_then_sum`, which first normalises each reward within its
    group, so that one with a small spread is heard beside one with a large (GDPO, Liu et al. 2026)."""


LOADING_SETTINGS = ("revision", "device", "dtype", "batch_tokens", "trust_remote_code")
"""Keys of a reward model that are about loading it: where a server has it already, they are the server's."""
SERVER_SETTINGS = (
    *LOADING_SETTINGS,
    *("template", "head", "label", "activation", "step_separator", "step_reduce", "max_length"),
)
"""Those that `posttrain rewards serve` is started with."""


class RewardModelConfig(Section):
    """A reward model: a checkpoint that is loaded once on this machine, or one that a server has."""

    path: str | None = None
    """Hub name or local folder of a sequence- or token-classification checkpoint."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; None is its default branch."""
    url: str | None = None
    """Server that has the model already, e.g. `http://node1:8000`, instead of `path`."""
    served_by: ServedBy = "posttrain"
    """What answers at `url`: `posttrain rewards serve`, or a route of a vLLM server."""
    token_env: str | None = None
    """Environment variable with the bearer token for `url`."""
    template: str | None = None
    """Text to score, with `{prompt}` (of a chat the contents of its messages, each on a line) and
    `{completion}`; None is the chat template of the model's tokenizer, or, where it has none, the prompt
    followed by the completion."""
    head: Literal["auto", "sequence", "token"] = "auto"
    """One score for the text, or one for every step of it (a process reward model); `auto` is what the
    checkpoint's configuration says."""
    label: int | str | None = None
    """The label whose score counts, where there are several; its number or its name in the configuration."""
    activation: Literal["none", "sigmoid", "softmax"] = "none"
    """Applied to the outputs. `none` gives the raw score of a Bradley–Terry model."""
    step_separator: str = "\n\n"
    """Token classification: the text that ends a step, added to the last one where it is missing. The score
    of a step is that of its last token."""
    step_reduce: Literal["min", "mean", "last", "product"] = "min"
    """Token classification: from the scores of the steps to one value. A chain is as good as its worst step
    (Lightman et al., "Let's verify step by step", 2023)."""
    device: str | None = None
    """Where it runs, e.g. `cuda:1` or `cpu`; None is the first accelerator."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """`auto` keeps the checkpoint's type."""
    batch_tokens: int = Field(default=16384, ge=1)
    """Tokens of one forward pass, padding included; texts of like length go together."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens. Longer texts lose the beginning of their prompt, and are counted; a completion that is longer
    by itself has no score. None is the model's own limit."""
    range: tuple[float, float] | None = None
    """Lowest and highest value it may give; anything outside is an error."""
    trust_remote_code: bool = False
    """Off: code that comes with a checkpoint is not run unless the recipe says so."""

    @field_validator("url")
    @classmethod
    def _address(cls, url: str | None) -> str | None:
        if url is not None and not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", url):
            raise ValueError(f"should be an address like http://node1:8000, found {url!r}")
        return url

    @field_validator("range", mode="before")
    @classmethod
    def _pair(cls, bounds: Any) -> Any:
        return tuple(bounds) if isinstance(bounds, list) else bounds  # YAML has no tuples

    @field_validator("template")
    @classmethod
    def _fields(cls, template: str | None) -> str | None:
        if template is not None and "{completion}" not in template:
            raise ValueError("template has no {completion}")
        return template

    @model_validator(mode="after")
    def _one_place(self) -> RewardModelConfig:
        if (self.path is None) == (self.url is None):
            raise ValueError("needs either path or url")
        if self.url is None:
            if self.served_by != "posttrain" or self.token_env is not None:
                raise ValueError("served_by and token_env are about a server and need url")
            return self
        theirs = SERVER_SETTINGS if self.served_by == "posttrain" else LOADING_SETTINGS
        for name in theirs:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is a setting of the server at {self.url}, and is to be set there")
        return self


def reward_specs(rewards: Any) -> Any:
    """A recipe's list of rewards with every plain name as a mapping; anything else is left to the schema."""
    if isinstance(rewards, list):
        return [{"name": reward} if isinstance(reward, str) else reward for reward in rewards]
    return rewards
