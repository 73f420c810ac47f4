"""What may be wrong with the methods of a policy stage, found out without importing any of them."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from posttrain.recipe.schema import PolicyStage, Recipe
from posttrain.recipe.spelling import did_you_mean


def method_problems(recipe: Recipe, stage: PolicyStage, key: str) -> Iterator[tuple[str, str]]:
    """Keys and sentences about a stage's `methods`."""
    for index, (name, method) in enumerate(zip(stage.method_names, stage.methods, strict=True)):
        if name in stage.method_names[:index]:
            yield f"{key}.methods[{index}]", f"{name} is listed twice."
        else:
            yield from _entry_problems(recipe, stage, key, f"methods[{index}]", method)


def _entry_problems(
    recipe: Recipe, stage: PolicyStage, key: str, place: str, method: str | Mapping[str, dict[str, Any]]
) -> Iterator[tuple[str, str]]:
    """Keys and sentences about one entry: its name, options and company.

    Options are looked at where a method has them in a module of their own, `posttrain.recipe.NAME_schema`:
    `OPTIONS` is their class, and `problems(recipe, stage)`, if there is one, says what the method cannot be
    combined with, by keys of the stage or `tools`: other methods included, since which of them go together
    depends on their options.
    """
    name = method if isinstance(method, str) else next(iter(method))
    if (problem := _name_problem(name)) is not None:
        yield f"{key}.{place}", problem
        return
    module = f"posttrain.recipe.{name}_schema"
    if name not in builtin_methods() or importlib.util.find_spec(module) is None:
        return
    schema = importlib.import_module(module)
    if not hasattr(schema, "OPTIONS"):
        return
    try:
        schema.OPTIONS.model_validate({} if isinstance(method, str) else method[name])
    except ValidationError as error:
        for details in error.errors(include_url=False):
            where = ".".join(map(str, [key, place, name, *details["loc"]]))
            text = details["msg"].removeprefix("Value error, ")
            if details["type"] == "extra_forbidden":
                text = f"method {name} has no such option"
            yield where, f"{text}."
        return
    if hasattr(schema, "problems"):
        for where, text in schema.problems(recipe, stage):
            yield where if where == "tools" else f"{key}.{where}", text


def _name_problem(name: str) -> str | None:
    """What is wrong with a method's name; nothing of it is imported."""
    place, colon, attribute = name.rpartition(":")
    if colon and place.endswith(".py"):
        if not Path(place).is_file():
            return f"there is no file {place}."
        try:
            tree = ast.parse(Path(place).read_bytes())
        except (SyntaxError, ValueError) as error:
            return f"{place} is not valid Python: {error}."
        classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
        known = f"{place} defines no class {attribute}.{did_you_mean(attribute, classes)}"
        return None if attribute in classes else known
    if colon:
        # Only the top package is looked for: looking deeper would import it.
        missing = importlib.util.find_spec(place.partition(".")[0]) is None
        return f"there is no module {place}." if missing else None
    names = [*builtin_methods(), *(point.name for point in entry_points(group="posttrain.methods"))]
    if name in names:
        return None
    listed = f"there are: {', '.join(names)}" if names else "none is built in or installed"
    hint = did_you_mean(name, names)
    return f"no method is called {name}; {listed}.{hint} A class of your own is file.py:Class."


def builtin_methods() -> list[str]:
    """Names of the methods that come with posttrain: one module each."""
    import posttrain.methods

    folder = Path(posttrain.methods.__path__[0])
    return sorted(file.stem for file in folder.glob("*.py") if file.stem not in ("__init__", "base"))
