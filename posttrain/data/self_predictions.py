"""Self-predictions: asking for notions, a pass rate and a length before solving, and reading the answer.

After Kim et al., "Meta-awareness enhances reasoning models: self-alignment reinforcement learning"
(arXiv:2510.03259). Pure functions; a part of an answer that cannot be read is missing, never an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from posttrain.errors import DataError
from posttrain.recipe.meta_schema import MetaFormat
from posttrain.rollout.types import Example, Message

CLOSE = "</meta>"
MAX_NOTIONS = 16
MAX_LENGTH = 10**9
"""Larger numbers are no predictions, and would overflow."""
MAX_BRACES = 256
"""Only the last opening braces are tried: nested ones would take quadratic time."""


@dataclass(frozen=True)
class Prediction:
    """What a policy says about a problem before solving it. None and () are missing parts.

    `pass_rate` counts the attempts out of `MetaFormat.levels` that would be right, `length` is in tokens.
    """

    notions: tuple[str, ...] = ()
    pass_rate: int | None = None
    length: int | None = None

    @property
    def complete(self) -> bool:
        """Whether all three parts could be read."""
        return bool(self.notions) and self.pass_rate is not None and self.length is not None


def problem_text(example: Example, format: MetaFormat) -> str:
    """The bare problem of an example.

    Raises:
        DataError: it lacks the column that should hold it.
    """
    if format.problem is not None:
        if format.problem not in example.columns:
            raise DataError(f"example {example.id!r} has no column {format.problem!r} with the bare problem")
        return str(example.columns[format.problem])
    return example.prompt if isinstance(example.prompt, str) else str(example.prompt[-1]["content"])


def meta_example(example: Example, format: MetaFormat, max_length: int) -> Example:
    """The example, with an id of its own, that asks for a self-prediction. `max_length` caps a solution."""
    text = format.template
    values = {"levels": format.levels, "min_length": format.min_length, "max_length": max_length}
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", str(value))
    text = text.replace("{problem}", problem_text(example, format))  # last: a problem may hold braces
    if format.system is None:
        return replace(example, id=f"{example.id}#meta", prompt=text)
    messages = [Message(role="system", content=format.system), Message(role="user", content=text)]
    return replace(example, id=f"{example.id}#meta", prompt=messages)


def hinted_example(example: Example, notions: Sequence[str], format: MetaFormat) -> Example:
    """The example with a sentence about notions after the problem statement of its prompt."""
    hint = f"\n\nThe problem can be solved with the following notions: {', '.join(notions)}."
    problem = problem_text(example, format)

    def put(text: str) -> str:
        return text.replace(problem, problem + hint, 1) if problem in text else text + hint

    if isinstance(example.prompt, str):
        return replace(example, prompt=put(example.prompt))
    *before, last = example.prompt
    messages = [*before, Message(role=last["role"], content=put(last["content"]))]
    return replace(example, prompt=messages)


def write_prediction(prediction: Prediction, format: MetaFormat, reasoning: str = "") -> str:
    """An answer in the requested format: the reasoning, then JSON on one line that either parser reads."""
    values = {
        format.notions_key: list(prediction.notions),
        format.pass_rate_key: prediction.pass_rate,
        format.length_key: prediction.length,
    }
    head = f"<meta>{reasoning}{CLOSE}\n" if reasoning else ""
    return head + json.dumps(values, ensure_ascii=False)


def reasoning_of(text: str) -> str:
    """What an answer says between `<meta>` and the last `</meta>`; "" when it has no such block."""
    before, close, _ = text.rpartition(CLOSE)
    return before.rpartition("<meta>")[2] if close else ""


def parse_prediction(text: str, format: MetaFormat) -> Prediction:
    """What can be read of an answer."""
    if format.parser == "official":
        return _official(text, format)
    found = _last_object(text, format)
    notions = found.get(format.notions_key)
    rate, length = found.get(format.pass_rate_key), found.get(format.length_key)
    return Prediction(
        notions=_clean(notions.split(",") if isinstance(notions, str) else notions),
        pass_rate=rate if type(rate) is int and 0 <= rate <= format.levels else None,
        length=length if type(length) is int and 1 <= length <= MAX_LENGTH else None,
    )


def _clean(notions: Any) -> tuple[str, ...]:
    """Non-empty texts without spaces around them, each once, in order."""
    if not isinstance(notions, list):
        return ()
    texts = (notion.strip() for notion in notions if isinstance(notion, str))
    return tuple(dict.fromkeys(text for text in texts if text))[:MAX_NOTIONS]


def _last_object(text: str, format: MetaFormat) -> dict[str, Any]:
    """The last JSON object after the reasoning that has one of the keys; {} without one."""
    keys = {format.notions_key, format.pass_rate_key, format.length_key}
    found: dict[str, Any] = {}
    for value in _objects(text[text.rfind(CLOSE) + len(CLOSE) :] if CLOSE in text else text):
        if keys & value.keys():
            found = value
    return found


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Every JSON object of a text, from left to right; those inside of others are not looked at."""
    decoder = json.JSONDecoder()
    end = 0
    for start in [match.start() for match in re.finditer("{", text)][-MAX_BRACES:]:
        if start >= end:
            try:
                value, end = decoder.raw_decode(text, start)
            except (ValueError, RecursionError):
                continue
            yield value


def _official(text: str, format: MetaFormat) -> Prediction:
    """As the released code reads it: a brace, the key of the notions at once, everything up to the first
    closing brace, the last match only; a bool is an int there, and no range is checked. Its fallback for
    unquoted keys, which can give notions alone, is left out."""
    matches = re.findall(rf'\{{"{re.escape(format.notions_key)}"[^}}]*\}}', text)
    try:
        found = json.loads(matches[-1]) if matches else {}
    except ValueError:
        found = {}
    notions = found.get(format.notions_key)
    listed = notions.split(",") if isinstance(notions, str) else notions
    whole = isinstance(listed, list) and all(isinstance(notion, str) for notion in listed)
    rate, length = found.get(format.pass_rate_key), found.get(format.length_key)
    return Prediction(
        notions=_clean(listed) if whole else (),
        pass_rate=rate if isinstance(rate, int) and abs(rate) <= MAX_LENGTH else None,
        length=length if isinstance(length, int) and abs(length) <= MAX_LENGTH else None,
    )
