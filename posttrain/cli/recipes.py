"""The recipes that come with posttrain.

list           names and descriptions
show NAME      print a recipe
copy NAME [TO] copy a recipe, and what it extends, to change it
"""

from __future__ import annotations

import argparse
from pathlib import Path

from posttrain.cli.arguments import one_of
from posttrain.errors import RecipeError
from posttrain.recipe.library import find_in_library, library, parents


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `posttrain recipes`."""
    actions = ("list", "show", "copy")
    parser.add_argument("action", metavar="list|show|copy", type=one_of(actions))
    parser.add_argument("name", metavar="NAME", nargs="?", help="name of a recipe, as `list` shows it")
    parser.add_argument(
        "to", metavar="TO", nargs="?", type=Path, help="file to write (default: NAME.yaml here)"
    )


def run(args: argparse.Namespace) -> None:
    """List, show or copy."""
    if args.action == "list":
        recipes = library()
        width = max((len(recipe.name) for recipe in recipes), default=0)
        for recipe in recipes:
            print(f"{recipe.name:<{width}}  {recipe.description}".rstrip())
        return
    if args.name is None:
        raise RecipeError(
            f"posttrain recipes {args.action}: NAME is missing; `posttrain recipes list` has them."
        )
    recipe = find_in_library(args.name)
    if args.action == "show":
        print(recipe.path.read_text(encoding="utf-8"), end="")
        return
    for path in copy_recipe(recipe.path, args.to or Path(recipe.path.name)):
        print(f"Wrote {path}")


def copy_recipe(source: Path, target: Path) -> list[Path]:
    """Copy a recipe and the files it extends, which keep their place relative to it.

    Raises:
        RecipeError: a file is there already; then nothing is written.
    """
    copies = [(source, target)]
    for extends in parents(source):
        before, after = copies[-1]
        copies.append((before.parent / extends, after.parent / extends))
    for _, path in copies:
        if path.exists():
            raise RecipeError(f"{path} exists already and is not overwritten.")
    for before, after in copies:
        after.parent.mkdir(parents=True, exist_ok=True)
        after.write_text(before.read_text(encoding="utf-8"), encoding="utf-8")
    return [path for _, path in copies]
