"""Dotted overrides: `rollout.max_tokens=64`, `stages[1].policy.steps=3`, `stages.policy.steps=3`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from posttrain.recipe.nodes import COMMAND_LINE, Node, Problem, Unreadable, key_path, read_text
from posttrain.recipe.problems import looks_secret
from posttrain.redaction import secret_in

_KEY = re.compile(r"[A-Za-z0-9_@-]+(\[[0-9]+\])*(\.[A-Za-z0-9_@-]+(\[[0-9]+\])*)*\Z")


def apply_overrides(root: Node, overrides: Sequence[str]) -> tuple[Node, list[Problem]]:
    """The tree with every override applied in order, and the ones that could not be.

    The value is read as YAML and replaces what was there, a list or a mapping included. An entry of a list
    is named by its index, or by its name or kind where only one entry has it.
    """
    problems: list[Problem] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not _KEY.match(key):
            secret = looks_secret(override) or secret_in(override) is not None
            shown = "an argument that looks like a secret" if secret else repr(override)
            problems.append(
                Problem(COMMAND_LINE, "", f"an override is written key.path=value; found {shown}.")
            )
            continue
        try:
            value, complaints = read_text(text, None)
            problems += [replace(found, key=key) for found in complaints]
            root = _set(root, _parts(key), value, ())
        except Unreadable as error:
            problems.append(replace(error.problem, key=error.problem.key or key))
    return root, problems


def _parts(key: str) -> list[str]:
    return key.replace("[", ".").replace("]", "").split(".")


def _set(node: Node, parts: list[str], value: Node, path: tuple[str | int, ...]) -> Node:
    """A copy of `node` with `value` at `parts` below it."""
    if not parts:
        return replace(value, key_origin=COMMAND_LINE)
    first, rest = parts[0], parts[1:]
    if isinstance(node.value, list):
        return _set_in_list(node, node.value, first, rest, value, path)
    if path == () and first == "extends":
        raise _fail("extends", "cannot be set on the command line.")
    if node.value is not None and not isinstance(node.value, dict):
        raise _fail(
            key_path((*path, first)), f"cannot be set: {key_path(path)} is a single value, not a mapping."
        )
    entries = dict(node.value or {})
    below = entries.get(first, Node(None, COMMAND_LINE, COMMAND_LINE))
    entries[first] = _set(below, rest, value, (*path, first))
    return replace(node, value=entries)


def _set_in_list(
    node: Node, entries: list[Node], first: str, rest: list[str], value: Node, path: tuple[str | int, ...]
) -> Node:
    if first.isdigit():
        index = int(first)
        if index >= len(entries):
            text = f"there is no entry {index}; {key_path(path)} has {len(entries)}, counted from 0."
            raise _fail(key_path((*path, index)), text)
    else:
        index = _find(entries, first, path)
        rest = _inside(entries[index], first, rest)
    entry = entries[index]
    if rest and isinstance(entry.value, str):
        entry, rest = _expand(entry, entry.value, rest, path)
    changed = _set(entry, rest, value, (*path, index))
    return replace(node, value=[*entries[:index], changed, *entries[index + 1 :]])


def _find(entries: list[Node], name: str, path: tuple[str | int, ...]) -> int:
    """Index of the one entry that has this name or kind."""
    found = [index for index, entry in enumerate(entries) if name in _names(entry)]
    if len(found) == 1:
        return found[0]
    key = key_path((*path, name))
    if found:
        which = " or ".join(key_path((*path, index)) for index in found)
        raise _fail(key, f"{len(found)} entries are called {name}; write {which}.")
    known = ", ".join(dict.fromkeys(word for entry in entries for word in _names(entry)))
    raise _fail(key, f"no entry is called {name}. There are: {known or 'none'}.")


def _names(entry: Node) -> list[str]:
    """What an entry can be called: itself, its `name`, or its only key and that one's `name`."""
    if isinstance(entry.value, str):
        return [entry.value]
    if not isinstance(entry.value, dict):
        return []
    inner = next(iter(entry.value.values())) if len(entry.value) == 1 else None
    own = list(entry.value) if inner is not None and "name" not in entry.value else []
    named = [entry, inner] if inner is not None else [entry]
    for node in named:
        name = node.value.get("name") if isinstance(node.value, dict) else None
        if name is not None and isinstance(name.value, str):
            own.append(name.value)
    return own


def _inside(entry: Node, name: str, rest: list[str]) -> list[str]:
    """`stages.policy.steps` means `stages[i].policy.steps`: step into an entry with a single key."""
    if isinstance(entry.value, dict) and len(entry.value) == 1 and "name" not in entry.value:
        return [next(iter(entry.value)), *rest]
    return rest


def _expand(entry: Node, name: str, rest: list[str], path: tuple[str | int, ...]) -> tuple[Node, list[str]]:
    """The long form of an entry that is only a name, so that options can be set in it, and the way there."""
    if path == ("rewards",):
        return replace(entry, value={"name": entry}), rest
    return replace(entry, value={name: Node({}, entry.origin, entry.key_origin)}), [name, *rest]


def _fail(key: str, text: str) -> Unreadable:
    return Unreadable(Problem(COMMAND_LINE, key, text))
