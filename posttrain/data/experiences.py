"""Meta-experiences: asking for one, giving it along with a problem, and reading it.

After meta-experience learning, MEL (Huang et al., 2026, arXiv:2602.10224).
Pure functions; a text that cannot be read is no meta-experience, never an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from posttrain.recipe.mel_schema import ExperienceFormat
from posttrain.rollout.types import Example, Message, derive_seed


def analysis_example(example: Example, wrong: str, right: str, format: ExperienceFormat) -> Example:
    """The example that asks what went wrong and what went right."""
    values = {"problem": problem_of(example), "wrong": wrong, "right": right}
    return replace(example, prompt=filled(format.analysis, values))


def query_example(example: Example, format: ExperienceFormat) -> Example:
    """The example that asks for a meta-experience about the problem without solutions of it."""
    return replace(example, prompt=filled(format.query, {"problem": problem_of(example)}))


def replay_example(example: Example, experience: str, format: ExperienceFormat) -> Example:
    """The example with a meta-experience in its prompt; earlier messages stay what they are."""
    text = filled(format.replay, {"problem": problem_of(example), "experience": experience})
    if isinstance(example.prompt, str):
        return replace(example, prompt=text)
    *before, last = example.prompt
    return replace(example, prompt=[*before, Message(role=last["role"], content=text)])


def problem_of(example: Example) -> str:
    """The problem as it is posed: a plain prompt, or the last message."""
    return example.prompt if isinstance(example.prompt, str) else str(example.prompt[-1]["content"])


def filled(template: str, values: Mapping[str, str]) -> str:
    """A template with its slots replaced in one go: a value may hold what looks like a slot."""
    pattern = "|".join(re.escape(f"{{{name}}}") for name in values)
    return re.sub(pattern, lambda match: values[match[0][1:-1]], template)


def read_sections(text: str, sections: Sequence[str]) -> list[str] | None:
    """What a meta-experience says under each of its headings; None if one is missing, empty or out of order.

    What comes before the first heading, such as thinking aloud, belongs to none.
    """
    found, place = [], text.find(sections[0])
    for heading, following in zip(sections, [*sections[1:], None], strict=True):
        start = place + len(heading)
        place = len(text) if following is None else text.find(following, start)
        content = text[start:place].strip()
        if place < start or not content:
            return None
        found.append(content)
    return found


def leaks(text: str, answer: str | None) -> bool:
    """Whether the answer stands in a text, not as a part of a longer word or number."""
    if not answer:
        return False
    return re.search(rf"(?<![\w.]){re.escape(answer)}(?!\w|\.\d)", text) is not None


def fingerprint(example: Example, text: str) -> int:
    """The same for two meta-experiences about one problem that differ in white space and case at most."""
    return derive_seed("experience", problem_of(example), " ".join(text.casefold().split()))
