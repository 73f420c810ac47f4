"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from posttrain.recipe.library import find_recipe
from posttrain.recipe.load import LoadedRecipe, load_recipe
from posttrain.recipe.spelling import did_you_mean


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The recipe and the overrides behind it."""
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a recipe file, or the name of one in `posttrain recipes list`"
    )
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        default=[],
        help="set a value of the recipe, e.g. rollout.max_tokens=64 or stages.policy.steps=10",
    )


def load(args: argparse.Namespace, extra: Sequence[str] = ()) -> LoadedRecipe:
    """The recipe that the arguments name, with its overrides and `extra` ones.

    Raises:
        RecipeError: there is no such recipe, or it is not valid.
    """
    return load_recipe(find_recipe(args.recipe), [*args.overrides, *extra])


def one_of(words: Sequence[str]) -> Callable[[str], str]:
    """A type for argparse that allows certain words and suggests the nearest."""

    def check(word: str) -> str:
        if word not in words:
            hint = did_you_mean(word, words)
            raise argparse.ArgumentTypeError(f"should be one of {', '.join(words)}; found {word!r}.{hint}")
        return word

    return check
