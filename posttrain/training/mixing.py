"""How much imitation: the mathematics of AMFT's mixing weight mu. Pure functions and one small record.

The loss is (1 - mu) · L_R + mu · L_S, so a step of gradient descent with rate a ends at a point that is
linear in mu: d theta' / d mu = -a (g_S - g_R). With v the gradient of a utility U this gives, without any
second derivative,

    dU / dmu = -a <v, g_S - g_R> = a (<v, -g_S> - <v, -g_R>)

what a step of imitation climbs of U minus what a step of the policy gradient does (He et al. 2025,
arXiv:2508.06944, equations 4 and 5, with v at the point before the step, an error of order a²).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Scale = Literal["cosine", "raw", "per_lr"]

TINY = 1e-12
"""A norm below this is a gradient that is not there."""


@dataclass(frozen=True)
class Slopes:
    """Inner products and norms that the meta-gradient is made of.

    `imitation` and `policy` are <v, g_S> and <v, g_R>: minus how fast the utility rises where each loss,
    with weight 1, is descended.
    """

    imitation: float
    policy: float
    utility_norm: float
    """|v|"""
    difference_norm: float
    """|g_S - g_R|"""


def meta_gradient(slopes: Slopes, scale: Scale, learning_rate: float) -> float | None:
    """dU / dmu on one of three scales; None without evidence, where a gradient is missing or not finite.

    raw       -a <v, g_S - g_R>
    per_lr       -<v, g_S - g_R>
    cosine       -<v, g_S - g_R> / (|v| |g_S - g_R|), in [-1, 1]
    """
    parts = (slopes.imitation, slopes.policy, slopes.utility_norm, slopes.difference_norm)
    if not all(map(math.isfinite, parts)) or min(slopes.utility_norm, slopes.difference_norm) < TINY:
        return None
    climb = slopes.policy - slopes.imitation
    if scale == "cosine":
        return max(-1.0, min(1.0, climb / (slopes.utility_norm * slopes.difference_norm)))
    return climb * (learning_rate if scale == "raw" else 1.0)


def entropy_pull(entropy: float, target: float, deadband: float = 0.0) -> float:
    """target - entropy, the sign of the paper's equation 6; 0 within the dead-band or without an entropy."""
    gap = target - entropy
    return gap if math.isfinite(gap) and abs(gap) >= deadband else 0.0


def moved(mu: float, by: float, low: float, high: float) -> float:
    """mu + by within its bounds. Clipped and not squashed, so that it comes back from a bound at once."""
    return min(max(mu + by, low), high)


def scheduled(schedule: dict[int, float], step: int) -> float:
    """The value whose step is the last one not after `step`."""
    return schedule[max(begin for begin in schedule if begin <= step)]
