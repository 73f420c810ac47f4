"""The tools of a recipe: found, described to the policy, called.

A tool is a Python function with type hints and a docstring in Google's format; both become the JSON schema
that models are trained to read. What it returns is shown to the policy as text. What it raises is shown, too.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError, validate_call

from posttrain.errors import PosttrainError, RecipeError
from posttrain.methods.base import load_attribute
from posttrain.recipe.tools_schema import ToolsConfig, ToolSpec
from posttrain.redaction import redact
from posttrain.rollout.environment import Environment, Tool, ToolBox
from posttrain.rollout.tools_builtin import BUILTIN

Schema = dict[str, Any]

MAX_MESSAGE = 300
"""Characters of an exception's text that the policy sees."""


@dataclass(frozen=True)
class Outcome:
    """What a call or a step came to. `error` is one word (see `ToolCall`); `output` is the text to show, None
    where the environment ends the conversation.
    """

    output: str | None
    error: str | None = None
    seconds: float = 0.0


def environment_factory(config: ToolsConfig) -> Callable[[], Environment]:
    """What makes the environment of a conversation; tools alone are one object for all.

    Raises:
        RecipeError: a tool or the environment cannot be found or constructed.
    """
    if config.environment is None:
        box = ToolBox([load_tool(spec) for spec in config.use])
        return lambda: box
    kind = load_attribute(config.environment)
    try:
        inspect.signature(kind).bind(**config.environment_args)
    except TypeError as error:
        raise RecipeError(f"tools.environment {config.environment}: {error}") from None
    return lambda: kind(**config.environment_args)


def load_tool(spec: ToolSpec) -> Tool:
    """The function of a tool.

    Raises:
        RecipeError: there is none, or it does not take its arguments.
    """
    if spec.name not in BUILTIN and ":" not in spec.name:
        raise RecipeError(
            f"no tool is called {spec.name}; there are {', '.join(BUILTIN)}, and functions of your own as "
            "file.py:function"
        )
    made = BUILTIN.get(spec.name) or load_attribute(spec.name)
    if spec.name not in BUILTIN and not spec.args:
        tool = made
    else:
        try:
            inspect.signature(made).bind(**spec.args)
        except TypeError as error:
            raise RecipeError(f"tool {spec.name} does not take its args: {error}") from None
        tool = made(**spec.args)
    if not inspect.isroutine(tool):
        raise RecipeError(f"tool {spec.name} is a {type(tool).__name__}, not a function")
    return tool


def schemas_of(tools: Sequence[Tool]) -> list[Schema]:
    """The JSON schemas of tools, as chat templates take them.

    Raises:
        RecipeError: a tool lacks a docstring, a type hint or an argument's description; two have one name.
    """
    from transformers.utils import get_json_schema

    schemas = []
    for tool in tools:
        name = getattr(tool, "__name__", repr(tool))
        try:
            schemas.append(get_json_schema(tool))
        except Exception as error:  # its exceptions have no public name
            raise RecipeError(f"tool {name} cannot be described to a model: {error}") from None
    names = [schema["function"]["name"] for schema in schemas]
    if len(set(names)) < len(names):
        raise RecipeError(f"two tools have the same name: {', '.join(names)}")
    return schemas


def call_tool(tools: Sequence[Tool], name: str, arguments: Mapping[str, Any]) -> Outcome:
    """Call a tool with arguments that a model wrote; whatever it raises is an outcome."""
    tool = next((tool for tool in tools if tool.__name__ == name), None)
    if tool is None:
        known = ", ".join(tool.__name__ for tool in tools)
        return Outcome(f"Error: there is no tool {name!r}; there are: {known}", "unknown")
    try:
        inspect.signature(tool).bind(**arguments)
        return Outcome(to_text(_validated(tool)(**arguments)))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        return Outcome(f"Error: argument {place}: {problem['msg']}", "arguments")
    except TypeError as error:
        return Outcome(f"Error: {shorten(str(error), MAX_MESSAGE)}", "arguments")
    except Exception as error:
        return Outcome(f"Error: {shorten(describe(error), MAX_MESSAGE)}", "exception")


@functools.lru_cache(maxsize=64)
def _validated(tool: Tool) -> Callable[..., Any]:
    return validate_call(tool)


def describe(error: BaseException) -> str:
    """An exception in one line, without secrets; of our own the text alone."""
    text = redact(" ".join(str(error).split()))
    if isinstance(error, PosttrainError | ValueError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def to_text(value: Any) -> str:
    """What a tool returned, as the policy sees it: text as it is, all else as JSON where that is possible."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(value)


def shorten(text: str, length: int) -> str:
    """A text of at most `length` characters: of a longer one the middle is left out."""
    if len(text) <= length:
        return text
    half = max(length - 1, 0) // 2
    return f"{text[:half]}…{text[len(text) - (length - 1 - half) :]}"
