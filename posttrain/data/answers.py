"""Where the answer is in a completion: one rule for the rewards and for majority votes."""

from __future__ import annotations

import re

MAX_BARE_ANSWER = 200
"""Characters of a completion without any marker that still counts as an answer by itself."""

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def extract_answer(text: str) -> str | None:
    r"""The answer that a completion gives, without surrounding white space, or None if it gives none.

    1. Reasoning does not count: only the text after the last `</think>` is looked at. A `<think>` that is
       not closed means that the completion never came to an answer.
    2. The first of these that the text has decides:
       the last `<answer>…</answer>` (and inside of it the last `\boxed{…}`, if there is one);
       the last `\boxed{…}` whose braces are balanced;
       what follows the last `####` on its line;
       the whole text, if it is one line of at most 200 characters.

    An empty answer is none. Takes linear time whatever the text.
    """
    text = text[text.rfind("</think>") + len("</think>") :] if "</think>" in text else text
    if "<think>" in text:
        return None
    answer = _last_tagged(text)
    if answer is not None:
        boxed = last_boxed(answer)
        answer = answer if boxed is None else boxed
    else:
        answer = last_boxed(text)
    if answer is None and "####" in text:
        answer = text.rpartition("####")[2].lstrip(" \t").partition("\n")[0]
    if answer is None:
        line = text.strip()
        answer = line if "\n" not in line and len(line) <= MAX_BARE_ANSWER else ""
    return answer.strip() or None


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{…}` with balanced braces (escaped braces do not count), or None."""
    if "\\boxed" not in text:
        return None
    open_braces: list[int | None] = []  # where the content of a \boxed starts; None for other braces
    last = (-1, -1)
    for match in _BRACES.finditer(text):
        token = match.group()
        if token.startswith("\\boxed"):
            open_braces.append(match.end())
        elif token == "{":
            open_braces.append(None)
        elif token == "}" and open_braces:
            start = open_braces.pop()
            if start is not None:
                last = max(last, (start, match.start()))
    return None if last[0] < 0 else text[last[0] : last[1]]


def _last_tagged(text: str) -> str | None:
    before, closing, _ = text.rpartition("</answer>")
    _, opening, answer = before.rpartition("<answer>")
    return answer if closing and opening else None
