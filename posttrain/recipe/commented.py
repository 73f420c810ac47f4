"""Writing a recipe for people: plain values, some with a comment on their line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from posttrain.recipe.nodes import is_plain_text

_SIMPLE = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./@-]*")

_YAML_1_1 = ("yes", "no", "on", "off", "y", "n")
"""Other readers of YAML take these for true and false."""


@dataclass(frozen=True)
class Commented:
    """A value and what is written beside it."""

    value: Any
    comment: str


def plain(tree: Any) -> Any:
    """The values alone."""
    if isinstance(tree, Commented):
        return plain(tree.value)
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    return [plain(value) for value in tree] if isinstance(tree, list) else tree


def to_yaml(tree: dict[str, Any]) -> str:
    """YAML of a mapping; every section of the top level is set off by an empty line."""
    blocks: list[str] = []
    for key, value in tree.items():
        lines = list(_entry(key, value, 0))
        apart = len(lines) > 1 and blocks
        blocks.append(("\n" if apart else "") + "\n".join(lines))
    return "\n".join(blocks) + "\n"


def _entry(key: str, value: Any, depth: int) -> Iterator[str]:
    pad, comment = "  " * depth, ""
    if isinstance(value, Commented):
        value, comment = value.value, "  # " + " ".join(value.comment.split())
    if isinstance(value, dict) and value:
        yield f"{pad}{key}:{comment}"
        for name, child in value.items():
            yield from _entry(name, child, depth + 1)
    elif isinstance(value, list) and any(isinstance(child, dict | Commented) for child in value):
        yield f"{pad}{key}:{comment}"
        for child in value:
            yield from _item(child, depth + 1)
    else:
        yield f"{pad}{key}: {_flow(value)}{comment}"


def _item(value: Any, depth: int) -> Iterator[str]:
    """An entry of a list: its first line after a dash, the others below it."""
    pad = "  " * depth
    if not isinstance(value, dict):
        comment = f"  # {' '.join(value.comment.split())}" if isinstance(value, Commented) else ""
        yield f"{pad}- {_flow(plain(value))}{comment}"
        return
    lines = [line for name, child in value.items() for line in _entry(name, child, depth + 1)]
    yield f"{pad}- {lines[0].lstrip()}"
    yield from lines[1:]


def _flow(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(child)}" for key, child in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str) and _SIMPLE.fullmatch(value) and is_plain_text(value):
        return json.dumps(value) if value.lower() in _YAML_1_1 else value
    return json.dumps(value, ensure_ascii=False)
