"""The engine of a recipe with tools: conversations with many turns, on top of any other engine.

The first turns of all completions are one call of the engine below, the very one that it would get without
tools. From then on whichever conversations are ready go to it together, while the tool calls of the others
run in the background. The seed of a turn derives from the request, the completion's index and the turn, so
results do not depend on how long a tool took.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from posttrain.data.prompts import PromptFormat, Prompts
from posttrain.recipe.tools_schema import ToolsConfig
from posttrain.rollout.engine import RolloutEngine, fork_requests
from posttrain.rollout.tokens import decode_texts
from posttrain.rollout.tools import Outcome, environment_factory, schemas_of
from posttrain.rollout.tools_format import Call, ToolFormat
from posttrain.rollout.tools_pool import ToolPool
from posttrain.rollout.tools_worker import Action, Task
from posttrain.rollout.types import (
    Completion,
    FinishReason,
    Rollout,
    RolloutRequest,
    Sampling,
    ToolCall,
    Turn,
    derive_seed,
)

GATHER_SECONDS = 0.02
"""Calls that end within so many seconds of each other go back to the engine together."""
PATIENCE = 3600.0
"""Longer than any call: a pool ends calls itself."""


def prompts_of(
    config: ToolsConfig | None, tokenizer: PreTrainedTokenizerBase, format: PromptFormat
) -> Prompts | ToolFormat:
    """How the prompts of a source look, with the tools of a recipe if it has any.

    Raises:
        RecipeError: a tool cannot be found or described, or does not go with the tokenizer.
    """
    if config is None:
        return Prompts(tokenizer, format)
    return ToolFormat(config, schemas_of(environment_factory(config)().tools), tokenizer, format)


def with_tools(
    engine: RolloutEngine, config: ToolsConfig | None, prompts: Prompts | ToolFormat
) -> RolloutEngine:
    """The engine with the tools of a recipe, or as it is without any.

    Raises:
        PosttrainError: the tools cannot be loaded; the engine is closed.
    """
    if config is None or not isinstance(prompts, ToolFormat):
        return engine
    try:
        return ToolEngine(engine, ToolPool(config), prompts, config)
    except BaseException:
        engine.close()
        raise


class ToolEngine:
    """A `RolloutEngine` whose completions may call tools.

    A request's `max_tokens` and the context bound the completion with everything tools have said; a result
    that leaves no room for another token is not appended and ends the completion as cut off. So does asking
    for more than `max_turns`.

    Args:
        engine: what samples; closed with this one.
        pool: what runs tools; closed with this one.
        format: how tools look to the policy.
        config: of the recipe. Tools alone answer no turn without a call, which is then the last.
    """

    def __init__(self, engine: RolloutEngine, pool: ToolPool, format: ToolFormat, config: ToolsConfig):
        self.max_model_len = engine.max_model_len
        self._engine = engine
        self._pool = pool
        self._format = format
        self._max_turns = config.max_turns
        self._answers = config.environment is not None
        self._tokenizer = format.tokenizer
        self._numbers = itertools.count()

    @property
    def version(self) -> int:
        """See `RolloutEngine`."""
        return self._engine.version

    @version.setter
    def version(self, version: int) -> None:
        self._engine.version = version

    def generate(self, requests: Sequence[RolloutRequest]) -> list[list[Completion]]:
        """See `RolloutEngine.generate`."""
        first = [replace(r, sampling=self._format.sampling(r.sampling)) for r in requests]
        answers = self._engine.generate(first)
        talks = [
            [_Conversation(request, index, next(self._numbers)) for index in range(request.sampling.n)]
            for request in requests
        ]
        try:
            ready = [
                talk
                for row, completions in zip(talks, answers, strict=True)
                for talk, completion in zip(row, completions, strict=True)
                if self._take_turn(talk, completion)
            ]
            self._converse({talk.number: talk for row in talks for talk in row}, ready)
        except BaseException:
            self._pool.discard()
            raise
        return [self._completions(row) for row in talks]

    def fork(
        self, rollout: Rollout, cuts: Sequence[int], n: int, sampling: Sampling
    ) -> list[list[Completion]]:
        """See `RolloutEngine.fork`. The continuations may call tools; turns are counted anew."""
        return self.generate(fork_requests(rollout, cuts, n, sampling))

    def sync(self, model: Any) -> None:
        """See `RolloutEngine.sync`."""
        self._engine.sync(model)

    def close(self) -> None:
        """End the tool processes and close the engine below."""
        self._pool.close()
        self._engine.close()

    def _converse(self, talks: dict[int, _Conversation], ready: list[_Conversation]) -> None:
        """Until every conversation has ended: sample those that are ready, take in what tools have said."""
        while ready or self._pool.busy:
            if ready:
                answers = self._engine.generate([self._next_request(talk) for talk in ready])
                taken = zip(ready, answers, strict=True)
                ready = [talk for talk, (completion,) in taken if self._take_turn(talk, completion)]
            outcomes = self._pool.collect(0.0 if ready else PATIENCE)
            until = time.monotonic() + GATHER_SECONDS
            while self._pool.busy and (left := until - time.monotonic()) > 0:
                outcomes += self._pool.collect(left)
            ready += [talks[key] for key, outcome in outcomes if self._take_outcome(talks[key], outcome)]

    def _next_request(self, talk: _Conversation) -> RolloutRequest:
        sampling = replace(
            talk.request.sampling,
            n=1,
            max_tokens=talk.request.sampling.max_tokens - len(talk.token_ids),
            seed=derive_seed(talk.request.sampling.seed, "turn", talk.index, len(talk.turns)),
        )
        prompt = talk.request.prompt_ids + tuple(talk.token_ids)
        return replace(talk.request, prompt_ids=prompt, sampling=self._format.sampling(sampling))

    def _take_turn(self, talk: _Conversation, completion: Completion) -> bool:
        """Add what the policy wrote, and have done what it asks for. True if it may go on at once."""
        talk.write(completion)
        if completion.finish_reason == "length":
            talk.finish_reason = "length"
            return False
        call = self._format.call_in(completion)
        if call is None and not self._answers:
            return False
        if talk.trips == self._max_turns:
            talk.finish_reason = "length"
            return False
        talk.trips += 1
        talk.call = call
        if call is not None and call.problem is not None:
            return self._take_outcome(talk, Outcome(f"Error: {call.problem}", "malformed"))
        action = Action(None, text=completion.text) if call is None else Action(call.name, call.arguments)
        task = Task(talk.number, talk.request.example, tuple(talk.actions), action)
        talk.actions.append(action)
        self._pool.submit(talk.number, task)
        return False

    def _take_outcome(self, talk: _Conversation, outcome: Outcome) -> bool:
        """Add what a tool or the environment said. True if the policy goes on."""
        call, output = talk.call, outcome.output
        if output is None:
            return False
        if call is None:
            if outcome.error is not None:  # of an environment's step only failures are kept
                talk.calls.append(ToolCall("step", "", output, outcome.seconds, outcome.error))
            ids = self._format.answer_ids(output, ended=talk.ended(self._tokenizer.eos_token_id))
        else:
            talk.calls.append(ToolCall(call.name, call.written, output, outcome.seconds, outcome.error))
            ids = self._format.result_ids(output)
        sampling = talk.request.sampling
        room = min(sampling.max_tokens, self.max_model_len - len(talk.request.prompt_ids))
        if len(talk.token_ids) + len(ids) >= room:
            talk.finish_reason = "length"
            return False
        talk.read(ids)
        return True

    def _completions(self, talks: Sequence[_Conversation]) -> list[Completion]:
        texts = decode_texts(self._tokenizer, [talk.token_ids for talk in talks])
        return [talk.completion(text) for talk, text in zip(talks, texts, strict=True)]


@dataclass
class _Conversation:
    """One completion in the making. `call` is the one whose outcome is awaited."""

    request: RolloutRequest
    index: int
    number: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    scored: list[NDArray[np.float32]] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)
    trips: int = 0
    call: Call | None = None
    finish_reason: FinishReason = "stop"

    def write(self, completion: Completion) -> None:
        """Append a turn of the policy's."""
        start = len(self.token_ids)
        self.token_ids += completion.token_ids
        self.logprobs += completion.logprobs
        self.mask += [1] * len(completion.token_ids)
        self.turns.append(Turn(start, len(self.token_ids), completion.text))
        if completion.scored is not None:
            self.scored.append(completion.scored)

    def read(self, ids: Sequence[int]) -> None:
        """Append what the policy did not write."""
        self.token_ids += ids
        self.logprobs += [0.0] * len(ids)
        self.mask += [0] * len(ids)
        if self.scored:
            self.scored.append(np.full((len(ids), self.scored[0].shape[1]), np.nan, dtype=np.float32))

    def ended(self, eos: int | None) -> bool:
        """Whether the last turn has its end-of-sequence token."""
        return self.token_ids[-1] == eos

    def completion(self, text: str) -> Completion:
        """The finished completion."""
        return Completion(
            tuple(self.token_ids),
            tuple(self.logprobs),
            self.finish_reason,
            text,
            tuple(self.mask) if 0 in self.mask else None,
            tuple(self.turns),
            tuple(self.calls),
            np.concatenate(self.scored) if self.scored else None,
        )
