"""Adaptive sampling for serving: as many samples of a prompt, and as much of each, as they are worth.

Works on any `RolloutEngine` whose model has a grid. A sample is generated in chunks that end at multiples of
the decision interval; its next chunk is a request with what it has so far as the prompt. An engine with a
prefix cache computes no token twice that way, the embedded transformers engine runs the prompt again for
every chunk. Each chunk's seed derives from the request's, the sample and its place: equal requests give equal
samples, whatever they share a batch with and however often they were paused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from posttrain.data.answers import extract_answer
from posttrain.errors import RolloutError
from posttrain.rollout.engine import RolloutEngine, require_finite
from posttrain.rollout.tokens import decode_texts
from posttrain.rollout.types import Completion, FinishReason, RolloutRequest, derive_seed
from posttrain.zip_rc.controller import Chunk, Controller, Policy, State, UtilityPolicy
from posttrain.zip_rc.grid import Grid


@dataclass(frozen=True)
class SampleView:
    """How a sample stands: its expected reward, and the tokens it is expected to need yet."""

    state: State
    tokens: int
    confidence: float
    remaining: float


@dataclass(frozen=True)
class Progress:
    """How a prompt stands after a decision.

    Attributes:
        prompt: its place among the requests.
        samples: those that have begun or may begin.
        confidence: expected reward of the answer, if the samples that run are run to their ends.
        remaining: tokens that those are expected to need, all together.
        tokens: generated so far, all samples together.
        done: whether the answer is there.
    """

    prompt: int
    samples: tuple[SampleView, ...]
    confidence: float
    remaining: float
    tokens: int
    done: bool


@dataclass(frozen=True)
class AdaptiveAnswer:
    """What adaptive sampling gives for a prompt.

    Attributes:
        completion: the one to use, chosen by value.
        confidence: its expected reward, read at its last token; 0 if it ran into its cap.
        samples: all that have begun, ended or not, in the order of their seeds.
        tokens: of all of them.
        latency: tokens that were generated one after another.
    """

    completion: Completion
    confidence: float
    samples: tuple[Completion, ...]
    tokens: int
    latency: int


class AdaptiveSampler:
    """Answers prompts under a policy that decides, every few tokens, which samples go on.

    Args:
        engine: generates.
        tokenizer: of the same model.
        grid: of the same model.
        policy: by default the sampling utility with the paper's weights.
        interval: tokens between decisions; a multiple of the engine's cache block (16 in vLLM) wastes
            nothing.
        budget: tokens of one prompt over all its samples, never exceeded; None has no limit.
        concurrency: prompts that are worked on at the same time.
        answer: what a completion votes for, None for nothing.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        tokenizer: PreTrainedTokenizerBase,
        grid: Grid,
        *,
        policy: Policy | None = None,
        interval: int = 64,
        budget: int | None = None,
        concurrency: int = 64,
        answer: Callable[[str], Hashable | None] = extract_answer,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._grid = grid
        self._policy = policy or UtilityPolicy()
        self._interval = interval
        self._budget = budget
        self._concurrency = concurrency
        self._answer = answer

    def sample(
        self,
        requests: Sequence[RolloutRequest],
        show: Callable[[Progress], None] | None = None,
    ) -> list[AdaptiveAnswer]:
        """Answer every request with at most `sampling.n` samples of at most `sampling.max_tokens` each.

        At least one sample of a prompt is always generated to its end or its cap.

        Args:
            requests: order is kept.
            show: called for every prompt after each of its decisions.

        Raises:
            RolloutError: a prompt that no engine could answer, a budget below the cap, greedy sampling, or
                log-probs that are not finite.
        """
        waiting = deque(self._begin(place, request) for place, request in enumerate(requests))
        answers: dict[int, AdaptiveAnswer] = {}
        active: list[_Prompt] = []
        while waiting or active:
            while waiting and len(active) < self._concurrency:
                active.append(waiting.popleft())
            self._extend(active)
            for prompt in active:
                prompt.decide()
                if show is not None:
                    show(prompt.progress())
                if not prompt.chosen:
                    answers[prompt.place] = self._finish(prompt)
            active = [prompt for prompt in active if prompt.chosen]
        return [answers[place] for place in range(len(requests))]

    def _begin(self, place: int, request: RolloutRequest) -> _Prompt:
        sampling, name = request.sampling, request.example.id
        if sampling.n < 1:
            raise RolloutError(f"the request for example {name!r} asks for {sampling.n} samples")
        if sampling.temperature == 0:
            raise RolloutError(
                f"the request for example {name!r} has temperature 0: all its samples would be one"
            )
        cap = min(sampling.max_tokens, self._engine.max_model_len - len(request.prompt_ids))
        if self._budget is not None and self._budget < cap:
            raise RolloutError(
                f"a budget of {self._budget} tokens does not pay for one sample of example {name!r}, "
                f"which may have {cap}"
            )
        controller = Controller(
            self._grid,
            self._policy,
            samples=sampling.n,
            cap=cap,
            interval=self._interval,
            budget=self._budget,
        )
        return _Prompt(place, request, controller, cap)

    def _extend(self, prompts: Sequence[_Prompt]) -> None:
        """Generate the chosen chunks of all prompts in one call and tell the controllers."""
        asked = [
            prompt.request_of(index, tokens, self._grid)
            for prompt in prompts
            for index, tokens in prompt.chosen.items()
        ]
        answers = self._engine.generate(asked)
        require_finite(asked, answers)
        pieces = iter(answers)
        for prompt in prompts:
            chunks = {index: self._add(prompt, index, *next(pieces)) for index in prompt.chosen}
            prompt.controller.record(chunks)

    def _add(self, prompt: _Prompt, index: int, piece: Completion) -> Chunk:
        """Append a piece to a sample."""
        tokens, logprobs = prompt.tokens[index], prompt.logprobs[index]
        begun = len(tokens)
        tokens += piece.token_ids
        logprobs += piece.logprobs
        # A stop string may have begun in the piece before, where the engine did not see it.
        end = self._stop_string_end(tokens, begun, prompt.request.sampling.stop)
        if end is not None:
            del tokens[end:], logprobs[end:]
        ended: FinishReason | None = None
        if end is not None or piece.finish_reason == "stop":
            ended = "stop"
        elif len(tokens) >= prompt.cap:
            ended = "length"
        scored = piece.scored
        if scored is None:
            raise RolloutError("the engine returned no forecasts: its model has no reserved slice")
        joint = self._grid.joint(scored[len(tokens) - begun - 1])
        if ended is None:
            return Chunk(len(tokens) - begun, joint)
        prompt.ended[index] = ended
        return Chunk(len(tokens) - begun, joint, ended, self._answer(self._decode([tokens])[0]))

    def _stop_string_end(self, tokens: list[int], begun: int, stop: tuple[str, ...]) -> int | None:
        """Number of tokens at which a stop string is complete, at least `begun` + 1; None without one."""

        def found(end: int) -> bool:
            text = self._decode([tokens[:end]])[0]
            return any(string in text for string in stop)

        if not stop or not found(len(tokens)):
            return None
        return next(end for end in range(begun + 1, len(tokens) + 1) if found(end))

    def _decode(self, rows: list[list[int]]) -> list[str]:
        return decode_texts(self._tokenizer, rows)

    def _finish(self, prompt: _Prompt) -> AdaptiveAnswer:
        """All that has begun as completions, and the one that counts."""
        begun = [index for index, tokens in enumerate(prompt.tokens) if tokens]
        texts = self._decode([prompt.tokens[index] for index in begun])
        completions = {
            index: Completion(
                tuple(prompt.tokens[index]),
                tuple(prompt.logprobs[index]),
                prompt.ended.get(index, "length"),
                text,
            )
            for index, text in zip(begun, texts, strict=True)
        }
        best = prompt.controller.best()
        return AdaptiveAnswer(
            completion=completions[best],
            confidence=prompt.controller.confidence,
            samples=tuple(completions.values()),
            tokens=prompt.controller.tokens,
            latency=prompt.controller.latency,
        )


class _Prompt:
    """A prompt that is being answered: its controller, and the tokens of its samples."""

    def __init__(self, place: int, request: RolloutRequest, controller: Controller, cap: int) -> None:
        self.place = place
        self.request = request
        self.controller = controller
        self.cap = cap
        self.tokens: list[list[int]] = [[] for _ in controller.samples]
        self.logprobs: list[list[float]] = [[] for _ in controller.samples]
        self.ended: dict[int, FinishReason] = {}
        self.chosen: dict[int, int] = {}
        self.decide()

    def decide(self) -> None:
        """Ask the controller what to generate next."""
        self.chosen = self.controller.next()

    def request_of(self, index: int, tokens: int, grid: Grid) -> RolloutRequest:
        """The request for the next piece of a sample."""
        begun, sampling = self.tokens[index], self.request.sampling
        return replace(
            self.request,
            prompt_ids=(*self.request.prompt_ids, *begun),
            sampling=replace(
                sampling,
                n=1,
                max_tokens=tokens,
                seed=derive_seed(sampling.seed, "sample", index, len(begun)),
                scored_ids=grid.ids,
            ),
        )

    def progress(self) -> Progress:
        """How it stands."""
        samples = self.controller.samples
        return Progress(
            prompt=self.place,
            samples=tuple(SampleView(s.state, s.tokens, s.value, s.remaining) for s in samples),
            confidence=self.controller.confidence,
            remaining=sum(sample.remaining for sample in samples if sample.state == "running"),
            tokens=self.controller.tokens,
            done=not self.chosen,
        )
