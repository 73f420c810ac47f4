"""Rewards that ask the run's own engine: the policy of the moment as its own judge.

They are neither functions of a worker nor of the trainer's process alone: the engine is the trainer's, and
answers best when it is asked everything at once. So the judgements of all samples go forward together, in
rounds of one `generate` call each. Log-probs of these answers are not kept, and nothing is trained on them.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, cast

from posttrain.errors import RewardError
from posttrain.rewards.calling import BoundReward, Result, Sample
from posttrain.rewards.counts import count, counting
from posttrain.rewards.judge_rounds import Answer, Answers, Question, Rounds, Values
from posttrain.rewards.registry import RewardSource
from posttrain.rollout.types import Example, RolloutRequest, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.rollout.engine import RolloutEngine

ROLE = "judge"


class Judge(Protocol):
    """A reward that can be asked for its questions instead of its values."""

    max_tokens: int
    """Of an answer."""

    def rounds(self, completions: Any, examples: Any, control: Any = ()) -> Rounds:
        """The questions about one call's samples (`posttrain.rewards.judge_rounds`)."""
        ...


class SharedEngine:
    """The run's engine and tokenizer, for judges.

    Args:
        engine: of the stage; its weights are those of the policy that is sampled from.
        tokenizer: the policy's, whose chat template the questions go through.
    """

    def __init__(self, engine: RolloutEngine, tokenizer: PreTrainedTokenizerBase):
        self._engine = engine
        self._tokenizer = tokenizer
        self.control = frozenset(tokenizer.all_special_tokens)
        """Texts that this tokenizer reads as control tokens."""

    def answer(self, questions: Sequence[Question], max_tokens: int) -> list[Answer | RewardError]:
        """Answers in the order of the questions; an error for one that does not fit with its answer."""
        room = self._engine.max_model_len - max_tokens
        requests = [self._request(question, max_tokens) for question in questions]
        fitting = [request for request in requests if len(request.prompt_ids) <= room]
        completions = iter(self._engine.generate(fitting) if fitting else [])
        answers: list[Answer | RewardError] = []
        for request in requests:
            length = len(request.prompt_ids)
            if length > room:
                answers.append(
                    RewardError(
                        f"the judge's prompt of {length} tokens and its answer of {max_tokens} do not fit in "
                        f"the engine's {self._engine.max_model_len}"
                    )
                )
                continue
            (completion,) = next(completions)
            count("requests")
            count("prompt_tokens", length)
            count("completion_tokens", len(completion.token_ids))
            answers.append(Answer(completion.text, finished=completion.finish_reason != "length"))
        return answers

    def _request(self, question: Question, max_tokens: int) -> RolloutRequest:
        from posttrain.data.prompts import encode_prompt

        example = Example("judge", question.text)
        sampling = Sampling(max_tokens, temperature=question.temperature, seed=question.seed)
        return RolloutRequest(encode_prompt(example, self._tokenizer), example, ROLE, sampling, ROLE)


def asks_engine(source: RewardSource) -> bool:
    """Whether a reward that is found by its registered name asks the run's engine."""
    return source.registered == "llm_judge" and source.args.get("engine") == "shared"


def judge_units(
    reward: BoundReward, units: Sequence[Sequence[Sample]], engine: SharedEngine | None
) -> list[Result]:
    """Judge all units of a reward together, in as few calls of the engine as it has rounds.

    What is counted is in the first result.

    Raises:
        RewardError: there is no engine here.
    """
    if not units:
        return []
    if engine is None:
        raise RewardError(
            f"reward {reward.info.name!r} asks the engine of a run (engine: shared), and there is none here; "
            "give it a url to use it outside of a policy or evaluate stage"
        )
    start = time.perf_counter()
    judge = cast(Judge, reward.function)
    with counting() as counts:
        values = _together([_begin(judge, unit, engine) for unit in units], judge.max_tokens, engine)
    seconds = (time.perf_counter() - start) / len(units)
    results = [
        Result(reward.outcomes([own] * len(unit) if isinstance(own, Exception) else own, len(unit)), seconds)
        for own, unit in zip(values, units, strict=True)
    ]
    return [replace(results[0], counts=counts), *results[1:]]


def _begin(judge: Judge, unit: Sequence[Sample], engine: SharedEngine) -> Rounds:
    completions, examples = zip(*unit, strict=True)
    return judge.rounds(completions, examples, engine.control)


def _together(units: Sequence[Rounds], max_tokens: int, engine: SharedEngine) -> list[Values | Exception]:
    """Drive generators in step; returns the values that each gave, or the error it raised."""
    values: list[Values | Exception] = [[]] * len(units)
    replies: dict[int, Answers | None] = dict.fromkeys(range(len(units)))
    while replies:
        asked: dict[int, list[Question]] = {}
        for index, answers in replies.items():
            try:
                asked[index] = _advance(units[index], answers)
            except StopIteration as end:
                values[index] = end.value
            except Exception as error:
                values[index] = error
        # Equal questions have equal answers.
        different = list(dict.fromkeys(question for questions in asked.values() for question in questions))
        given = dict(zip(different, engine.answer(different, max_tokens), strict=True))
        replies = {index: [given[question] for question in questions] for index, questions in asked.items()}
    return values


def _advance(rounds: Generator[list[Question], Answers, Any], answers: Answers | None) -> list[Question]:
    return next(rounds) if answers is None else rounds.send(answers)
