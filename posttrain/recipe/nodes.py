"""YAML text → a tree of values that know where they stand.

Reads YAML the 1.2 way (core schema): `1e-5` is a number, `yes`, `no`, `on` and `off` are text. Only plain
values are built, so a recipe cannot run code, and size, depth and aliases are bounded, so that it cannot
exhaust memory either.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 50
MAX_VALUES = 10_000
"""Values in one file with every alias written out."""

# libyaml composes about ten times as fast; wheels of PyYAML have it, a build from source may not.
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
_CORE_SCHEMA = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
_PATTERNS = {kind: re.compile(rf"(?:{pattern})\Z") for kind, pattern in _CORE_SCHEMA.items()}


@dataclass(frozen=True)
class Origin:
    """Where a value was set: a place in a file (1-based; line 0 is the file as a whole), or the command line
    when `file` is None.
    """

    file: str | None
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        if self.file is None:
            return "command line"
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


COMMAND_LINE = Origin(None)


@dataclass(frozen=True)
class Node:
    """A scalar, list or mapping and where it stands.

    `key_origin` is the place of the key in front of it (for list entries and the root: of the value).
    `size` counts the values in it, aliases written out.
    """

    value: bool | int | float | str | list[Node] | dict[str, Node] | None
    origin: Origin
    key_origin: Origin
    size: int = 1

    def plain(self) -> Any:
        """The value without origins."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def walk(self, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Node]]:
        """This node and every node in it, each with its path."""
        yield path, self
        if isinstance(self.value, dict):
            for key, child in self.value.items():
                yield from child.walk((*path, key))
        elif isinstance(self.value, list):
            for index, child in enumerate(self.value):
                yield from child.walk((*path, index))


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a recipe, where, and what to do about it."""

    origin: Origin
    key: str
    text: str

    def __str__(self) -> str:
        if self.key:
            return f"{self.origin}  {self.key}: {self.text}"
        whole_file = self.origin.file is not None and not self.origin.line
        return f"{self.origin}: {self.text}" if whole_file else f"{self.origin}  {self.text}"


class Unreadable(Exception):
    """A file or a command-line value that gives no tree at all."""

    def __init__(self, problem: Problem):
        super().__init__(str(problem))
        self.problem = problem


def key_path(path: tuple[str | int, ...]) -> str:
    """`("stages", 1, "policy")` → `stages[1].policy`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def read_file(path: Path, name: str) -> tuple[Node, list[Problem]]:
    """The tree of a YAML file, and what is wrong with it short of being unreadable.

    Raises:
        Unreadable: the file cannot be read, is too large, or is not YAML.
    """
    whole_file = Origin(name)
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Unreadable(Problem(whole_file, "", "the file is not UTF-8 text.")) from None
    if len(data) > MAX_BYTES:
        raise Unreadable(Problem(whole_file, "", f"the file has more than {MAX_BYTES // 1024} KiB."))
    return read_text(text, name)


def read_text(text: str, name: str | None) -> tuple[Node, list[Problem]]:
    """The tree of a YAML text; `name` is the file it came from, None for the command line.

    Raises:
        Unreadable: the text is not YAML, or exceeds the limits of depth and size.
    """
    reader = _Reader(text, name)
    try:
        return reader.document(), reader.problems
    except yaml.MarkedYAMLError as error:
        origin = reader.origin(error.problem_mark or error.context_mark)
        raise Unreadable(Problem(origin, "", f"not valid YAML: {_sentence(error)}")) from None
    except yaml.reader.ReaderError:
        origin = COMMAND_LINE if name is None else Origin(name, 1, 1)
        raise Unreadable(Problem(origin, "", "not valid YAML: it contains a control character.")) from None


class _Loader(_Base):
    """PyYAML's safe loader with the core schema for plain scalars."""

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}


for _kind, _pattern in _PATTERNS.items():
    _Loader.add_implicit_resolver(_TAG + _kind, _pattern, None)


class _Reader:
    """Builds nodes from parser events: unlike PyYAML's composer it bounds depth and alias expansion."""

    def __init__(self, text: str, name: str | None):
        self.loader = _Loader(text)
        self.name = name
        self.anchors: dict[str, Node] = {}
        self.problems: list[Problem] = []

    def origin(self, mark: Any) -> Origin:
        if self.name is None or mark is None:
            return COMMAND_LINE if self.name is None else Origin(self.name, 1, 1)
        return Origin(self.name, mark.line + 1, mark.column + 1)

    def fail(self, mark: Any, text: str) -> Unreadable:
        return Unreadable(Problem(self.origin(mark), "", text))

    def document(self) -> Node:
        self.loader.get_event()  # start of the stream
        event = self.loader.get_event()
        if isinstance(event, yaml.StreamEndEvent):
            start = self.origin(None)
            return Node(None, start, start)
        root = self.node(self.loader.get_event(), ())
        self.loader.get_event()  # end of the document
        event = self.loader.get_event()
        if not isinstance(event, yaml.StreamEndEvent):
            raise self.fail(event.start_mark, "a recipe is one YAML document; a second one begins here.")
        return root

    def node(self, event: Any, path: tuple[str | int, ...]) -> Node:
        origin = self.origin(event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                raise self.fail(
                    event.start_mark, f"alias *{event.anchor} is used before its anchor is complete."
                )
            return replace(self.anchors[event.anchor], origin=origin, key_origin=origin)
        if len(path) > MAX_DEPTH:
            raise self.fail(event.start_mark, f"nested more than {MAX_DEPTH} levels deep.")
        if isinstance(event, yaml.ScalarEvent):
            node = Node(self.scalar(event, path), origin, origin)
        else:
            value: Any = (
                self.mapping(path) if isinstance(event, yaml.MappingStartEvent) else self.sequence(path)
            )
            children = value.values() if isinstance(value, dict) else value
            node = Node(value, origin, origin, 1 + sum(child.size for child in children))
            self.check_tag(event, path, ("map", "seq"))
            if node.size > MAX_VALUES:
                raise self.fail(event.start_mark, f"more than {MAX_VALUES} values, aliases written out.")
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def sequence(self, path: tuple[str | int, ...]) -> list[Node]:
        entries: list[Node] = []
        while not isinstance(event := self.loader.get_event(), yaml.SequenceEndEvent):
            entries.append(self.node(event, (*path, len(entries))))
        return entries

    def mapping(self, path: tuple[str | int, ...]) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        while not isinstance(event := self.loader.get_event(), yaml.MappingEndEvent):
            key = self.node(event, (*path, "?"))
            name = str(key.value) if not isinstance(key.value, list | dict) else "?"
            value = self.node(self.loader.get_event(), (*path, name))
            if not isinstance(key.value, str | int) or isinstance(key.value, bool):
                kind = "number" if isinstance(key.value, int | float) else "value"
                text = f"the key should be text, found a {kind}. Put it in quotes."
                self.problems.append(Problem(key.origin, key_path((*path, name)), text))
            elif name in entries:
                first = entries[name].key_origin
                where = "given twice" if first.file is None else f"given twice, first in line {first.line}"
                self.problems.append(Problem(key.origin, key_path((*path, name)), f"{where}."))
            else:
                entries[name] = replace(value, key_origin=key.origin)
        return entries

    def scalar(self, event: Any, path: tuple[str | int, ...]) -> bool | int | float | str | None:
        if not self.check_tag(event, path, ("str", *_CORE_SCHEMA)):
            return None
        tag = event.tag
        if tag is None or tag == "!":
            tag = self.loader.resolve(yaml.ScalarNode, event.value, event.implicit)
        kind = tag.removeprefix(_TAG)
        # Python converts no integers of more than 4300 digits.
        if kind in _PATTERNS and (not _PATTERNS[kind].match(event.value) or len(event.value) > 1000):
            self.problems.append(
                Problem(self.origin(event.start_mark), key_path(path), f"not a valid !!{kind}.")
            )
            return None
        return parse_scalar(event.value, kind)

    def check_tag(self, event: Any, path: tuple[str | int, ...], kinds: tuple[str, ...]) -> bool:
        known = event.tag in (None, "!") or event.tag.removeprefix(_TAG) in kinds
        if not known:
            text = f"the tag {event.tag} is not allowed; a recipe holds plain values only."
            self.problems.append(Problem(self.origin(event.start_mark), key_path(path), text))
        return known


def parse_scalar(text: str, kind: str) -> bool | int | float | str | None:
    """The value of a scalar of a core-schema kind."""
    match kind:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        case "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        case _:
            return text


def is_plain_text(text: str) -> bool:
    """Whether an unquoted scalar reads back as this very text under the core schema."""
    return not any(pattern.match(text) for pattern in _PATTERNS.values())


def _sentence(error: yaml.MarkedYAMLError) -> str:
    # The parser's own snippet of the line is left out: it could show a secret.
    problem, start, end = error.problem or "cannot be parsed", error.context_mark, error.problem_mark
    hint = next((hint for part, hint in _HINTS.items() if part in problem), None)
    text = f"{problem} ({hint})" if hint else problem
    if error.context and start and end and start.line != end.line:
        text += f", {error.context} that begins in line {start.line + 1}"
    return f"{text}."


_HINTS = {
    "cannot start any token": "indent with spaces, not tabs; quote text that begins with a special character",
    "mapping values are not allowed": "quote text that contains ': ', and check the indentation",
}
