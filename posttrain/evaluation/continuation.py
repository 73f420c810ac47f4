"""Thinking that is made to go on beyond its end, and searches that never end.

`forced_on` is the budget forcing of Qu et al. 2025 (arXiv:2503.07572, figure 9): does more thinking than the
policy was trained for help, or at least not harm? `search_on` is that paper's linearised evaluation of
backtracking search: an attempt depends on the newest ones alone, so old ones can be forgotten, and a trace of
any length runs in a context of fixed size. It says nothing about open-ended thinking, which may refer to all
that was before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from posttrain.data.episodes import text_cuts, token_places
from posttrain.recipe.mrt_schema import ContinuationConfig, LinearConfig
from posttrain.rollout.probes import Cut, MetaProver
from posttrain.rollout.types import Completion, Rollout, derive_seed, make_rollouts

Judge = Callable[[Rollout], bool | None]
"""Whether a rollout is right; None where that is not known."""
Tokens = tuple[int, ...]
ROUNDS = 16
"""Times a trace is told to go on before a mark is given up: a policy may end at once, again and again."""


@dataclass
class _Thought:
    """Thinking without an end: `tokens` after the prompt of `rollout`, of which `begun` came by themselves.

    `broken` if it stops within an episode.
    """

    rollout: Rollout
    tokens: Tokens
    begun: int
    broken: bool


def forced_on(
    rollouts: Sequence[Rollout], prover: MetaProver, config: ContinuationConfig, is_right: Judge
) -> list[list[float]]:
    """Success of forced answers after thinking that was made to go on, one value for every share.

    Where a policy ends its thinking the end is taken away and one of the `words` put there, until there are
    so many tokens more; then an unfinished episode is dropped. NaN where no answer was scored, as without
    room in the context.
    """
    thoughts = []
    for rollout in rollouts:
        tokens, broken = _endless(rollout, (), prover)
        thoughts.append(_Thought(rollout, tokens, len(tokens), broken))
    found: list[list[float]] = [[] for _ in rollouts]
    for share in config.shares:
        for turn in range(ROUNDS):
            word = prover.encode(config.words[turn % len(config.words)])
            room = [(_room(thought, share, word, prover), thought) for thought in thoughts]
            going = [(thought, left) for left, thought in room if left > 0]
            longer = _go_on([(t.rollout, t.tokens, left) for t, left in going], word, prover)
            for (thought, _), new in zip(going, longer, strict=True):
                thought.tokens, thought.broken = _endless(new, thought.tokens + word, prover)
        answers = prover.ask([Cut(_as_rollout(t, prover), _whole(t, prover)) for t in thoughts])
        for values, asked in zip(found, answers, strict=True):
            known = [right for answer in asked if (right := is_right(answer)) is not None]
            values.append(sum(known) / len(known) if known else math.nan)
    return found


@dataclass
class _Chain:
    """A search without an end: the `tokens` after the prompt that are left, and how many it has spent."""

    rollout: Rollout
    tokens: Tokens
    spent: int = 0
    points: list[tuple[int, bool]] = field(default_factory=list)

    def add(self, new: Rollout, before: Tokens, is_right: Judge) -> None:
        """Take in what was written after `before`."""
        self.spent += new.completion.sampled_tokens
        right = is_right(new)
        if right is not None:
            self.points.append((self.spent, right))
        self.tokens = before + _without_end(new.completion)


def search_on(
    rollouts: Sequence[Rollout],
    prover: MetaProver,
    config: LinearConfig,
    budget: int,
    score: Callable[[Sequence[Rollout]], object],
    is_right: Judge,
) -> list[list[tuple[int, bool]]]:
    """For every trace: tokens spent and whether its answer was right, each time it ended.

    A trace that ended is told to go on, with its newest `window` episodes before it and nothing older, until
    the budget is spent. The first entry is the trace itself; an end without a score has no entry.
    """
    word = prover.encode(config.word)
    chains = [_Chain(rollout, ()) for rollout in rollouts]
    for chain in chains:
        chain.add(chain.rollout, (), is_right)
    while True:
        going = []
        for chain in chains:
            chain.tokens = _newest(chain, config.window, prover)
            used = len(chain.rollout.request.prompt_ids) + len(chain.tokens) + len(word)
            left = min(budget - chain.spent - len(word), prover.engine.max_model_len - used)
            if left > 0:
                going.append((chain, min(left, chain.rollout.request.sampling.max_tokens)))
        if not going:
            return [chain.points for chain in chains]
        longer = _go_on([(c.rollout, c.tokens, left) for c, left in going], word, prover)
        score(longer)
        for (chain, _), new in zip(going, longer, strict=True):
            chain.spent += len(word)
            chain.add(new, chain.tokens + word, is_right)


def _go_on(asked: Sequence[tuple[Rollout, Tokens, int]], word: Tokens, prover: MetaProver) -> list[Rollout]:
    """What follows the prompt of a rollout, some tokens and the word, in up to so many tokens."""
    requests = []
    for rollout, tokens, limit in asked:
        request = rollout.request
        seed = derive_seed(request.sampling.seed, rollout.id, *tokens, *word)
        requests.append(
            replace(
                request,
                prompt_ids=request.prompt_ids + tokens + word,
                group=rollout.id,
                sampling=replace(request.sampling, n=1, max_tokens=limit, seed=seed),
                given=request.given + prover.decode([list(tokens + word)])[0],
            )
        )
    return make_rollouts(requests, prover.engine.generate(requests), prover.engine.version).rollouts


def _without_end(completion: Completion) -> Tokens:
    """Its tokens without the one that ended it."""
    return completion.token_ids[:-1] if completion.finish_reason == "stop" else completion.token_ids


def _endless(new: Rollout, before: Tokens, prover: MetaProver) -> tuple[Tokens, bool]:
    """What was thought before and in a rollout without its end, and whether it breaks off."""
    thinking = prover.thinking(new)
    if thinking.answer is not None:
        return before + new.completion.token_ids[: thinking.end], False
    return before + _without_end(new.completion), new.truncated


def _as_rollout(thought: _Thought, prover: MetaProver) -> Rollout:
    """The tokens as a completion of the bare prompt."""
    tokens = thought.tokens
    text = prover.decode([list(tokens)])[0]
    return replace(thought.rollout, completion=Completion(tokens, (0.0,) * len(tokens), "length", text))


def _room(thought: _Thought, share: float, word: Tokens, prover: MetaProver) -> int:
    """Tokens that may be sampled after the word, up to the mark and within the context."""
    request = thought.rollout.request
    more = round(share * request.sampling.max_tokens) - (len(thought.tokens) - thought.begun)
    answer = len(prover.cue_ids) + prover.config.max_tokens
    used = len(request.prompt_ids) + len(thought.tokens) + answer
    return min(more, prover.engine.max_model_len - used) - len(word)


def _whole(thought: _Thought, prover: MetaProver) -> int:
    """Tokens up to the end of the last episode that is whole."""
    rollout = _as_rollout(thought, prover)
    if not thought.broken or rollout.completion.text.endswith(prover.config.episodes.separator):
        return len(thought.tokens)
    return prover.thinking(rollout).bounds[-2]


def _newest(chain: _Chain, window: int, prover: MetaProver) -> Tokens:
    """The tokens of the newest episodes, whatever tags there are."""
    text = prover.decode([list(chain.tokens)])[0]
    cuts = token_places(chain.tokens, prover.decode, text_cuts(text, prover.config.episodes))
    return chain.tokens[[0, *cuts][max(len(cuts) + 1 - window, 0)] :]
