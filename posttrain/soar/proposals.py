"""Reading what the teacher writes: one question and its answer, or the reason why there is none.

Nothing here judges whether a problem makes sense or its answer is right (section 2.3 of the paper's
algorithm); whether an answer can be checked at all is asked of the rewards (`posttrain.soar.teacher`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.data.answers import last_boxed
from posttrain.recipe.soar_schema import ProposalFormat


@dataclass(frozen=True)
class Question:
    """A proposed question and the teacher's own answer to it, which may be wrong."""

    question: str
    answer: str


class Unreadable(ValueError):
    """A proposal is refused; the text is the reason in one word, under which it is counted."""


def parse_proposal(text: str, format: ProposalFormat) -> Question:
    """The question and the answer in a proposal; takes linear time whatever the text.

    The question stands between the first opening tag and the next closing one, or a second opening tag, which
    the paper prints in its place; the answer likewise, anywhere after the question. What is outside of them
    is working.

    Raises:
        Unreadable: no_question, empty_question, no_answer, unboxed, empty_answer, long_answer, or nested
            where a tag of the answer stands inside of the question.
    """
    question, rest = _between(text, format.question, "no_question")
    if any(tag in question for tag in format.answer):
        raise Unreadable("nested")
    if not any(character.isalnum() for character in question):
        raise Unreadable("empty_question")
    answer, _ = _between(rest, format.answer, "no_answer")
    if format.boxed:
        content = last_boxed(answer)
        if content is None:
            raise Unreadable("unboxed")
        answer = content
    answer = answer.strip()
    if not answer:
        raise Unreadable("empty_answer")
    if len(answer) > format.max_answer_chars:
        raise Unreadable("long_answer")
    return Question(question.strip(), answer)


def _between(text: str, tags: tuple[str, str], missing: str) -> tuple[str, str]:
    """What is between two tags, and what follows."""
    opening, closing = tags
    _, found, rest = text.partition(opening)
    if not found:
        raise Unreadable(missing)
    ends = [(at, tag) for tag in (closing, opening) if (at := rest.find(tag)) >= 0]
    if not ends:
        raise Unreadable(missing)
    at, tag = min(ends)
    return rest[:at], rest[at + len(tag) :]


def partition(items: Sequence[Question], sets: int, size: int) -> list[list[Question]]:
    """The sets of a step: consecutive blocks of `size` in the order of sampling."""
    return [list(items[index * size : (index + 1) * size]) for index in range(sets)]


def unique_share(questions: Sequence[Question]) -> float:
    """Different question texts among all; duplicates are legal, a low share is a teacher that collapses."""
    return len({item.question for item in questions}) / len(questions) if questions else 0.0


def digest(questions: Sequence[Question]) -> str:
    """A short hash of a set, by which results of its students are found again."""
    content = "\x1e".join(f"{item.question}\x1f{item.answer}" for item in questions)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
