"""How a judge comes to its values: in rounds of questions, whoever answers them.

A judgement is a generator: it yields a list of questions, is sent their answers in the same order, asks again
where an answer has no verdict, and returns the values. Whoever drives it may ask a server
(`posttrain.rewards.judge`) or the run's own engine (`posttrain.rewards.shared`). Everything random derives
from the texts and the judge's seed, so that equal material gives equal questions wherever it comes from.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from posttrain.errors import RewardError
from posttrain.rewards.counts import count
from posttrain.rewards.judge_text import (
    VerdictForm,
    clean,
    fields_of,
    fill,
    framed,
    material_of,
    without_thinking,
)
from posttrain.rollout.types import Completion, Example, derive_seed

RETRY_TEMPERATURE = 0.5
"""Lowest temperature of a question that is asked again: at 0 the answer would be the same."""
SEED_BITS = 31
"""What every server takes."""
SHOWN = 120
"""Characters of an answer without a verdict that a message shows."""


@dataclass(frozen=True)
class Question:
    """What a judge is asked once."""

    text: str
    seed: int
    temperature: float


@dataclass(frozen=True)
class Answer:
    """What a judge wrote. One that ran into its token limit is not `finished`, and has no verdict."""

    text: str
    finished: bool = True


Answers = Sequence[Answer | RewardError]
"""One for each question; an error where there is no answer."""
Values = list[float | RewardError | None]
"""One for each sample: a number, None where the judge does not apply, or why there is none."""
Rounds = Generator[list[Question], Answers, Values]


@dataclass(frozen=True)
class JudgePlan:
    """What is asked, and what becomes of the answers. Counts as `posttrain.rewards.counts` does:

    verdicts         answers that could be read
    parse_failures   answers that could not
    comparisons      pairs that were compared, each in both orders (pairwise)
    inconsistent     comparisons whose two orders disagree: ties (pairwise)
    """

    form: VerdictForm
    template: str
    rubric: str
    raw: bool
    show_thinking: bool
    samples: int
    opponents: int | None
    temperature: float
    parse_retries: int
    seed: int

    def rounds(
        self, completions: Sequence[Completion], examples: Sequence[Example], control: Collection[str] = ()
    ) -> Rounds:
        """Judge one completion, or, pairwise, the completions of a group.

        `control` are the control tokens of the judge's tokenizer, where they are known.
        """
        texts = [self._shown(completion.text) for completion in completions]
        if self.form.mode == "pairwise":
            return self._compare(texts, examples[0], control)
        return self._rate(texts[0], examples[0], control)

    def _shown(self, text: str) -> str:
        return text if self.show_thinking else without_thinking(text)

    def _rate(self, text: str, example: Example, control: Collection[str]) -> Rounds:
        asked = self._question({"completion": text}, example, control)
        if asked is None:
            return [None]
        verdicts = yield from self._settle(self._votes(asked))
        votes = [verdict for verdict in verdicts if not isinstance(verdict, RewardError)]
        if not votes:
            return [next(verdict for verdict in verdicts if isinstance(verdict, RewardError))]
        low, high = self.form.scale
        value = fmean(votes)
        return [value if self.raw else (value - low) / (high - low)]

    def _compare(self, texts: list[str], example: Example, control: Collection[str]) -> Rounds:
        pairs = comparisons(len(texts), self.opponents)
        # Equal texts are equally good, and what is asked about two texts is asked once.
        asked: dict[tuple[str, str], list[Question]] = {}
        for one, other in pairs:
            a, b = texts[one], texts[other]
            if a != b and (a, b) not in asked:
                for first, second in ((a, b), (b, a)):
                    text = self._question({"completion_a": first, "completion_b": second}, example, control)
                    if text is None:
                        return [None] * len(texts)
                    asked[first, second] = self._votes(text)
        if not pairs:
            return [None] * len(texts)
        flat = yield from self._settle([question for votes in asked.values() for question in votes])
        verdicts = {key: flat[i * self.samples : (i + 1) * self.samples] for i, key in enumerate(asked)}
        outcomes: list[list[float]] = [[] for _ in texts]
        errors: list[RewardError | None] = [None] * len(texts)
        for one, other in pairs:
            a, b = texts[one], texts[other]
            won = 0.5 if a == b else self._outcome(verdicts[a, b], verdicts[b, a])
            if isinstance(won, RewardError):
                errors[one] = errors[other] = won
            else:
                outcomes[one].append(won)
                outcomes[other].append(1.0 - won)
        return [fmean(own) if own else error for own, error in zip(outcomes, errors, strict=True)]

    def _outcome(self, forward: list[Any], backward: list[Any]) -> float | RewardError:
        """Share of the votes that the first of a pair won; a vote whose two orders disagree is a tie."""
        count("comparisons")
        won = []
        for one, other in zip(forward, backward, strict=True):
            if isinstance(one, RewardError) or isinstance(other, RewardError):
                continue
            consistent = {"A": "B", "B": "A", "tie": "tie"}[one] == other
            if not consistent:
                count("inconsistent")
            won.append({"A": 1.0, "B": 0.0, "tie": 0.5}[one] if consistent else 0.5)
        if won:
            return fmean(won)
        return next(verdict for verdict in (*forward, *backward) if isinstance(verdict, RewardError))

    def _question(
        self, completions: dict[str, str], example: Example, control: Collection[str]
    ) -> str | None:
        """The text of a question; None if the template wants a reference and there is none."""
        known = material_of(example, fields_of(self.template))
        if known is None:
            return None
        material = {name: clean(text, control) for name, text in {**known, **completions}.items()}
        low, high = self.form.scale
        values = {
            "rubric": self.rubric,
            "low": str(low),
            "high": str(high),
            "verdict": self.form.instruction,
            **framed(material, self.seed),
        }
        return fill(self.template, values)

    def _votes(self, text: str) -> list[Question]:
        return [
            Question(text, _seed(self.seed, text, vote), self.temperature) for vote in range(self.samples)
        ]

    def _settle(self, questions: list[Question]) -> Generator[list[Question], Answers, list[Any]]:
        """Ask until every question has a verdict or has been asked `1 + parse_retries` times.

        A question that could not be answered is not repeated: whoever answers has done so already.
        """
        verdicts: list[Any] = [None] * len(questions)
        left = list(range(len(questions)))
        for attempt in range(self.parse_retries + 1):
            if not left:
                break
            answers = yield [_again(questions[index], attempt) for index in left]
            asked, left = left, []
            for index, answer in zip(asked, answers, strict=True):
                if isinstance(answer, RewardError):
                    verdicts[index] = answer
                    continue
                verdict = self.form.read(answer.text) if answer.finished else None
                count("parse_failures" if verdict is None else "verdicts")
                verdicts[index] = _unreadable(answer, attempt + 1) if verdict is None else verdict
                if verdict is None:
                    left.append(index)
        return verdicts


def comparisons(size: int, opponents: int | None) -> list[tuple[int, int]]:
    """Which of `size` completions are compared: all pairs, or each with the first `opponents` of the group.

    Each pair is there once, the earlier completion first.
    """
    anchors = size if opponents is None else opponents
    return [(one, other) for one in range(min(anchors, size)) for other in range(one + 1, size)]


def _seed(*parts: object) -> int:
    return derive_seed(*parts) % 2**SEED_BITS


def _again(question: Question, attempt: int) -> Question:
    if attempt == 0:
        return question
    return Question(
        question.text,
        _seed(question.seed, "again", attempt),
        max(question.temperature, RETRY_TEMPERATURE),
    )


def _unreadable(answer: Answer, times: int) -> RewardError:
    asked = f"asked {times} times, " if times > 1 else ""
    if not answer.finished:
        return RewardError(f"{asked}the judge came to no verdict within max_tokens")
    end = " ".join(answer.text.split())[-SHOWN:]
    return RewardError(f"{asked}the judge gave no verdict in the stated form; its answer ends with {end!r}")
