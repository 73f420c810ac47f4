"""Rollouts of one problem as a tree: where they go on from one another, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Branch:
    """A rollout in its tree; places are tokens after the shortest prompt.

    It leaves the rollout `parent` (its number in the list; None for the trunk) at `leaves`, what it was given
    ends at `starts`, and it ends at `ends`.
    """

    parent: int | None
    leaves: int
    starts: int
    ends: int


def family_of(rows: Sequence[Mapping[str, Any]], group: str) -> list[int]:
    """The numbers of a group's rollouts and of all that continue them, in the order of the rows."""
    chosen = {row["rollout_id"] for row in rows if row["group"] == group}
    count = 0
    while count != len(chosen):  # forks of forks
        count = len(chosen)
        chosen |= {row["rollout_id"] for row in rows if row.get("parent") in chosen}
    return [number for number, row in enumerate(rows) if row["rollout_id"] in chosen]


def branches(rows: Sequence[Mapping[str, Any]]) -> list[Branch]:
    """How rollouts share their beginnings: each leaves the one before it that it has most tokens with.

    Rows have `prompt_ids` and `completion_ids`. Of equally long beginnings the first counts. Rollouts that do
    not share the whole shortest prompt, such as questions about others, are trunks of their own.
    """
    sequences = [np.array([*row["prompt_ids"], *row["completion_ids"]]) for row in rows]
    base = min(len(row["prompt_ids"]) for row in rows)
    made: list[Branch] = []
    for number, row in enumerate(rows):
        shared = [_common(sequences[number], sequences[other]) for other in range(number)]
        longest = max(shared, default=-1)
        parent = shared.index(longest) if longest >= base else None
        leaves = longest - base if parent is not None else 0
        starts = max(len(row["prompt_ids"]) - base, leaves)
        made.append(Branch(parent, leaves, starts, len(sequences[number]) - base))
    return made


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Length of the common beginning."""
    size = min(len(one), len(other))
    different = np.flatnonzero(one[:size] != other[:size])
    return int(different[0]) if len(different) else size
