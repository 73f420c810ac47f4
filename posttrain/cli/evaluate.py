"""Run only the evaluate stages of a recipe, on the recipe's own model or on another."""

from __future__ import annotations

import argparse

from posttrain.cli.arguments import add_recipe
from posttrain.recipe.load import load_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `posttrain evaluate`."""
    add_recipe(parser)
    parser.add_argument(
        "--model", metavar="PATH", help="hub name or folder instead of the recipe's model.path"
    )


def run(args: argparse.Namespace) -> None:
    """Evaluate and say where the results are."""
    loaded = load_recipe(args.recipe, args.overrides)
    from posttrain.recipe.run import evaluate_model

    folder = evaluate_model(loaded, args.model or loaded.recipe.model.path)
    print(f"Results: {folder}")
