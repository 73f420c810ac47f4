"""Recipe files → `LoadedRecipe`: `extends`, overrides, validation, and where each value comes from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from posttrain.errors import RecipeError
from posttrain.recipe.nodes import Node, Origin, Problem, Unreadable, is_plain_text, key_path, read_file
from posttrain.recipe.overrides import apply_overrides
from posttrain.recipe.problems import explain, find_secrets, show
from posttrain.recipe.schema import Recipe


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe and where it came from.

    `sources` has the origin of everything that is not a default, by key path (`stages[1].policy.steps`).
    """

    recipe: Recipe
    path: Path
    overrides: tuple[str, ...]
    sources: Mapping[str, Origin]

    def source(self, key: str) -> str:
        """`recipes/a.yaml:3:5`, `command line`, or `default`."""
        return str(self.sources[key]) if key in self.sources else "default"

    def origin(self, key: str) -> Origin:
        """Where to point at for a key: where it or the nearest mapping around it was set."""
        while key and key not in self.sources:
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return self.sources.get(key) or Origin(str(self.path), 1, 1)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe, its parents and the overrides.

    `extends` names one parent relative to the file it stands in; mappings are merged, everything else
    (lists included) replaces the parent's. Other paths in a recipe are relative to the working directory.

    Raises:
        RecipeError: with every problem found, one a line, in order of file and line.
    """
    files: list[str] = []
    try:
        root, problems = _read_layers(Path(path), str(path), files)
    except Unreadable as error:
        raise RecipeError(str(error.problem)) from None
    root, unusable = apply_overrides(root, overrides)
    secrets = find_secrets(root)
    problems += unusable + secrets
    recipe, complaints = _validate(root)
    # A place that already has a problem needs no second one, and a secret none that would show it.
    places = {problem.key for problem in problems if problem.key}
    problems += [problem for problem in complaints if problem.key not in places]
    if problems or recipe is None:
        raise RecipeError("\n".join(str(problem) for problem in _in_order(problems, files)))
    sources = {
        key_path(where): node.key_origin if isinstance(node.value, dict) else node.origin
        for where, node in root.walk()
        if where
    }
    # The short form of a reward, a name alone, sets the name.
    lists = [("rewards", recipe.rewards)] + [
        (f"stages[{index}].{spec.kind}.rewards", getattr(spec.config, "rewards", None) or [])
        for index, spec in enumerate(recipe.stages)
    ]
    names = [f"{key}[{index}]" for key, rewards in lists for index in range(len(rewards))]
    for key in names:
        sources.setdefault(f"{key}.name", sources[key])
    return LoadedRecipe(recipe, Path(path), tuple(overrides), sources)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain values, defaults included, under the names it has in a file.

    None is left out where it is the default, so that a stage has only the key of its kind.
    """
    return _section_to_dict(recipe)


def dump_recipe(recipe: Recipe) -> str:
    """YAML that loads back to the same recipe."""
    return yaml.dump(recipe_to_dict(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _read_layers(path: Path, name: str, files: list[str]) -> tuple[Node, list[Problem]]:
    """The tree of a file merged over its parents'; `files` collects the names, child first."""
    files.append(name)
    if not path.is_file():
        raise Unreadable(Problem(Origin(name), "", "there is no such recipe file."))
    root, problems = read_file(path, name)
    if not isinstance(root.value, dict):
        text = f"a recipe is a mapping of options; found {show(root)}."
        raise Unreadable(Problem(root.origin, "", text))
    entries = dict(root.value)
    extends = entries.pop("extends", None)
    root = replace(root, value=entries)
    if extends is None:
        return root, problems
    if not isinstance(extends.value, str):
        raise Unreadable(Problem(extends.origin, "extends", "should be the path of one parent recipe."))
    parent_name = os.path.normpath(Path(name).parent / extends.value)
    if parent_name in map(os.path.normpath, files):
        cycle = " → ".join([*files, parent_name])
        raise Unreadable(Problem(extends.origin, "extends", f"the recipes extend each other: {cycle}."))
    if not Path(parent_name).is_file():
        raise Unreadable(Problem(extends.origin, "extends", f"there is no file {parent_name}."))
    parent, parent_problems = _read_layers(Path(parent_name), parent_name, files)
    return _merge(parent, root), problems + parent_problems


def _merge(parent: Node, child: Node) -> Node:
    if not (isinstance(parent.value, dict) and isinstance(child.value, dict)):
        return child
    merged = dict(parent.value)
    for key, node in child.value.items():
        merged[key] = _merge(merged[key], node) if key in merged else node
    return replace(child, value=merged)


def _validate(root: Node) -> tuple[Recipe | None, list[Problem]]:
    try:
        # Strict and from JSON: text is no number and `no` is no boolean, but a list is a tuple.
        return Recipe.model_validate_json(json.dumps(root.plain()), strict=True), []
    except ValidationError as error:
        return None, explain(error, root)


def _in_order(problems: list[Problem], files: list[str]) -> list[Problem]:
    def place(problem: Problem) -> tuple[int, int, int]:
        origin = problem.origin
        layer = len(files) if origin.file is None else files.index(origin.file)
        return layer, origin.line, origin.column

    return sorted(dict.fromkeys(problems), key=place)


def _section_to_dict(section: BaseModel) -> dict[str, Any]:
    values = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if value is not None or field.default is not None:
            values[field.alias or name] = _to_plain(value)
    return values


def _to_plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return _section_to_dict(value)
    if isinstance(value, list | tuple):
        return [_to_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _to_plain(entry) for key, entry in value.items()}
    return value


class _Dumper(yaml.SafeDumper):
    """Quotes text that would be read as something else under YAML 1.1 or 1.2."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = None if is_plain_text(text) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
