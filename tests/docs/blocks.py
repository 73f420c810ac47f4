"""The fenced blocks of the documentation, and what the comments above them say about testing them.

A comment `<!-- test: WORDS -->` right above a block says what cannot be told from the block itself:

    run [KEY=VALUE …]       bash: run it; values that make `posttrain train` small enough for a test
    run fails               bash: the command is refused
    run with forecasts      bash: run it beside a folder `foreseeing`, a model with forecasts
    run with a run          bash: run it beside the finished run `runs/first`
    output                  what the last block that was run printed, numbers aside
    output of the quickstart
    folder PATH             a listing of that folder
    layout                  the tree of the repository
    asserted by FILE        text that a test in that file looks for
    with THING              python: executed with what `test_docs.given` has under that name
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
AT_THE_ROOT = {
    "quickstart took ": "output of the quickstart",
    "my.yaml:": "mistake of the recipe",
    "runs/my-run/": "folder runs/first",
    "posttrain/\n": "layout",
}
"""What the comments would say, by the beginning of the block, on pages that are mostly read as text."""

_FENCE = re.compile(
    r"(?:^<!-- test: (?P<test>[^\n]*?) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the line of its fence, its language, its text and the comment above it."""

    page: Path
    line: int
    language: str
    code: str
    test: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def file(self) -> str:
        """The name in a first line such as `# my_rewards.py`; empty without one."""
        found = re.match(r"# ([\w-]+\.(?:py|yaml))(?:, [^\n]*)?\n", self.code)
        return found[1] if found else ""

    @property
    def continues(self) -> bool:
        """Whether it is a later part of its file: `# my_rewards.py, further down`."""
        return bool(self.file) and not self.code.startswith(f"# {self.file}\n")


def blocks_of(page: Path) -> Iterator[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text()
    for found in _FENCE.finditer(text):
        code = "".join(line.removeprefix(found["indent"]) for line in found["code"].splitlines(keepends=True))
        start = found.start("code")
        test = found["test"] or ""
        if page.parent == ROOT:
            test = next((words for start_, words in AT_THE_ROOT.items() if code.startswith(start_)), "")
        yield Block(page, text.count("\n", 0, start), found["language"], code, test)


def fences(page: Path) -> int:
    """Lines that open or close a block."""
    return len(re.findall(r"^ *```", page.read_text(), re.MULTILINE))


def alternatives(code: str) -> list[str]:
    """A fragment that has a key of its top level several times shows alternatives: one fragment for each."""
    parts: list[list[str]] = []
    seen: set[str] = set()
    for line in code.splitlines(keepends=True):
        key = re.match(r"([A-Za-z_]+):", line)
        if (key and key[1] in seen) or not parts:
            seen = set()
            parts.append([])
        if key:
            seen.add(key[1])
        parts[-1].append(line)
    return ["".join(lines) for lines in parts]


def commands(code: str) -> list[str]:
    """The commands of a block, one line each: continued lines are joined, here-documents left out."""
    joined = re.sub(r"^.*<<'END'$.*?^END$", "", code, flags=re.DOTALL | re.MULTILINE).replace("\\\n", " ")
    lines = [line.strip() for line in joined.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]
