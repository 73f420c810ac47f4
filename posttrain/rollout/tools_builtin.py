"""The tools that come with posttrain: calculator, python, search. Functions of their options make them."""

from __future__ import annotations

import ast
import json
import math
import operator
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from posttrain.errors import RecipeError
from posttrain.rewards.sandbox import Isolation, Limits, Program, Sandbox

MAX_EXPRESSION = 200
"""Characters."""
MAX_BITS = 4096
"""Size of the integers a calculator works with."""
MAX_QUERY = 1000
"""Characters of a query that count."""

Number = int | float


def make_calculator(digits: int = 12) -> Callable[..., str]:
    """A calculator; results that are no integers have `digits` significant digits."""

    def calculator(expression: str) -> str:
        """Evaluate an arithmetic expression.

        Args:
            expression: Numbers with + - * / // % ** and parentheses, and abs, min, max, round, sqrt.
        """
        value = evaluate(expression)
        if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
            value = int(value)
        return str(value) if isinstance(value, int) else f"{value:.{digits}g}"

    return calculator


def evaluate(expression: str) -> Number:
    """The value of an arithmetic expression, read with Python's grammar and never executed.

    Raises:
        ValueError: it is none, or it is too long or too large.
    """
    if len(expression) > MAX_EXPRESSION:
        raise ValueError(f"an expression has at most {MAX_EXPRESSION} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        return _value(tree.body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"not an arithmetic expression: {expression.strip()!r}") from None
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except OverflowError:
        raise ValueError("the result is too large") from None


_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[..., Number]] = {
    "abs": abs,
    "min": min,
    "max": max,
    "round": round,
    "sqrt": math.sqrt,
}


def _value(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _bounded(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _bounded(_BINARY[type(op)](_value(left), _value(right)))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            try:
                return _bounded(_FUNCTIONS[name](*map(_value, arguments)))
            except TypeError:
                raise ValueError(f"{name} does not take {len(arguments)} such numbers") from None
    raise ValueError(f"a calculator cannot evaluate {ast.unparse(node)!r}")


def _power(base: Number, exponent: Number) -> Number:
    whole = isinstance(base, int) and isinstance(exponent, int) and exponent > 0
    if whole and int(base).bit_length() * exponent > MAX_BITS:
        raise OverflowError
    value = base**exponent
    if isinstance(value, complex):
        raise ValueError("the result is not a real number")
    return _bounded(value)


def _bounded(value: Number) -> Number:
    too_large = value.bit_length() > MAX_BITS if isinstance(value, int) else not math.isfinite(value)
    if too_large:
        raise OverflowError
    return value


def make_python(
    seconds: float = 10.0, memory_mib: int = 512, isolation: Isolation = "required"
) -> Callable[..., str]:
    """A Python interpreter in the sandbox of `posttrain.rewards.sandbox`: every call starts from nothing.

    Raises:
        RewardError: isolation is required and the machine does not allow it.
    """
    sandbox = Sandbox(isolation, Limits(seconds, seconds, memory_mib))

    def python(code: str) -> str:
        """Run a Python program and return what it prints. Variables are not kept between calls.

        Args:
            code: The program. Only the standard library is there; print what you want to see.
        """
        (result,) = sandbox.run([Program(code)])
        output = result.stdout.decode("utf-8", "replace")
        if result.status == "timeout":
            return f"{output}\nError: stopped after {seconds:g} s"
        if result.status == "output":
            return f"{output}\nError: stopped, it printed too much"
        if result.code != 0:
            return f"{output}\nError: {result.stderr.strip()[-1000:] or f'exit code {result.code}'}".lstrip()
        return output or "(nothing was printed)"

    return python


def make_search(
    corpus: str, results: int = 3, text: str = "text", title: str = "title", snippet: int = 400
) -> Callable[..., str]:
    """Search over a jsonl file, ranked by BM25.

    Args:
        corpus: the file; a document is one line.
        results: documents returned.
        text, title: names of the columns; a document may lack the title.
        snippet: characters of a document that are shown, around the first word of the query.

    Raises:
        RecipeError: the file cannot be read.
    """
    documents = _documents(corpus, text, title)
    index = Bm25([f"{name} {body}" for name, body in documents])

    def search(query: str) -> str:
        """Search a collection of documents and return the best matches.

        Args:
            query: Words to look for.
        """
        found = index.best(query[:MAX_QUERY], results)
        shown = [
            f"[{rank}] {_show(*documents[place], query, snippet)}" for rank, place in enumerate(found, 1)
        ]
        return "\n".join(shown) if shown else "No document matches."

    return search


def _documents(corpus: str, text: str, title: str) -> list[tuple[str, str]]:
    path = Path(corpus).expanduser()
    if not path.is_file():
        raise RecipeError(f"tool search: there is no file {corpus}")
    documents = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                documents.append((str(row.get(title) or ""), str(row[text])))
            except (ValueError, AttributeError):
                raise RecipeError(f"tool search: {corpus}:{number} is not a JSON object") from None
            except KeyError:
                raise RecipeError(f"tool search: {corpus}:{number} has no column {text!r}") from None
    if not documents:
        raise RecipeError(f"tool search: {corpus} has no documents")
    return documents


def _show(title: str, body: str, query: str, length: int) -> str:
    places = [place for word in _words(query) if (place := body.lower().find(word)) >= 0]
    start = max(min(places, default=0) - length // 4, 0)
    part = body[start : start + length]
    shown = f"{'…' if start else ''}{part}{'…' if start + length < len(body) else ''}"
    return f"{title}: {shown}" if title else shown


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class Bm25:
    """Okapi BM25 (Robertson and Zaragoza 2009, equation 3.15) with k1 = 1.5 and b = 0.75.

    The inverse document frequency is log(1 + (N - n + 0.5) / (n + 0.5)), which is never negative.
    """

    K1 = 1.5
    B = 0.75

    def __init__(self, documents: list[str]):
        self._postings: dict[str, list[tuple[int, int]]] = {}
        lengths = []
        for place, document in enumerate(documents):
            words = _words(document)
            lengths.append(len(words))
            for word, count in Counter(words).items():
                self._postings.setdefault(word, []).append((place, count))
        mean = sum(lengths) / len(lengths) or 1.0
        self._norms = [self.K1 * (1 - self.B + self.B * length / mean) for length in lengths]

    def best(self, query: str, count: int) -> list[int]:
        """Places of the documents with the highest scores, best first; those without a word are left out."""
        scores: dict[int, float] = {}
        for word in sorted(set(_words(query))):
            postings = self._postings.get(word, [])
            rarity = math.log(1 + (len(self._norms) - len(postings) + 0.5) / (len(postings) + 0.5))
            for place, times in postings:
                gain = rarity * times * (self.K1 + 1) / (times + self._norms[place])
                scores[place] = scores.get(place, 0.0) + gain
        return sorted(scores, key=lambda place: (-scores[place], place))[:count]


BUILTIN: dict[str, Callable[..., Callable[..., str]]] = {
    "calculator": make_calculator,
    "python": make_python,
    "search": make_search,
}
