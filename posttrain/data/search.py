"""A task whose thinking can be judged episode by episode: find x with a·x = b (mod p) by trying.

    3x=5%b   <think>T2:6N;W;T7:aN;T2:6N;T9:5Y;</think>9

Numbers are hexadecimal digits. An episode tries a candidate and writes the product and whether it is the one
asked for, or is a filler, `W`. The demonstrator wastes on purpose: it tries candidates again, fills, and
goes on after it has found x. Forced to stop, it answers with what it found, or else with a candidate it has
not tried, so that the chance of being right after any beginning is known in closed form.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from posttrain.data.problem import Problem

CUE = "!</think>"
"""What forces an answer in the demonstrations."""
AFTERWARDS = 0.5
"""Chance that the demonstrator goes on after it has found x, with up to three fillers."""

_QUESTION = re.compile(r"([0-9a-f])x=([0-9a-f])%([0-9a-f])")
_EPISODE = re.compile(r"T([0-9a-f]):([0-9a-f])([YN]);|(W);")


@dataclass(frozen=True)
class Waste:
    """What the episodes of a thinking were: in all, tries of a candidate tried before, fillers."""

    episodes: int
    repeated: int
    fillers: int


def search(
    rng: np.random.Generator,
    *,
    moduli: Sequence[int] = (11, 13),
    repeats: float = 0.3,
    fillers: float = 0.2,
    traces: bool = False,
    forced: float = 0.0,
    facts: bool = False,
    max_episodes: int = 26,
) -> Problem:
    """A modular equation and a wasteful search for its solution.

    Args:
        rng: source of randomness.
        moduli: primes up to 13.
        repeats: chance that an episode tries a candidate again.
        fillers: chance that it is a filler.
        traces: rows differ in their search, so that an equation may come more than once.
        forced: chance that the search is cut somewhere and the answer forced; the beginning and the cue then
            belong to the prompt.
        facts: a row is one try of any candidate, to be completed with its product and verdict. Makes the
            products known before whole searches are learnt.
        max_episodes: a demonstrator that has not found x by then begins anew. With 26 a demonstration has at
            most about 150 characters.
    """
    p = int(rng.choice(list(moduli)))
    a, x = int(rng.integers(2, p)), int(rng.integers(1, p))
    question = f"{a:x}x={a * x % p:x}%{p:x}"
    if facts:
        episode = _try(int(rng.integers(1, p)), a, x, p)
        begin, demonstration = f"<think>{episode[:3]}", episode[3:]
        return Problem(question, f"{x:x}", demonstration, given=begin, variant=episode)
    episodes = _episodes(rng, a, x, p, repeats, fillers, max_episodes)
    begin, answer = "", f"{x:x}"
    if rng.random() < forced:
        episodes = episodes[: rng.integers(len(episodes) + 1)]
        begin = f"<think>{''.join(episodes)}{CUE}"
        demonstration = _best_answer(rng, episodes, x, p)
    else:
        demonstration = f"<think>{''.join(episodes)}</think>{_best_answer(rng, episodes, x, p)}"
    variant = begin + demonstration if traces else ""
    return Problem(question, answer, demonstration, given=begin, variant=variant)


def chance_of_success(question: str, thinking: str) -> float:
    """Chance that the best answer to be had after a thinking is right: the J of its prefixes.

    1 when x was found, 1 / (candidates left) while it was not; 0 where a wrong candidate was marked as found
    or the right one was dismissed.
    """
    a, b, p = _equation(question)
    x = b * pow(a, -1, p) % p
    tried = {
        int(candidate, 16): verdict == "Y"
        for candidate, _, verdict, filler in _EPISODE.findall(thinking)
        if not filler
    }
    found = [candidate for candidate, is_found in tried.items() if is_found]
    if found:
        return float(found == [x])
    return 0.0 if x in tried else 1 / (p - 1 - len(tried))


def waste_of(thinking: str) -> Waste:
    """Count a thinking's episodes, those after the first `</think>` not among them."""
    seen: set[str] = set()
    episodes = repeated = fillers = 0
    for candidate, _, _, filler in _EPISODE.findall(thinking.partition("</think>")[0]):
        episodes += 1
        fillers += bool(filler)
        repeated += candidate in seen and not filler
        seen.add(candidate)
    return Waste(episodes, repeated, fillers)


def _episodes(
    rng: np.random.Generator, a: int, x: int, p: int, repeats: float, fillers: float, limit: int
) -> list[str]:
    """Episodes that find x."""
    tried: list[int] = []
    episodes: list[str] = []
    while x not in tried:
        if len(episodes) == limit:
            tried, episodes = [], []
        kind = rng.random()
        if kind < fillers:
            episodes.append("W;")
            continue
        if tried and kind < fillers + repeats:
            candidate = int(rng.choice(tried))
        else:
            candidate = int(rng.choice([c for c in range(1, p) if c not in tried]))
            tried.append(candidate)
        episodes.append(_try(candidate, a, x, p))
    if rng.random() < AFTERWARDS:
        episodes += ["W;"] * int(rng.integers(4))
    return episodes


def _try(candidate: int, a: int, x: int, p: int) -> str:
    """An episode that tries a candidate."""
    return f"T{candidate:x}:{a * candidate % p:x}{'Y' if candidate == x else 'N'};"


def _best_answer(rng: np.random.Generator, episodes: Sequence[str], x: int, p: int) -> str:
    """x where the episodes found it, else a candidate that they did not try."""
    tried = {int(episode[1], 16) for episode in episodes if episode.startswith("T")}
    left = [candidate for candidate in range(1, p) if candidate not in tried]
    return f"{x if x in tried else int(rng.choice(left)):x}"


def _equation(question: str) -> tuple[int, int, int]:
    match = _QUESTION.search(question)
    assert match is not None, question
    a, b, p = (int(part, 16) for part in match.groups())
    return a, b, p
