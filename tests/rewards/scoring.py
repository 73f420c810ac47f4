"""Rollouts and scorers for the tests of the rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from posttrain.recipe.schema import RewardOptions, RewardSpec
from posttrain.rewards.scorer import Scorer
from posttrain.rollout.types import Completion, Example, Prompt, Rollout, RolloutRequest, Sampling

FAULTY = str(Path(__file__).with_name("faulty_rewards.py"))


def completion(text: str, tokens: int | None = None) -> Completion:
    ids = tuple(range(len(text) if tokens is None else tokens))
    return Completion(ids, (0.0,) * len(ids), "stop", text)


def make_rollouts(
    texts: Sequence[str],
    answer: str | None = "42",
    group_size: int = 4,
    prompt: Prompt = "What?",
    **columns: Any,
) -> list[Rollout]:
    """One rollout for each text, in groups of equal size; every group is one example."""
    rollouts = []
    for at, text in enumerate(texts):
        group, index = divmod(at, group_size)
        example = Example(f"row-{group}", prompt, answer, columns)
        request = RolloutRequest((1,), example, f"group-{group}", Sampling(8, n=group_size))
        rollouts.append(Rollout(request, completion(text), index, 0))
    return rollouts


def make_scorer(
    *specs: str | dict[str, Any],
    workers: int = 2,
    say: Callable[[str], None] = print,
    check: Callable[[], None] = lambda: None,
    **options: Any,
) -> Scorer:
    """A scorer of rewards as a recipe would name them."""
    named = [{"name": spec} if isinstance(spec, str) else spec for spec in specs]
    return Scorer(
        [RewardSpec.model_validate(spec) for spec in named],
        RewardOptions(workers=workers, **options),
        say=say,
        check=check,
    )


def faulty(attribute: str, **spec: Any) -> dict[str, Any]:
    """A reward of `faulty_rewards.py`."""
    return {"name": f"{FAULTY}:{attribute}", **spec}
