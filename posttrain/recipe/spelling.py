"""The nearest valid name to a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def nearest(word: str, choices: Sequence[str], cutoff: float = 0.66) -> str | None:
    """The most similar choice, if any is similar (1 is equal); upper and lower case are the same."""
    lower = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=cutoff)
    return lower[found[0]] if found else None


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """` Did you mean x?`, or nothing."""
    found = nearest(word, choices)
    return f" Did you mean {found}?" if found else ""
