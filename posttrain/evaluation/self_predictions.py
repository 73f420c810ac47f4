"""A model's self-predictions against its own solutions: calibration over the problems of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from posttrain.data.self_predictions import meta_example, parse_prediction, problem_text
from posttrain.recipe.meta_schema import MetaEvaluation
from posttrain.rollout.types import Example, Rollout, RolloutRequest, derive_seed
from posttrain.training.self_alignment import (
    Assessment,
    Solutions,
    calibration,
    calibration_bins,
    meta_reward,
)

ROLE = "meta"


def questions(
    requests: Sequence[RolloutRequest],
    config: MetaEvaluation,
    encode: Callable[[Example], tuple[int, ...]],
) -> list[RolloutRequest]:
    """For every request for solutions the one for self-predictions of the same problem, in the same group."""
    asked = []
    for request in requests:
        cap, seed = request.sampling.max_tokens, derive_seed(request.sampling.seed, ROLE)
        example = meta_example(request.example, config.question, cap)
        sampling = replace(request.sampling, n=config.samples, max_tokens=config.max_tokens or cap, seed=seed)
        asked.append(RolloutRequest(encode(example), example, request.group, sampling, ROLE))
    return asked


def self_assessment(
    solutions: Sequence[tuple[Rollout, bool | None]], answers: Sequence[Rollout], config: MetaEvaluation
) -> dict[str, Any]:
    """What an evaluation's summary says: `calibration` of the means over each problem's self-predictions,
    and by predicted level how many problems there are and how often they are solved.

    Args:
        solutions: with their outcome; a truncated one is wrong, an unscored one is left out.
        answers: to the questions about the same problems, found by group.
        config: of the metric.
    """
    levels = config.question.levels
    solved: dict[str, list[tuple[Rollout, bool]]] = {}
    for rollout, outcome in solutions:
        if outcome is not None:
            solved.setdefault(rollout.request.group, []).append((rollout, outcome and not rollout.truncated))
    told: dict[str, list[str]] = {}
    for answer in answers:
        told.setdefault(answer.request.group, []).append(answer.completion.text)
    assessments = [_assess(solved[group], texts, config) for group, texts in told.items() if group in solved]
    bins: Mapping[int, tuple[int, float]] = calibration_bins(assessments, levels)
    return {
        "problems": len(assessments),
        "samples": config.samples,
        "levels": levels,
        **calibration(assessments),
        "bins": [{"level": level, "problems": n, "truth": truth} for level, (n, truth) in bins.items()],
    }


def _assess(
    solved: Sequence[tuple[Rollout, bool]], texts: Sequence[str], config: MetaEvaluation
) -> Assessment:
    rollouts = [rollout for rollout, _ in solved]
    own = Solutions(
        [rollout.completion.text for rollout in rollouts],
        [outcome for _, outcome in solved],
        [len(rollout.completion.token_ids) for rollout in rollouts],
    )
    problem = problem_text(rollouts[0].request.example, config.question)
    levels = config.question.levels
    predictions = [parse_prediction(text, config.question) for text in texts]
    rewards = [meta_reward(made, own, problem, levels, config.reward) for made in predictions]
    return Assessment.of(predictions, rewards, own, levels)
