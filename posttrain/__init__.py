"""Post-training for reasoning models: one recipe file, one rollout engine, one reward registry.

The public names are imported when they are first used, so that `import posttrain` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from posttrain.errors import PosttrainError as PosttrainError
    from posttrain.recipe.load import LoadedRecipe as LoadedRecipe
    from posttrain.recipe.load import dump_recipe as dump_recipe
    from posttrain.recipe.load import load_recipe as load_recipe
    from posttrain.recipe.run import run_recipe as run_recipe
    from posttrain.recipe.schema import Recipe as Recipe
    from posttrain.rewards.model_reward import register_reward_model as register_reward_model
    from posttrain.rewards.registry import reward as reward
    from posttrain.rollout.engine import RolloutEngine as RolloutEngine
    from posttrain.rollout.types import Completion as Completion
    from posttrain.rollout.types import Example as Example
    from posttrain.rollout.types import Rollout as Rollout
    from posttrain.rollout.types import RolloutBatch as RolloutBatch
    from posttrain.rollout.types import RolloutRequest as RolloutRequest
    from posttrain.rollout.types import Sampling as Sampling

_PUBLIC = {
    "Completion": "posttrain.rollout.types",
    "Example": "posttrain.rollout.types",
    "LoadedRecipe": "posttrain.recipe.load",
    "PosttrainError": "posttrain.errors",
    "Recipe": "posttrain.recipe.schema",
    "Rollout": "posttrain.rollout.types",
    "RolloutBatch": "posttrain.rollout.types",
    "RolloutEngine": "posttrain.rollout.engine",
    "RolloutRequest": "posttrain.rollout.types",
    "Sampling": "posttrain.rollout.types",
    "dump_recipe": "posttrain.recipe.load",
    "load_recipe": "posttrain.recipe.load",
    "register_reward_model": "posttrain.rewards.model_reward",
    "reward": "posttrain.rewards.registry",
    "run_recipe": "posttrain.recipe.run",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
