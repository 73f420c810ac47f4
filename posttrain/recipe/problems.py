"""What is wrong with a recipe, in plain sentences that name the place."""

from __future__ import annotations

import os
import re
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from posttrain.recipe.fields import annotation_at, choices_of, explain_unknown
from posttrain.recipe.nodes import Node, Origin, Problem, key_path
from posttrain.recipe.spelling import did_you_mean
from posttrain.redaction import secrets_in

_SECRET_KEY = re.compile(
    r"(^|[_-])(api[_-]?key|pass(word|wd|phrase)|secrets?|(access|private|secret|subscription)[_-]?key"
    r"|credentials?|authorization|cookie|(hf|hub|auth|access|api|bearer|wandb)[_-]token)$|^token$",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{16,}|\bAKIA[A-Z0-9]{12,}"
    r"|\bxox[abprs]-[A-Za-z0-9-]{10,}|\bglpat-[A-Za-z0-9_-]{16,}|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}"
    r"|PRIVATE KEY-----|\b(Bearer|Basic) [A-Za-z0-9+/=._~-]{12,}|://[^/\s:@]*:[^/\s@]+@"
    r"|[?&](api[_-]?key|key|token|access_token|sig|signature|secret|password)=[^&\s]{8,}"
)
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "string": "text",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "model": "a mapping of options",
}
_BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def looks_secret(text: str) -> bool:
    """Whether a text has the shape of an access key or of a URL with a password."""
    return _SECRET_VALUE.search(text) is not None


def find_secrets(root: Node) -> list[Problem]:
    """Values that must come from the environment. Their text is never shown."""
    problems = []
    known = secrets_in(os.environ)
    for path, node in root.walk():
        if not path or node.value is None or isinstance(node.value, dict | list):
            continue
        name = next((part for part in reversed(path) if isinstance(part, str)), "")
        value = node.value if isinstance(node.value, str) else ""
        variable = next((variable for secret, variable in known.items() if secret in value), None)
        if variable is not None:
            text = f"holds the value of the environment variable {variable}. A recipe must not: take it out."
        elif _SECRET_KEY.search(name) or looks_secret(value):
            text = "looks like a secret. Take it out and set it as an environment variable instead."
        else:
            continue
        problems.append(Problem(node.key_origin, key_path(path), text))
    return problems


def explain(error: ValidationError, root: Node) -> list[Problem]:
    """One problem per place that pydantic complains about.

    A field with alternatives (`str | list[str]`) gives one complaint per alternative: those about the same
    place are joined, and one about something deeper (an alternative that nearly fits) wins.
    """
    complaints: dict[tuple[str | int, ...], tuple[Origin, list[str]]] = {}
    for details in error.errors(include_url=False):
        path, node, origin = _locate(details, root)
        complaints.setdefault(path, (origin, []))[1].append(_sentence(details, path, node))
    return [
        Problem(origin, key_path(path), _join(texts))
        for path, (origin, texts) in complaints.items()
        if not (
            texts[0].endswith("found a mapping.") and any(p[: len(path)] == path != p for p in complaints)
        )
    ]


def _locate(details: ErrorDetails, root: Node) -> tuple[tuple[str | int, ...], Node, Origin]:
    """Path, nearest node and place to point at.

    Parts of pydantic's location that the recipe does not have are names of alternatives, or at the end a
    missing key.
    """
    path: tuple[str | int, ...] = ()
    node = root
    for part in details["loc"]:
        if isinstance(node.value, dict) and part in node.value:
            node = node.value[str(part)]
        elif isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
        else:
            continue
        path = (*path, part)
    missing = details["loc"][-1] if details["type"] == "missing" else None
    if isinstance(missing, str):
        return (*path, missing), node, node.key_origin
    about_key = details["type"] in ("extra_forbidden", "value_error") or isinstance(node.value, dict)
    return path, node, node.key_origin if about_key else node.origin


def _sentence(details: ErrorDetails, path: tuple[str | int, ...], node: Node) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind == "extra_forbidden":
        return explain_unknown(path)
    if kind == "missing":
        return "required, but missing." if isinstance(details["loc"][-1], str) else "has too few entries."
    if kind == "value_error":
        return str(context["error"]).removesuffix(".") + "."
    if kind in _BOUNDS:
        words, name = _BOUNDS[kind]
        return f"should be {words} {context[name]:g}, found {show(node)}."
    if kind == "too_short":
        return "needs at least one entry."
    if kind == "too_long":
        return f"has too many entries; the most is {context['max_length']}."
    if kind == "string_pattern_mismatch":
        form = "letters, digits, '.', '_' and '-', and begin with a letter or digit"
        return f"should have only {form}; found {show(node)}."
    if kind == "literal_error":
        choices = choices_of(annotation_at(path))
        hint = did_you_mean(str(node.value), choices)
        return f"should be one of {', '.join(choices)}; found {show(node)}.{hint}"
    expected = _KINDS.get(kind.split("_")[0])
    if expected is None:
        return details["msg"].replace("Input should", "should") + "."
    return f"should be {expected}, found {show(node)}."


def _join(texts: list[str]) -> str:
    """`should be text, found 3.` + `should be a list, found 3.` → `should be text or a list, found 3.`"""
    parts = [re.fullmatch(r"should be (.*), found (.*)\.", text) for text in dict.fromkeys(texts)]
    if len(parts) > 1 and all(parts):
        kinds = " or ".join(part[1] for part in parts if part)
        return f"should be {kinds}, found {parts[0][2]}."  # type: ignore[index]
    return next(iter(texts))


def show(node: Node) -> str:
    """A value as it is quoted in a message."""
    value: Any = node.value
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "…")
    if value is None:
        return "nothing"
    return str(value).lower() if isinstance(value, bool) else str(value)
