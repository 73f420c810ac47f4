"""Run only the evaluate stages of a recipe, on the recipe's own model or on another."""

from __future__ import annotations

import argparse
import json

from posttrain.cli.arguments import add_recipe, load
from posttrain.recipe.check import require_runnable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `posttrain evaluate`."""
    add_recipe(parser)
    parser.add_argument(
        "--model", metavar="PATH", help="hub name or folder instead of the recipe's model.path"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results of the same name")


def run(args: argparse.Namespace) -> None:
    """Evaluate and say where the results are."""
    loaded = load(args, [] if args.model is None else [f"model.path={json.dumps(args.model)}"])
    require_runnable(loaded, kinds=["evaluate"])
    from posttrain.recipe.run import evaluate_model

    folder = evaluate_model(loaded, loaded.recipe.model.path, overwrite=args.overwrite)
    print(f"Results: {folder}")
