"""Preferences: the one loss of reward models, votes on how strong a preference is, and what follows.

After Wang et al., "Secrets of RLHF in large language models, part II: reward modeling", 2024
(arXiv:2401.06080), sections 2.1 and 2.2. Pure functions.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import logsigmoid

from posttrain.recipe.preference_schema import Treatment
from posttrain.rollout.types import derive_seed

Floats = NDArray[np.float64]

MAX_MARGIN = 3.0
"""Margins are cut to ±3 mean votes: the few pairs that every member is sure of must not rule the loss."""


def preference_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    *,
    margin: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of every pair, shape [B], in float32, from the rewards of its two answers, shape [B].

        z = chosen - rejected - margin
        -weight · [target · log σ(z) + (1 - target) · log σ(-z)]

    With margin 0, target 1 and weight 1 this is the Bradley–Terry loss. Target 1 - α smooths the label,
    target 0 turns it round. The margin is inside of the sigmoid, where it has a gradient.
    """
    z = chosen.float() - rejected.float()
    if margin is not None:
        z = z - margin
    loss = -logsigmoid(z)
    if target is not None:
        loss = target * loss - (1.0 - target) * logsigmoid(-z)
    return loss if weight is None else weight * loss


def preference_strength(votes: Floats) -> tuple[Floats, Floats]:
    """Mean and (population) standard deviation of the votes on every pair, from votes of shape [N, K].

    A vote is r(chosen) - r(rejected) of one member. A negative mean says that the label may be wrong.
    """
    return votes.mean(axis=1), votes.std(axis=1)


def assign_folds(groups: Sequence[Hashable], folds: int, seed: int, member: int) -> NDArray[np.int64]:
    """The fold of every row, shape [N]: rows of one group (one prompt) share a fold, sizes differ little.

    Raises:
        ValueError: there are fewer groups than folds.
    """
    names = list(dict.fromkeys(groups))
    if len(names) < folds:
        raise ValueError(f"{folds} folds need as many different prompts; there are {len(names)}")
    order = np.random.default_rng(derive_seed("folds", seed, member)).permutation(len(names))
    fold_of = {names[index]: place % folds for place, index in enumerate(order)}
    return np.array([fold_of[group] for group in groups], dtype=np.int64)


def suspects(mean: Floats, *, threshold: float = 0.0, share: float | None = None) -> NDArray[np.bool_]:
    """Which pairs are suspect: mean vote below `threshold`, or among the lowest `share` of all.

    A share of N pairs is rounded to a whole number; of equal means the earlier pair counts as lower.
    """
    if share is None:
        return mean < threshold
    found = np.zeros(len(mean), dtype=bool)
    found[np.argsort(mean, kind="stable")[: round(share * len(mean))]] = True
    return found


@dataclass(frozen=True)
class Treated:
    """What the loss is to do with every pair: three arrays of shape [N]."""

    margin: Floats
    target: Floats
    weight: Floats


def vote_margin(mean: Floats) -> Floats:
    """Mean votes as margins: divided by the mean of their absolute values, cut to ±`MAX_MARGIN`.

    Rewards have no unit of their own. The sign stays: a negative margin is what keeps a suspect pair from
    pulling its rewards apart.
    """
    scale = np.abs(mean).mean()
    if scale == 0.0:
        return np.zeros_like(mean)
    return np.clip(mean / scale, -MAX_MARGIN, MAX_MARGIN)


def treat(kind: Treatment, mean: Floats, suspect: NDArray[np.bool_], alpha: float = 0.5) -> Treated:
    """Apply a treatment, given mean votes and which pairs are suspect."""
    zeros, ones = np.zeros(len(mean)), np.ones(len(mean))
    targets = {"flip": 0.0, "smooth": 1.0 - alpha, "smooth_margin": 1.0 - alpha}
    return Treated(
        margin=vote_margin(mean) if kind in ("margin", "smooth_margin") else zeros,
        target=np.where(suspect, targets.get(kind, 1.0), ones),
        weight=np.where(suspect & (kind == "drop"), 0.0, ones),
    )


def ranking_auc(mean: Floats, wrong: NDArray[np.bool_]) -> float:
    """Chance that a wrong pair has a lower mean vote than a right one, ties counted half.

    The Mann–Whitney statistic over the product of the two numbers; NaN with only one kind of pair.
    """
    low, high = mean[wrong], np.sort(mean[~wrong])
    if not len(low) or not len(high):
        return float("nan")
    above = len(high) - np.searchsorted(high, low, side="right")
    ties = np.searchsorted(high, low, side="right") - np.searchsorted(high, low, side="left")
    return float((above + 0.5 * ties).sum() / (len(low) * len(high)))
