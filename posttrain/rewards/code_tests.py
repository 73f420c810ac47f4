"""Tests of model-written programs: find the program, turn its tests into runs, judge the runs.

Nothing here runs a program; that is done by `posttrain.rewards.sandbox`.
"""

from __future__ import annotations

import json
import marshal
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.rewards.sandbox import Program, Result

TestKind = Literal["code", "call", "stdin"]

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})(.*)$", re.MULTILINE)
_PYTHON = ("python", "python3", "py")
_MORE_OUTPUT = 1 << 16
_MAX_VALUE = 1 << 20


@dataclass(frozen=True)
class CodeTest:
    """One test of a program.

    kind code: `given` is Python code that raises nothing after the program, such as `assert f(1) == 2`.
    kind call: `given` is an expression; its value after the program, as JSON, equals `expected`.
    kind stdin: the program reads `given` and writes `expected` (a text).
    """

    kind: TestKind
    given: str
    expected: Any = None


# --- the program ------------------------------------------------------------------------------------------


def extract_code(text: str) -> str | None:
    """The program of a completion, or None if it has none.

    Reasoning does not count: only the text after the last `</think>` is looked at, and a `<think>` that is
    not closed means that there is no program. Then the first of these that there is: the last fenced block
    marked as Python, the last block without a mark, the whole text. A last block that is not closed goes to
    the end of the text. Takes linear time.
    """
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    marked: str | None = None
    unmarked: str | None = None
    for language, code in _blocks(text):
        if language in _PYTHON:
            marked = code
        elif not language:
            unmarked = code
    code = next((code for code in (marked, unmarked) if code is not None), text)
    return code if code.strip() else None


def _blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of the fenced blocks of a Markdown text."""
    blocks: list[tuple[str, str]] = []
    opened: re.Match[str] | None = None
    for match in _FENCE.finditer(text):
        if opened is None:
            if "`" not in match[2]:  # otherwise it is code within a line
                opened = match
        elif match[1].startswith(opened[1]) and not match[2].strip():
            blocks.append((_language(opened[2]), text[opened.end() + 1 : match.start()]))
            opened = None
    if opened is not None:
        blocks.append((_language(opened[2]), text[opened.end() + 1 :]))
    return blocks


def _language(mark: str) -> str:
    words = mark.split()
    return words[0].lower() if words else ""


# --- the tests --------------------------------------------------------------------------------------------


def parse_tests(value: Any) -> list[CodeTest]:
    """The tests that a dataset column gives: Python code (one test), or a list, also as JSON text.

    An item of the list is Python code, `{"call": expression, "expected": JSON value}` or
    `{"input": text, "output": text}`. Instead of a list of the last kind, `{"inputs": […], "outputs": […]}`
    will do. Other keys must be empty: they may change what the test means.

    Raises:
        ValueError: it is something else; the message names the item.
    """
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = None
        value = parsed if isinstance(parsed, (list, dict)) else [value]
    if isinstance(value, Mapping) and _filled(value) == {"inputs", "outputs"}:
        pairs = zip(value["inputs"], value["outputs"], strict=True)
        value = [{"input": given, "output": expected} for given, expected in pairs]
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"the tests are neither code nor a list of tests: {str(value)[:100]!r}")
    return [_parse_test(number, item) for number, item in enumerate(value, 1)]


def _parse_test(number: int, item: Any) -> CodeTest:
    if isinstance(item, str):
        return CodeTest("code", item)
    if isinstance(item, Mapping):
        keys = _filled(item)
        if keys == {"input", "output"} and isinstance(item["input"], str) and isinstance(item["output"], str):
            return CodeTest("stdin", item["input"], item["output"])
        if keys - {"expected"} == {"call"} and "expected" in item and isinstance(item["call"], str):
            return CodeTest("call", item["call"], item["expected"])
    kinds = "neither Python code nor {call, expected} nor {input, output}"
    raise ValueError(f"test {number} is {kinds}: {str(item)[:100]!r}")


def _filled(item: Mapping[str, Any]) -> set[str]:
    """Keys with a value: tables have every key in every row."""
    return {key for key, value in item.items() if value is not None}


# --- runs -------------------------------------------------------------------------------------------------

_HARNESS = """
import json, marshal, os, sys

def run():
    code, kind, test, seal = marshal.load(sys.stdin.buffer)
    os.unlink("stdin")
    report = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    program = sys.modules["program"] = type(sys)("program")
    exec(compile(code, "program.py", "exec"), program.__dict__)
    answer = ""
    if kind == "call":
        answer = json.dumps(eval(compile(test, "test.py", "eval"), program.__dict__))
    else:
        exec(compile(test, "test.py", "exec"), program.__dict__)
    report.write(seal + answer)
    report.flush()
    os._exit(0)

run()
"""
"""Runs a program as a module (`__name__` is not "__main__") and then a test. What they print is dropped; only
a test that was reached and passed writes the seal, so that ending the process or printing is not passing."""


@dataclass(frozen=True)
class CodeRun:
    """A test and the program that decides it."""

    test: CodeTest
    program: Program
    seal: str

    @classmethod
    def of(cls, code: str, test: CodeTest) -> CodeRun:
        """The run of a model's program against a test."""
        seal = secrets.token_hex(16)
        if test.kind == "stdin":
            stdin = test.given.encode("utf-8", "replace")
            size = 2 * len(str(test.expected).encode("utf-8", "replace")) + _MORE_OUTPUT
            return cls(test, Program(code, stdin, size), seal)
        request = (code.encode("utf-8", "replace"), test.kind, test.given.encode("utf-8", "replace"), seal)
        return cls(test, Program(_HARNESS, marshal.dumps(request), _MAX_VALUE), seal)

    def passed(self, result: Result) -> bool:
        """Whether the program ended by itself with exit code 0, and the test is passed."""
        if result.status != "exited" or result.code != 0:
            return False
        output = result.stdout.decode("utf-8", "replace")
        if self.test.kind == "stdin":
            return same_output(output, self.test.expected)
        if not output.startswith(self.seal):
            return False
        if self.test.kind == "code":
            return True
        try:
            return same_value(json.loads(output.removeprefix(self.seal)), self.test.expected)
        except (ValueError, OverflowError, RecursionError):
            return False


def same_output(output: str, expected: str) -> bool:
    """Whether two texts are equal but for white space at the ends of lines and empty lines at the end."""
    return _lines(output) == _lines(expected)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def same_value(value: Any, expected: Any) -> bool:
    """Whether a JSON value equals the expected one.

    Numbers of which one is not whole are compared within 1e-6 of the larger (1e-9 near 0); lists and tuples
    by item, dictionaries by key as JSON has them, texts.
    """
    if isinstance(expected, (list, tuple)):
        return (
            isinstance(value, list) and len(value) == len(expected) and all(map(same_value, value, expected))
        )
    if isinstance(expected, Mapping):
        wanted = {str(key): item for key, item in expected.items()}
        return (
            isinstance(value, dict)
            and value.keys() == wanted.keys()
            and all(same_value(value[key], wanted[key]) for key in wanted)
        )
    if isinstance(value, float) or isinstance(expected, float):
        if not isinstance(value, (int, float)) or not isinstance(expected, (int, float)):
            return False
        return math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-9)
    return bool(value == expected)
