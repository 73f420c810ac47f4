"""Common beginnings of prompts: pure functions on tuples of token ids.

A *host* is a prompt that is run as a whole; the others take their keys and values from one, up to where the
two part, and run the rest, their *tail*.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Prompt = tuple[int, ...]

MAX_TAIL = 256
"""Longest tail: a cue after a cut is shorter."""
WORTH = 0.5
"""Tails are used where they leave at most this share of the tokens to run: forking a cache costs too."""


@dataclass(frozen=True)
class Host:
    """Where a prompt's beginning comes from: the first `shared` tokens of `prompt`."""

    prompt: Prompt
    shared: int


def find_hosts(prompts: Collection[Prompt]) -> dict[Prompt, Host]:
    """A host for each of the prompts, all different and not empty; a host's own is itself.

    What hosts share is either all of a prompt, whose last token alone is then run again, or all but a tail.
    """
    whole = _hosts_of_beginnings(prompts)
    tails = _hosts_with_tails(sorted(whole))
    return tails if _cost(tails) <= WORTH * _cost(whole) else whole


def tail_length(hosts: Collection[tuple[Prompt, Host]]) -> int:
    """Tokens at the end of every prompt that are run on top of the hosts' caches, one at least."""
    return max([1, *(len(prompt) - host.shared for prompt, host in hosts)])


def prefix_reuse(prompts: Sequence[Prompt]) -> float:
    """Share of the prompts' tokens that need not be computed when each common beginning is, once."""
    total = sum(map(len, prompts))
    return sum(_common(a, b) for a, b in pairwise(sorted(prompts))) / total if total else 0.0


def _hosts_of_beginnings(prompts: Collection[Prompt]) -> dict[Prompt, Host]:
    """For each prompt the longest that begins with it.

    In lexicographic order a prompt is followed by those that it begins, if there are any.
    """
    hosts: dict[Prompt, Host] = {}
    host: Prompt = ()
    for prompt in sorted(prompts, reverse=True):
        if host[: len(prompt)] != prompt:
            host = prompt
        hosts[prompt] = Host(host, len(prompt))
    return hosts


def _hosts_with_tails(ordered: list[Prompt]) -> dict[Prompt, Host]:
    """Longest first, each prompt goes with a host that has all of it but a tail, or becomes one.

    `ordered` is in lexicographic order, where prompts with a long common beginning are near each other: what
    two have in common is the least of what the neighbours between them have.
    """
    common = [_common(a, b) for a, b in pairwise(ordered)]
    hosts: dict[int, Host] = {}
    for index in sorted(range(len(ordered)), key=lambda i: (-len(ordered[i]), i)):
        prompt = ordered[index]
        needed = len(prompt) - min(MAX_TAIL, len(prompt) // 2)
        found = next(
            (
                (other, shared)
                for other, shared in _near(index, common, needed)
                if other in hosts and hosts[other].prompt == ordered[other]
            ),
            None,
        )
        hosts[index] = Host(prompt, len(prompt)) if found is None else Host(ordered[found[0]], found[1])
    return {ordered[index]: host for index, host in hosts.items()}


def _near(index: int, common: Sequence[int], needed: int) -> Iterator[tuple[int, int]]:
    """Places before and after one, with what they have in common with it, while that is enough."""
    for step in (-1, 1):
        place, shared = index, math.inf
        while 0 <= (gap := place - (step < 0)) < len(common):
            shared = min(shared, common[gap])
            if shared < needed:
                break
            place += step
            yield place, int(shared)


def _cost(hosts: dict[Prompt, Host]) -> int:
    """Tokens that are run with these hosts."""
    tail = tail_length(list(hosts.items()))
    run = sum(len(prompt) for prompt, host in hosts.items() if host.prompt == prompt)
    return run + (tail * len(hosts) if any(h.prompt != p for p, h in hosts.items()) else 0)


def _common(one: Prompt, other: Prompt) -> int:
    """Length of the common beginning."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return int(np.argmax(np.array(one[:length]) != np.array(other[:length])))
