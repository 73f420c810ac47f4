"""What a method may do in a training step. Every hook does nothing by default.

A step is: plan → generate → score → advantages → update → sync. A method is one class in one file that
overrides the hooks its paper needs; the trainer calls the hooks of all methods of a stage in the order the
recipe lists them, and never asks which method it is talking to.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from posttrain.errors import RecipeError
from posttrain.recipe.stage_schema import LossConfig
from posttrain.rollout.engine import RolloutEngine
from posttrain.rollout.types import Rollout, RolloutBatch, RolloutRequest, Sampling, make_rollouts
from posttrain.user_code import import_file

ENTRY_POINTS = "posttrain.methods"


@dataclass
class RolloutPlan:
    """The requests of a step, before generation."""

    requests: list[RolloutRequest]


@dataclass(frozen=True)
class Channel:
    """One policy-gradient term of the loss.

    `advantages` maps the ids of the rollouts it trains to one advantage for the whole completion or one per
    completion token. Each channel has its own denominator: adding one never changes another's effective
    learning rate. Channels with the same `pool` share one, counted over the rollouts of any of them, so that
    they are parts of one loss over their union; "" is a pool of the channel's own name.
    """

    name: str
    advantages: Mapping[str, float | Sequence[float]]
    weight: float = 1.0
    pool: str = ""


@dataclass(frozen=True)
class LossTerm:
    """One supervised term of the loss: weighted negative log-likelihood, divided by its own token count.

    `rows` are (prompt ids, completion ids) pairs; the loss is on the completions. `row_weights` are the
    weights of each row's tokens (none: all 1), and `total` is what this rank adds to the denominator in place
    of its tokens: with weights 1 / tokens and the number of rows it is the mean of the rows' means.
    """

    name: str
    rows: Sequence[tuple[Sequence[int], Sequence[int]]]
    weight: float = 1.0
    row_weights: Sequence[float] = ()
    total: float | None = None


CHANNELS = "channels"
"""In a comparison: the part of the loss that is all policy-gradient channels, whatever they are called."""


@dataclass(frozen=True)
class Comparison:
    """A policy gradient to compare the gradients of this step's loss with: measured, never followed.

    It is the gradient of the mean, over all ranks' rollouts in `advantages` (by rollout id), of advantage ·
    log-probability of the completion. The loss has the parts `CHANNELS` and one for each supervised term, by
    its name, each with the weights it is trained with. `combination` gives coefficients of parts whose sum
    has its norm taken, too; parts that it leaves out are not looked at.
    """

    advantages: Mapping[str, float]
    combination: Mapping[str, float]


@dataclass(frozen=True)
class Compared:
    """What came of a comparison. `products` are the inner products of its gradient with that of each part."""

    norm: float
    """Of the comparison's gradient."""
    products: Mapping[str, float]
    combined_norm: float
    """Of the combination of the parts' gradients."""
    learning_rate: float
    """Of the optimiser in this step."""


@dataclass
class StepContext:
    """What the hooks may use.

    `rng` is derived from (run seed, step, method, rank), `log` adds a value to the step's metrics (averaged
    when called several times), `model` is the unwrapped policy, `score` fills the rewards of rollouts in
    place. `gather` gives the values of all ranks in rank order: a collective, so every rank must call it.
    `sampling` is how the stage's own completions are sampled, `loss` the stage's, `seed` the run's, `rank`
    one of `world`.
    """

    step: int
    engine: RolloutEngine
    tokenizer: Any
    model: Any
    rng: np.random.Generator
    log: Callable[[str, float], None]
    score: Callable[[Sequence[Rollout]], None]
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    sampling: Sampling = field(default_factory=lambda: Sampling(max_tokens=1024))
    loss: LossConfig = field(default_factory=LossConfig)
    seed: int = 0
    rank: int = 0
    world: int = 1

    def generate(self, requests: Sequence[RolloutRequest]) -> RolloutBatch:
        """Sample follow-up rollouts with the current weights."""
        return make_rollouts(requests, self.engine.generate(requests), self.engine.version)


class NoOptions(BaseModel):
    """Configuration of a method without options."""

    model_config = ConfigDict(extra="forbid")


class Method:
    """Base class of methods.

    `conflicts` maps names of methods this one cannot be combined with to the reason; what depends on options
    is said by `problems` of the built-in methods' schemas. `scores` are roles of rollouts that this method
    rewards itself, in `extend`: the recipe's rewards are not asked about them.
    """

    name: ClassVar[str]
    Config: ClassVar[type[BaseModel]] = NoOptions
    conflicts: ClassVar[Mapping[str, str]] = {}
    scores: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Any):
        self.config = config

    def plan(self, plan: RolloutPlan, context: StepContext) -> RolloutPlan:
        """Drop, change or add requests before generation."""
        return plan

    def extend(self, batch: RolloutBatch, context: StepContext) -> RolloutBatch:
        """Add follow-up rollouts or rewards after scoring."""
        return batch

    def channels(self, batch: RolloutBatch, context: StepContext) -> list[Channel]:
        """Advantages this method adds. A channel named like an earlier one ("outcome") replaces it."""
        return []

    def weigh(self, channels: list[Channel], context: StepContext) -> list[Channel]:
        """Change the weights of all channels, once every method has added its own."""
        return channels

    def auxiliary(self, context: StepContext) -> list[LossTerm]:
        """Supervised terms of this step's loss."""
        return []

    @property
    def compares(self) -> bool:
        """Whether `compare` asks for anything in some step: not every model allows it."""
        return False

    def compare(self, batch: RolloutBatch, context: StepContext) -> Comparison | None:
        """A gradient to compare those of this step with; None on all ranks or on none."""
        return None

    def compared(self, result: Compared, context: StepContext) -> None:
        """What came of `compare`, the same on all ranks; before the optimiser steps."""

    def after_update(self, context: StepContext) -> None:
        """Called when the optimiser has stepped."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold for this method, as JSON-compatible values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""


@dataclass(frozen=True)
class MethodSpec:
    """A method of a recipe: its class and its validated options."""

    kind: type[Method]
    config: BaseModel = field(default_factory=NoOptions)


def load_attribute(reference: str) -> Any:
    """The object that `package.module:attribute` or `path/to/file.py:attribute` names.

    Raises:
        RecipeError: no such file, module or attribute.
    """
    module_name, _, attribute = reference.rpartition(":")
    in_file = module_name.endswith(".py")
    if in_file and not Path(module_name).is_file():
        raise RecipeError(f"{reference}: there is no file {module_name}")
    try:
        module = import_file(Path(module_name)) if in_file else importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise RecipeError(f"{reference}: {error}") from None
    if not hasattr(module, attribute):
        raise RecipeError(f"{reference}: {module_name} defines no {attribute}")
    return getattr(module, attribute)


def find_method(name: str) -> type[Method]:
    """The method class of a built-in name, an entry point's name, or a `module:Class` reference.

    Raises:
        RecipeError: there is none, or it is no method.
    """
    if ":" in name:
        kind = load_attribute(name)
    elif importlib.util.find_spec(f"posttrain.methods.{name}") is not None and name != "base":
        kind = load_attribute(f"posttrain.methods.{name}:METHOD")
    else:
        found = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
        if name not in found:
            known = ", ".join(sorted(found)) or "none is installed"
            raise RecipeError(f"no method named {name!r} ({known}); a method of your own is `file.py:Class`")
        kind = found[name].load()
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise RecipeError(f"{name}: not a subclass of posttrain.methods.base.Method")
    return kind


def load_methods(entries: Sequence[str | Mapping[str, Mapping[str, Any]]]) -> list[MethodSpec]:
    """The methods of a policy stage, from the recipe's `methods` list.

    Raises:
        RecipeError: unknown method, wrong options, or two methods that cannot be combined.
    """
    specs: list[MethodSpec] = []
    for entry in entries:
        name, options = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
        kind = find_method(name)
        if kind.name in (spec.kind.name for spec in specs):
            raise RecipeError(f"methods: {kind.name} is listed twice")
        try:
            specs.append(MethodSpec(kind, kind.Config.model_validate(options)))
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(map(str, [name, *problem["loc"]]))
            raise RecipeError(f"methods: {place}: {problem['msg']}") from None
    for spec in specs:
        for other in specs:
            if other.kind.name in spec.kind.conflicts:
                reason = spec.kind.conflicts[other.kind.name]
                raise RecipeError(
                    f"methods: {spec.kind.name} cannot be combined with {other.kind.name}: {reason}"
                )
    return specs
