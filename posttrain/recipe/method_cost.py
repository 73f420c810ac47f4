"""What methods sample and train beside a policy stage's own rollouts, at most: for the plan's arithmetic."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from posttrain.recipe.schema import PolicyStage, Recipe

if TYPE_CHECKING:
    from posttrain.recipe.amft_schema import AmftConfig
    from posttrain.recipe.masa_schema import MasaConfig
    from posttrain.recipe.mel_schema import MelConfig
    from posttrain.recipe.mrt_schema import MrtConfig


@dataclass(frozen=True)
class Extra:
    """More rollouts or demonstrations of a step, over all processes.

    `rollouts` are sampled, of at most `tokens` each; `trained` are the tokens of them that are trained at
    most, prompts not counted.
    """

    what: str
    rollouts: int
    tokens: int
    trained: int


def extras(stage: PolicyStage, recipe: Recipe) -> Iterator[Extra]:
    """What the stage's methods add to a step. Of a method of the user's own nothing is known."""
    for method in stage.methods:
        name = method if isinstance(method, str) else next(iter(method))
        options = {} if isinstance(method, str) else method[name]
        if name not in _COSTS:
            continue
        schema = importlib.import_module(f"posttrain.recipe.{name}_schema").OPTIONS
        try:
            yield from _COSTS[name](schema.model_validate(options), stage, recipe.rollout.max_tokens)
        except ValidationError:
            continue  # the checks have said what is wrong


def unknown_methods(stage: PolicyStage) -> list[str]:
    """Methods of which this page knows nothing."""
    names = [method if isinstance(method, str) else next(iter(method)) for method in stage.methods]
    return [name for name in names if name not in _COSTS and name != "hdpo"]


def _masa(options: MasaConfig, stage: PolicyStage, cap: int) -> Iterator[Extra]:
    count, tokens = stage.prompts_per_step * options.group_size, options.max_tokens or cap
    yield Extra("self-predictions", count, tokens, count * tokens)


def _mel(options: MelConfig, stage: PolicyStage, cap: int) -> Iterator[Extra]:
    pairs = stage.prompts_per_step * options.pairs
    pairs = min(pairs, options.max_pairs or pairs)
    tokens = options.max_tokens or cap
    yield Extra("analyses", pairs, tokens, pairs * tokens if options.weight else 0)
    if options.validation == "replay":
        yield Extra("replays", pairs * options.replays, cap, 0)


def _mrt(options: MrtConfig, stage: PolicyStage, cap: int) -> Iterator[Extra]:
    probes = options.probes
    cuts = probes.episodes.max_cuts
    if cuts is None:
        return  # as many as a trace has episodes
    if options.mode == "online":
        count = stage.prompts_per_step * stage.group_size * (cuts + 1) * probes.branches
        yield Extra("forced answers", count, probes.max_tokens, 0)


def _amft(options: AmftConfig, stage: PolicyStage, cap: int) -> Iterator[Extra]:
    yield Extra("demonstrations", 0, 0, options.batch_size * cap)
    if options.learns and options.held_out is not None:
        count = options.held_out.prompts * options.held_out.group_size
        yield Extra(f"held-out rollouts every {options.interval} steps", count // options.interval, cap, 0)


_COSTS: dict[str, Callable[[Any, PolicyStage, int], Iterator[Extra]]] = {
    "masa": _masa,
    "mel": _mel,
    "mrt": _mrt,
    "amft": _amft,
}
