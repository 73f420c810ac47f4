"""Episodes of a thinking trace: where one attempt ends and the next begins.

A trace is steps between separators, and a step that starts with a marker opens an episode: `Wait` and the
like at the beginning of a paragraph (Qu et al. 2025, "Optimizing test-time compute via meta reinforcement
fine-tuning", arXiv:2503.07572), every N paragraphs (an empty marker), or tagged steps (`Node 3`, one a line).
Pure functions. A cut is where the next episode begins, so that what lies before it is whole episodes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from posttrain.recipe.mrt_schema import EpisodeConfig, ProbeConfig


def text_cuts(text: str, config: EpisodeConfig) -> list[int]:
    """Characters at which a new episode begins, the beginning of the text not among them."""
    cuts: list[int] = []
    markers = tuple(config.markers)
    position = last = 0
    for number, step in enumerate(text.split(config.separator)):
        if config.max_cuts is not None and len(cuts) >= config.max_cuts:
            break
        if step and step.startswith(markers) and number - last >= config.min_gap:
            cuts.append(position)
            last = number
        position += len(step) + len(config.separator)
    return cuts[config.group_size - 1 :: config.group_size]


def split_episodes(text: str, config: EpisodeConfig) -> list[str]:
    """The episodes of a trace without the line breaks at their ends; an empty trace is one empty episode."""
    bounds = [0, *text_cuts(text, config), len(text)]
    return [text[start:end].rstrip("\n") for start, end in pairwise(bounds)]


@dataclass(frozen=True)
class Thinking:
    """The thinking of a completion, in tokens: it is `start` to `end`, and `cuts` lie between.

    `answer` is where what follows the closing tag begins; None when the thinking was never closed.
    """

    start: int
    end: int
    answer: int | None
    cuts: tuple[int, ...]

    @property
    def bounds(self) -> tuple[int, ...]:
        """Start, cuts and end: episode j is the tokens from `bounds[j]` to `bounds[j + 1]`."""
        return (self.start, *self.cuts, self.end)

    @property
    def episodes(self) -> list[tuple[int, int]]:
        """Half-open token spans that partition the thinking; one, maybe empty, if there are no cuts."""
        return list(pairwise(self.bounds))


def find_thinking(
    token_ids: Sequence[int], decode: Callable[[list[list[int]]], list[str]], config: ProbeConfig
) -> Thinking:
    """The thinking of a completion and its cuts.

    Cuts are made on token ids, never by tokenising text again: where a token holds the end of one episode
    and the beginning of the next, the cut is before it.

    Args:
        token_ids: of the completion.
        decode: texts of several lists of token ids.
        config: tags and episodes.
    """
    ids = list(token_ids)
    ends = _text_ends(ids, decode)
    text = decode([ids])[0]
    begin = _after_tag(text, config.open)
    close = text.find(config.close, begin)
    finish = len(text) if close < 0 else close
    start, end = _token_at(ends, begin), _token_at(ends, finish)
    cuts = sorted({_token_at(ends, begin + cut) for cut in text_cuts(text[begin:finish], config.episodes)})
    answer = None if close < 0 else bisect_left(ends, close + len(config.close)) + 1
    return Thinking(start, end, answer, tuple(cut for cut in cuts if start < cut < end))


def token_places(
    token_ids: Sequence[int], decode: Callable[[list[list[int]]], list[str]], characters: Sequence[int]
) -> list[int]:
    """How many tokens lie wholly before each of some characters of their text."""
    ends = _text_ends(list(token_ids), decode)
    return [_token_at(ends, place) for place in characters]


def _after_tag(text: str, tag: str) -> int:
    """Where the text goes on after the tag it begins with; 0 when it does not."""
    blank = len(text) - len(text.lstrip())
    return blank + len(tag) if tag and text.startswith(tag, blank) else 0


def _token_at(ends: Sequence[int], place: int) -> int:
    """Tokens that lie wholly before a character; tokens without text count to what they follow."""
    return bisect_right(ends, place)


def _text_ends(ids: list[int], decode: Callable[[list[list[int]]], list[str]]) -> list[int]:
    """How many characters the first 1, 2, … tokens have.

    Token by token where that gives the same text; a tokenizer that joins tokens differently, or a character
    of several tokens, takes decoding every beginning.
    """
    pieces = decode([[token] for token in ids])
    if "".join(pieces) == decode([ids])[0]:
        return list(accumulate(map(len, pieces)))
    return list(map(len, decode([ids[: count + 1] for count in range(len(ids))])))
