"""Pages of the documentation site that are made when it is built: mkdocs calls the hooks at the end.

The schema's keys are described by the texts under its fields, the commands by their own help, the Python
interface by its docstrings (mkdocstrings); so none of them can differ from what the code does.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from posttrain.cli import COMMANDS, Parser
from posttrain.methods.base import NoOptions, find_method
from posttrain.recipe.check_methods import builtin_methods
from posttrain.recipe.fields import container_of, section_of
from posttrain.recipe.library import FOLDER, library
from posttrain.recipe.schema import Recipe
from posttrain.rewards.registry import known_rewards

ROOT = Path(__file__).parent.parent
PUBLIC = {
    "Run a recipe": ("recipe.load", "recipe.run", "errors"),
    "What flows": ("rollout.types", "data.sources"),
    "Rewards": ("rewards.registry", "rewards.scorer", "rewards.model_reward"),
    "Methods": ("methods.base",),
    "Engines": ("rollout.engine", "rollout.build", "rollout.environment"),
    "Training": ("training.advantages", "training.losses"),
    "Forecasts, and decoding with them": ("zip_rc.grid", "zip_rc.sampler"),
}  # fmt: skip
"""Modules of the Python reference, by heading."""


# --- the schema -------------------------------------------------------------------------------------------


@cache
def documented(section: type[BaseModel]) -> dict[str, str]:
    """The text under each field of a section, those of its parents included."""
    texts: dict[str, str] = {}
    for kind in reversed(section.__mro__):
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)) or kind is BaseModel:
            continue
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(node, ast.ClassDef)
        for field, below in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                texts[field.target.id] = inspect.cleandoc(below.value.value) if is_text else ""
    return texts


def type_words(annotation: Any, page: str = "") -> str:
    """A field's type as a recipe's reader would say it. `page` has the sections that are on another page."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(type_words(part, page) for part in parts))
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin is list:
        return f"list of {type_words(parts[0], page)}"
    if origin is dict:
        return f"mapping of {type_words(parts[0])} to {type_words(parts[1], page)}"
    if origin is tuple:
        return "[" + ", ".join(type_words(part) for part in parts if part is not ...) + "]"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        place = page if annotation in of_recipes() else ""
        return f"[{annotation.__name__}]({place}#{anchor(annotation)})"
    words = {str: "text", int: "whole number", float: "number", bool: "true or false", NoneType: "null"}
    return words.get(annotation, "anything" if annotation is Any else str(annotation))


def default_words(field: Any) -> str:
    """A field's default; a section's are in its own table."""
    value = field.default if field.default_factory is None else field.default_factory()
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return "see there"
    if value == "":
        return "empty"
    if isinstance(value, str):
        return f"`{value!r}`" if value.strip() and "`" not in value and len(value) < 60 else "a text"
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else str(value)
    return f"`{text}`" if len(text) < 60 else "see the source"


def anchor(section: type[BaseModel]) -> str:
    """The name of a section's heading in links."""
    return section.__name__.lower()


def cell(text: str) -> str:
    """A text in a cell of a table."""
    escaped = text.replace("|", "\\|").replace("<", "&lt;").replace("{{", "{ {")
    return " ".join(escaped.split())


def section_text(section: type[BaseModel], where: str, page: str = "") -> str:
    """Heading, purpose and table of a section; `page` as for `type_words`."""
    texts = documented(section)
    rows = []
    for name, field in section.model_fields.items():
        key = field.alias or name
        about = texts.get(name) or ""
        nested = section_of(field.annotation)
        if not about and nested is not None:
            about = (inspect.getdoc(nested) or "").partition("\n\n")[0]
        kind, default = cell(type_words(field.annotation, page)), cell(default_words(field))
        rows.append(f"| `{key}` | {kind} | {default} | {cell(about)} |")
    purpose = inspect.getdoc(section) or ""
    head = f"## {section.__name__} {{ #{anchor(section)} }}\n\n`{where}`\n\n{purpose}\n\n"
    return head + "| key | type | default | |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def sections(root: type[BaseModel], where: str) -> Iterator[tuple[type[BaseModel], str]]:
    """A section and all below it, each once, with the place where a recipe has it."""
    seen: dict[type[BaseModel], str] = {}

    def visit(section: type[BaseModel], place: str) -> None:
        if section in seen:
            return
        seen[section] = place
        for name, field in section.model_fields.items():
            for nested in models_in(field.annotation):
                many = get_origin(container_of(field.annotation))
                mark = "[]" if many is list else ".NAME" if many is dict else ""
                visit(nested, f"{place}.{field.alias or name}{mark}".removeprefix("."))

    visit(root, where)
    yield from seen.items()


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """All sections in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


@cache
def of_recipes() -> frozenset[type[BaseModel]]:
    """The sections that recipes have outside of methods' options."""
    return frozenset(section for section, _ in sections(Recipe, ""))


def recipe_page() -> str:
    """Every key that a recipe may have."""
    head = (
        "# The recipe, key by key\n\n"
        "A recipe is a YAML file with the keys of [Recipe](#recipe). Unknown keys are errors. "
        "`extends: FILE` names one parent, whose mappings are merged with this file's; lists replace. Any "
        "value can be set on the command line: `posttrain train my.yaml stages.policy.steps=10`.\n\n"
    )
    return head + "\n".join(
        section_text(section, where or "the file") for section, where in sections(Recipe, "")
    )


def methods_page() -> str:
    """The options of every built-in method."""
    parts = ["# Options of methods\n\nEntries of `methods` in a [policy stage](recipe.md#policystage).\n"]
    shown = {NoOptions, *of_recipes()}
    for name in builtin_methods():
        options = find_method(name).Config
        for section, where in sections(options, f"methods[].{name}"):
            if section not in shown:
                shown.add(section)
                parts.append(section_text(section, where, "recipe.md"))
    return "\n".join(parts)


# --- commands, rewards, recipes, Python -------------------------------------------------------------------


def commands_page() -> str:
    """The help of every command, as it prints it."""
    parts = ["# Commands\n\n`posttrain COMMAND --help` prints the same.\n"]
    for name, purpose in COMMANDS.items():
        command = importlib.import_module(f"posttrain.cli.{name}")
        parser = Parser(
            prog=f"posttrain {name}",
            description=command.__doc__,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100),
        )
        command.add_arguments(parser)
        head = f"## posttrain {name}\n\n{purpose[0].upper()}{purpose[1:]}.\n\n"
        parts.append(f"{head}```text\n{parser.format_help()}```\n")
    return "\n".join(parts)


def rewards_page() -> str:
    """The built-in rewards."""
    rows = ["# Rewards that come with it\n", "`posttrain rewards list` prints the same.\n"]
    rows += ["| name | range | deterministic | |", "|---|---|---|---|"]
    for name, info in sorted(known_rewards().items()):
        bounds = "any" if info.range is None else f"{info.range[0]:g} to {info.range[1]:g}"
        rows.append(f"| `{name}` | {bounds} | {'yes' if info.deterministic else 'no'} | {cell(info.doc)} |")
    return "\n".join(rows) + "\n"


def recipes_page() -> str:
    """The library of recipes, with links to the files."""
    rows = ["# Recipes that come with it\n", "`posttrain recipes copy NAME` takes one home.\n"]
    rows += ["| recipe | |", "|---|---|"]
    for recipe in library():
        rows.append(f"| [{recipe.name}](../recipes/{recipe.name}.yaml) | {cell(recipe.description)} |")
    return "\n".join(rows) + "\n"


def python_page() -> str:
    """The modules that programs, rewards, methods and engines of users build on."""
    parts = ["# Python\n\n`from posttrain import …` has the names that most programs need.\n"]
    for heading, modules in PUBLIC.items():
        parts.append(f"## {heading}\n")
        parts += [f"::: posttrain.{module}\n" for module in modules]
    return "\n".join(parts)


def pages() -> dict[str, str]:
    """Path and content of every page that is made."""
    made = {
        "reference/recipe.md": recipe_page(),
        "reference/methods.md": methods_page(),
        "reference/commands.md": commands_page(),
        "reference/rewards.md": rewards_page(),
        "reference/recipes.md": recipes_page(),
        "reference/python.md": python_page(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(),
    }
    for folder in (FOLDER, ROOT / "examples"):
        for path in folder.rglob("*"):
            if path.suffix in (".yaml", ".py"):
                made[f"{folder.name}/{path.relative_to(folder).as_posix()}"] = path.read_text()
    return made


# --- hooks of mkdocs --------------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made."""
    from mkdocs.structure.files import File

    for path, content in pages().items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links that are right in the repository, made right in the site."""
    if page.file.src_uri.startswith("reference/"):
        return markdown
    markdown = re.sub(r"\]\(\.\./(recipes|examples)/", r"](\1/", markdown)
    return re.sub(r"\]\(docs/", "](", markdown)
