"""What reward models read: prompts as plain text, and steps of completions. Nothing heavy is imported."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from posttrain.errors import DataError
from posttrain.rollout.types import Prompt

_PAIR = re.compile(r"\{(prompt|completion)\}")


def well_formed(text: str) -> str:
    """Text that has an encoding: lone surrogates, which tokenizers refuse, become question marks."""
    return text.encode("utf-8", "replace").decode()


def plain_prompt(prompt: Prompt) -> str:
    """A prompt for a template: the contents of its messages, a line each."""
    text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
    return well_formed(text)


def fill_pair(template: str, prompt: str, completion: str) -> str:
    """A template with `{prompt}` and `{completion}` filled in one pass."""
    values = {"prompt": prompt, "completion": completion}
    return _PAIR.sub(lambda match: values[match[1]], template)


def split_steps(completion: str, separator: str) -> tuple[str, tuple[int, ...]]:
    """A completion with the separator behind each of its steps, the last one too, and where each step ends.

    Blank steps do not count.

    Raises:
        DataError: there is no step.
    """
    text = completion if completion.endswith(separator) else completion + separator
    ends, at = [], 0
    for step in text.split(separator)[:-1]:
        at += len(step) + len(separator)
        if step.strip():
            ends.append(at)
    if not ends:
        raise DataError("the completion has no steps")
    return text, tuple(ends)


def reduce_steps(scores: Sequence[float], how: str) -> float:
    """From the scores of the steps to that of the completion."""
    if how == "min":
        return min(scores)
    if how == "mean":
        return math.fsum(scores) / len(scores)
    return scores[-1] if how == "last" else math.prod(scores)
