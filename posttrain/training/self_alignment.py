"""Self-alignment: what a self-prediction is worth against the policy's own solutions, and what it controls.

Kim et al., "Meta-awareness enhances reasoning models: self-alignment reinforcement learning"
(arXiv:2510.03259; v1 calls the method MASA, v2 MAPR). Pure functions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from posttrain.data.self_predictions import Prediction
from posttrain.recipe.meta_schema import AlignmentConfig

MIN_WORD = 3


@dataclass(frozen=True)
class Solutions:
    """The solution rollouts of one problem: texts, outcomes, and lengths in tokens, end token included."""

    texts: Sequence[str]
    correct: Sequence[bool]
    lengths: Sequence[int]

    @property
    def pass_rate(self) -> float:
        """Share that is correct."""
        return sum(self.correct) / len(self.correct)

    @property
    def correct_lengths(self) -> list[int]:
        """Lengths of the correct ones; the wrong ones define nothing."""
        return [length for length, correct in zip(self.lengths, self.correct, strict=True) if correct]


@dataclass(frozen=True)
class MetaReward:
    """The three parts of the reward of one self-prediction, each in [0, 1]."""

    length: float
    difficulty: float
    notion: float

    @property
    def total(self) -> float:
        """Their mean."""
        return (self.length + self.difficulty + self.notion) / 3


def meta_reward(
    prediction: Prediction, solutions: Solutions, problem: str, levels: int, config: AlignmentConfig
) -> MetaReward:
    """The reward of a self-prediction; a part that is missing, or cannot be computed, is worth 0."""
    return MetaReward(
        length_reward(prediction.length, solutions, config),
        difficulty_reward(prediction.pass_rate, solutions.pass_rate, levels, config),
        notion_reward(prediction.notions, solutions, problem, config),
    )


def length_reward(length: int | None, solutions: Solutions, config: AlignmentConfig) -> float:
    """1 if the length lies between the shortest and the longest correct solution."""
    correct = solutions.correct_lengths
    if length is None or not correct:
        return 0.0
    if config.length_bounds == "strict":
        return float(min(correct) < length < max(correct))
    return float(min(correct) <= length <= max(correct))


def difficulty_reward(rate: int | None, truth: float, levels: int, config: AlignmentConfig) -> float:
    """base^|p - rate / levels|: 1 at the truth. Not a proper score: it pays to name the likeliest value."""
    return 0.0 if rate is None else config.base ** abs(truth - rate / levels)


def notion_reward(
    notions: Sequence[str], solutions: Solutions, problem: str, config: AlignmentConfig
) -> float:
    """Share of the notions that more correct than wrong solutions contain: counts of solutions, not rates.

    Notions that the problem statement contains do not count at all.
    """
    named = usable_notions(notions, problem, config)
    if not named:
        return 0.0
    right = [text for text, correct in zip(solutions.texts, solutions.correct, strict=True) if correct]
    wrong = [text for text, correct in zip(solutions.texts, solutions.correct, strict=True) if not correct]
    good = [
        sum(contains(text, notion, config) for text in right)
        > sum(contains(text, notion, config) for text in wrong)
        for notion in named
    ]
    return sum(good) / len(good)


def usable_notions(notions: Sequence[str], problem: str, config: AlignmentConfig) -> list[str]:
    """The notions in their normal form, each once, without those that the problem already names."""
    named = [singular(notion) for notion in notions]
    if config.notion_match == "words":
        named = [notion.casefold() for notion in named if len(notion) >= MIN_WORD]
    return [notion for notion in dict.fromkeys(named) if not contains(problem, notion, config)]


def contains(text: str, notion: str, config: AlignmentConfig) -> bool:
    """Whether a text has a notion in normal form: as a part of it, or at the beginning of a word."""
    if config.notion_match == "substring":
        return notion in text
    return re.search(rf"(?<!\w){re.escape(notion)}", text.casefold()) is not None


def singular(phrase: str) -> str:
    """A phrase without the plural ending of its last word, by the released code's rule."""
    low = phrase.lower()
    if low.endswith("series"):
        return phrase
    if low.endswith("ies"):
        return f"{phrase[:-3]}y"
    if low.endswith(("ches", "shes", "xes", "zes", "oes")):
        return phrase[:-2]
    return phrase[:-1] if low.endswith("s") and not low.endswith("ss") else phrase


@dataclass(frozen=True)
class Forecast:
    """What the self-predictions of one problem say together; NaN where none could be read.

    `rate` is the mean predicted pass rate in [0, 1], `spread` its population standard deviation, `lengths`
    are the predicted ones.
    """

    rate: float
    spread: float
    valid: int
    asked: int
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, predictions: Sequence[Prediction], levels: int) -> Forecast:
        """From all predictions of a problem."""
        rates = [p.pass_rate / levels for p in predictions if p.pass_rate is not None]
        return cls(
            rate=float(np.mean(rates)) if rates else math.nan,
            spread=float(np.std(rates)) if rates else math.nan,
            valid=len(rates),
            asked=len(predictions),
            lengths=tuple(p.length for p in predictions if p.length is not None),
        )

    @property
    def length(self) -> float:
        """Mean predicted length."""
        return float(np.mean(self.lengths)) if self.lengths else math.nan


def is_gated(
    forecast: Forecast, *, sigma: float = 0.1, tolerance: float = 1 / 16, min_valid: float = 0.5
) -> bool:
    """Whether the policy is sure that it would get all solutions of a problem right, or all wrong.

    v2's rule, spread < sigma and a mean of 0 or 1, with a tolerance: taken literally the mean would make
    sigma immaterial. Without it (v1), a sure prediction of one half would skip the most useful problems.
    """
    sure = forecast.valid > 0 and forecast.valid >= min_valid * forecast.asked and forecast.spread < sigma
    return sure and (forecast.rate < tolerance or forecast.rate > 1 - tolerance)


def length_limit(
    forecast: Forecast,
    max_tokens: int,
    multiplier: float = 2.0,
    statistic: Literal["mean", "median", "max"] = "mean",
    min_limit: int = 1,
) -> int:
    """The cap on a problem's solutions: a multiple of the predicted length, or `max_tokens` without one."""
    if not forecast.lengths:
        return max_tokens
    if statistic == "max":
        value = float(max(forecast.lengths))
    else:
        value = float(np.mean(forecast.lengths) if statistic == "mean" else np.median(forecast.lengths))
    return min(max_tokens, max(math.ceil(multiplier * value), min_limit))


@dataclass(frozen=True)
class Assessment:
    """One problem's forecast beside the truth; NaN where a side is unknown.

    `length` is the mean length of the correct solutions; `reward` has the means over the predictions.
    """

    rate: float
    truth: float
    predicted_length: float
    length: float
    reward: tuple[float, float, float]
    complete: float

    @classmethod
    def of(
        cls,
        predictions: Sequence[Prediction],
        rewards: Sequence[MetaReward],
        solutions: Solutions,
        levels: int,
    ) -> Assessment:
        """From the predictions of a problem, what they are worth, and its solutions."""
        forecast, lengths = Forecast.of(predictions, levels), solutions.correct_lengths
        parts = np.mean([(r.length, r.difficulty, r.notion) for r in rewards], axis=0).tolist()
        return cls(
            rate=forecast.rate,
            truth=solutions.pass_rate,
            predicted_length=forecast.length,
            length=float(np.mean(lengths)) if lengths else math.nan,
            reward=(parts[0], parts[1], parts[2]),
            complete=float(np.mean([p.complete for p in predictions])),
        )


def calibration(assessments: Sequence[Assessment]) -> dict[str, float]:
    """How well forecasts and truth agree over problems; what cannot be computed is left out.

    `*_spearman` are rank correlations, `*_mae` mean absolute errors (of the pass rate in [0, 1], of the
    length in tokens), `in_range` the share of lengths within the range of the correct solutions,
    `notion_precision` that of notions that more correct than wrong solutions contain.
    """
    found: dict[str, float] = {}
    rate, truth = _pairs([(a.rate, a.truth) for a in assessments])
    predicted, length = _pairs([(a.predicted_length, a.length) for a in assessments])
    for name, x, y in (("rate", rate, truth), ("length", predicted, length)):
        if len(x):
            found[f"{name}_mae"] = float(np.abs(x - y).mean())
        if not math.isnan(correlation := spearman(x, y)):
            found[f"{name}_spearman"] = correlation
    if len(rate):
        found |= {"rate_predicted": float(rate.mean()), "rate_true": float(truth.mean())}
        found["rate_spread"] = float(rate.std())
    solved = [a.reward[0] for a in assessments if not math.isnan(a.length)]
    if solved:
        found["in_range"] = float(np.mean(solved))
    if assessments:
        found["difficulty_reward"] = float(np.mean([a.reward[1] for a in assessments]))
        found["notion_precision"] = float(np.mean([a.reward[2] for a in assessments]))
        found["reward"] = float(np.mean([np.mean(a.reward) for a in assessments]))
        found["complete"] = float(np.mean([a.complete for a in assessments]))
    return found


def calibration_bins(assessments: Sequence[Assessment], levels: int) -> dict[int, tuple[int, float]]:
    """By the level that a mean prediction is nearest to: how many problems, and their mean true pass rate."""
    truths: dict[int, list[float]] = {}
    for a in assessments:
        if not math.isnan(a.rate):
            truths.setdefault(math.floor(a.rate * levels + 0.5), []).append(a.truth)
    return {level: (len(values), float(np.mean(values))) for level, values in sorted(truths.items())}


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation with mean ranks for ties; NaN when a side is constant or has fewer than two values."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    ordered = np.sort(values)
    below, up_to = np.searchsorted(ordered, values, "left"), np.searchsorted(ordered, values, "right")
    return (below + up_to - 1) / 2.0


def _pairs(values: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """The pairs in which neither side is NaN, as two arrays."""
    table = np.array(values, dtype=np.float64).reshape(-1, 2)
    known = table[~np.isnan(table).any(axis=1)]
    return known[:, 0], known[:, 1]
