"""The recipes that come with posttrain, and finding one by name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import posttrain
from posttrain.errors import RecipeError
from posttrain.recipe.nodes import Node, Unreadable, read_file
from posttrain.recipe.spelling import did_you_mean

_PACKAGE = Path(posttrain.__path__[0])
# In a wheel the recipes are inside the package, in a clone beside it.
FOLDER = next(
    folder for folder in (_PACKAGE / "_share" / "recipes", _PACKAGE.parent / "recipes") if folder.is_dir()
)


@dataclass(frozen=True)
class LibraryRecipe:
    """A recipe of the library: its name is its path there without `.yaml`."""

    name: str
    path: Path
    description: str


def library() -> list[LibraryRecipe]:
    """All recipes of the library, by name. Other YAML files in the folder (accelerate's) are left out."""
    found = []
    for path in sorted(FOLDER.rglob("*.yaml")):
        entries = _entries(path)
        if "stages" in entries or "extends" in entries:
            name = path.relative_to(FOLDER).with_suffix("").as_posix()
            description = entries["description"].value if "description" in entries else ""
            found.append(LibraryRecipe(name, path, str(description)))
    return found


def find_in_library(name: str) -> LibraryRecipe:
    """The library's recipe of this name; the last part of the name is enough where it is unique.

    Raises:
        RecipeError: there is none, or there are several.
    """
    recipes = library()
    wanted = name.removesuffix(".yaml")
    exact = [recipe for recipe in recipes if recipe.name == wanted]
    found = exact or [recipe for recipe in recipes if recipe.path.stem == wanted]
    if len(found) == 1:
        return found[0]
    names = [recipe.name for recipe in recipes]
    if found:
        raise RecipeError(f"{name}: {len(found)} recipes are called so: {', '.join(r.name for r in found)}.")
    short = [recipe.path.stem for recipe in recipes]
    raise RecipeError(f"{name}: there is no such recipe.{did_you_mean(wanted, [*names, *short])}")


def find_recipe(name: str) -> str:
    """Path of the recipe that an argument names: a file, else a recipe of the library.

    Raises:
        RecipeError: neither a file nor a recipe of the library.
    """
    if Path(name).exists():
        return name
    path = find_in_library(name).path
    # Messages name the file: shorter when it is below the working directory.
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def parents(path: Path) -> list[str]:
    """The chain of `extends` of a file, each as it is written, relative to the file before."""
    chain = []
    while (extends := _entries(path).get("extends")) is not None and isinstance(extends.value, str):
        chain.append(extends.value)
        path = path.parent / extends.value
    return chain


def _entries(path: Path) -> dict[str, Node]:
    try:
        root, _ = read_file(path, str(path))
    except Unreadable as error:
        raise RecipeError(str(error)) from None
    return root.value if isinstance(root.value, dict) else {}
