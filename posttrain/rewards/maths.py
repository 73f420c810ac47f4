"""What math-verify would say of two answers, where that can be known without asking it.

Its parser takes some 10 ms for a formula, and twice that the search for a simplification that makes two of
them equal, while most answers are plain numbers, and most wrong ones are wrong at first sight. Every shortcut
says what math-verify says, or nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

_LITERAL = re.compile(
    r"-?(?:\d{1,9}(?:\.\d{1,6})?|[1-9]\d{0,2}(?:,\d{3}){1,2}|\d{1,9}/\d{1,9}|\\[dt]?frac\{-?\d{1,9}\}\{\d{1,9}\})"
)
_LATEX = re.compile(r"-?\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_CERTAINLY_DIFFERENT = 1e-3
"""Far more than math-verify, which rounds to six decimals, can take for the same number below 10⁹."""


def same_plain_numbers(answer: str, reference: str) -> bool | None:
    """What math-verify says of two plain numbers, or of two tuples of such, `(3, -1/2)`.

    None where it has to be asked: one is neither, or they are close without being equal.
    """
    ours, theirs = _exact(answer), _exact(reference)
    if ours is None or theirs is None or len(ours) != len(theirs):
        return None
    gap = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    return gap == 0 if gap == 0 or gap > _CERTAINLY_DIFFERENT else None


def _exact(text: str) -> list[Fraction] | None:
    r"""The values of a text such as `-3`, `1,234`, `0.25`, `3/4`, `\frac{3}{4}` and `(3, -1/2)`, or None."""
    text = undelimited(text)
    parts = text[1:-1].split(",") if text[:1] == "(" and text[-1:] == ")" else []
    texts = [part.strip() for part in parts] if len(parts) > 1 else [text]
    values = [_number(text) for text in texts]
    return None if None in values else values  # type: ignore[return-value]


def _number(text: str) -> Fraction | None:
    if not _LITERAL.fullmatch(text):
        return None
    sign = -1 if text.startswith("-") else 1
    over, _, under = text.lstrip("-").replace(",", "").partition("/")
    if latex := _LATEX.fullmatch(text):
        over, under = latex.groups()
    bottom = int(under or 1)
    return sign * Fraction(over) / bottom if bottom else None


def differ_at_a_point(gold: Sequence[Any], parsed: Sequence[Any]) -> bool:
    """Whether two expressions have different values at some point, so that they cannot be equal.

    Spares wrong answers the search for a simplification that would make them equal.
    """
    import sympy  # type: ignore[import-untyped]

    pair = [expressions[0] for expressions in (gold, parsed) if expressions]
    if len(pair) < 2 or not all(isinstance(one, sympy.Expr) and not one.is_Symbol for one in pair):
        return False  # sets, relations and text have rules of their own
    if any(one.has(sympy.UnevaluatedExpr, sympy.Float) for one in pair):
        return False  # so have percentages, which equal their number, and rounded numbers
    symbols = sorted(pair[0].free_symbols | pair[1].free_symbols, key=str)
    point = {symbol: sympy.Rational(7 + 4 * at, 11) for at, symbol in enumerate(symbols)}
    try:
        gap = abs(complex((pair[0] - pair[1]).subs(point).evalf()))
    except (TypeError, ValueError, ArithmeticError, RecursionError):
        return False  # no value there
    return math.isfinite(gap) and gap > _CERTAINLY_DIFFERENT


def undelimited(text: str) -> str:
    """A text that is all between two dollar signs, without them; any other as it is."""
    inner = text[1:-1]
    return inner.strip() if text[:1] == text[-1:] == "$" and inner and "$" not in inner else text
