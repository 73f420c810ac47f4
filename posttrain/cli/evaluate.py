"""Run only the last evaluate stage of a recipe, on the recipe's own model or on another."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from posttrain.cli.arguments import add_recipe, load
from posttrain.recipe.check import require_runnable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `posttrain evaluate`."""
    add_recipe(parser)
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="hub name or folder of a model, or of an adapter for the recipe's",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results of the same name")


def run(args: argparse.Namespace) -> None:
    """Evaluate and say where the results are."""
    loaded = load(args, [] if args.model is None else [model_override(args.model)])
    require_runnable(loaded, kinds=["evaluate"])
    from posttrain.recipe.run import evaluate_model

    folder = evaluate_model(loaded, overwrite=args.overwrite)
    print(f"Results: {folder}")


def model_override(path: str) -> str:
    """The recipe value that `--model` replaces: an adapter goes on top of the recipe's model."""
    key = "adapter" if (Path(path) / "adapter_config.json").is_file() else "path"
    return f"model.{key}={json.dumps(path)}"
