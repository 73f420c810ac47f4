"""Write a commented starter recipe."""

from __future__ import annotations

import argparse
from pathlib import Path

import posttrain.recipe
from posttrain.errors import RecipeError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `posttrain init`."""
    parser.add_argument(
        "path", metavar="PATH", nargs="?", type=Path, default=Path("recipe.yaml"), help="default: recipe.yaml"
    )


def run(args: argparse.Namespace) -> None:
    """Write the file; one that is there already stays as it is."""
    starter = (Path(posttrain.recipe.__path__[0]) / "starter.yaml").read_text(encoding="utf-8")
    try:
        args.path.parent.mkdir(parents=True, exist_ok=True)
        with args.path.open("x", encoding="utf-8") as file:
            file.write(starter)
    except FileExistsError:
        raise RecipeError(f"{args.path} exists already and is not overwritten.") from None
    print(f"Wrote {args.path}. Next: posttrain plan {args.path}")
