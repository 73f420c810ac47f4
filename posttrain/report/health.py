"""Is the run to be trusted? Each check looks at one thing and says in plain words what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from posttrain.report.run_folder import Array, Run, Stage
from posttrain.report.words import percent

TRUNCATED = 0.2
ZERO_VARIANCE = 0.6
UNSCORED = 0.01
CLIPPED = 0.3
MISMATCH = 0.05
"""Nats; bfloat16 engines usually stay below 0.02, float32 ones below 0.001."""
ENTROPY_LEFT = 0.1
"""Share of the first entropy below which the policy has all but stopped exploring."""
COLLAPSED = 0.5
"""Share of the last steps whose predicted pass rates were the same for all problems."""
TREND = 20
"""Steps from which on the first and the last part of a curve are compared."""

Level = Literal["problem", "caution"]


@dataclass(frozen=True)
class Finding:
    """Something a reader should know before believing the numbers."""

    level: Level
    stage: str
    text: str


def findings(run: Run) -> list[Finding]:
    """Everything the checks found, problems first."""
    found = [
        Finding(level, stage.name, text)
        for stage in run.stages
        for level, check in CHECKS
        if (text := check(stage)) is not None
    ]
    found += [
        Finding("problem", entry["stage"], text)
        for entry in run.summary.get("evaluations") or []
        if (text := _unscored_evaluation(entry)) is not None
    ]
    if not run.finished:
        text = "There is no summary.json: the run is still going, or was stopped early."
        found.append(Finding("caution", "run", text))
    return sorted(found, key=lambda finding: finding.level != "problem")


def _early(values: Array) -> float:
    """Mean of the first tenth of a curve, at least five steps; NaN of an empty one."""
    return float(values[: max(5, len(values) // 10)].mean()) if len(values) else math.nan


def _recent(values: Array) -> float:
    """Mean of the last tenth of a curve, at least five steps; NaN of an empty one."""
    return float(values[-max(5, len(values) // 10) :].mean()) if len(values) else math.nan


def _not_finite(stage: Stage) -> str | None:
    broken = {
        metric: int((~np.isfinite(stage.metrics[metric].values)).sum())
        for metric in ("loss", "grad_norm")
        if metric in stage.metrics
    }
    parts = [f"{name} in {n} step{'s' if n > 1 else ''}" for name, n in broken.items() if n]
    return f"Not a finite number: {' and '.join(parts)}. Is the learning rate too high?" if parts else None


def _unscored(stage: Stage) -> str | None:
    values = stage.values("rewards/unscored")
    if not len(values) or values.mean() <= UNSCORED:
        return None
    share = percent(float(values.mean()))
    return f"{share} of the samples could not be scored. The rollouts below show the rewards' errors."


def _mismatch(stage: Stage) -> str | None:
    difference = _recent(stage.values("sampling/logprob_difference"))
    if not difference > MISMATCH:
        return None
    return (
        f"The engine's log-probs differ from the trainer's by {difference:.2g} on average: the policy is "
        "trained on samples of another distribution."
    )


def _truncated(stage: Stage) -> str | None:
    share = _recent(stage.values("completions/truncated"))
    if not share > TRUNCATED:
        return None
    return (
        f"{percent(share, 0)} of the last completions ran into the token cap and were cut. Raise "
        "rollout.max_tokens, or add a length penalty if the policy rambles."
    )


def _zero_variance(stage: Stage) -> str | None:
    share = _recent(stage.values("groups/zero_variance"))
    if not share > ZERO_VARIANCE:
        return None
    return (
        f"In {percent(share, 0)} of the last groups all completions got the same reward, so nothing was "
        "learned from them: the problems are too easy or too hard by now. dynamic_sampling replaces them."
    )


def _clipped(stage: Stage) -> str | None:
    share = _recent(stage.values("ratio/clipped"))
    if not share > CLIPPED:
        return None
    return (
        f"{percent(share, 0)} of the tokens were clipped: the policy moves further in a step than the "
        "clip range allows. Lower the learning rate or updates_per_batch."
    )


def _entropy(stage: Stage) -> str | None:
    values = stage.values("entropy")
    first, last = _early(values), _recent(values)
    if stage.kind != "policy" or len(values) < TREND or last > ENTROPY_LEFT * first:
        return None
    return (
        f"Entropy fell from {first:.2g} to {last:.2g}: the completions of a prompt are nearly all the same "
        "by now, and little is left to learn from. An entropy bonus or a larger clip_high keeps variety."
    )


def _predictions_collapsed(stage: Stage) -> str | None:
    if not _recent(stage.values("masa/collapsed")) > COLLAPSED:
        return None
    return (
        "The policy came to predict the same pass rate for all problems: its predictions no longer tell "
        "problems apart, and a gate would leave out all or none."
    )


def _reward_flat(stage: Stage) -> str | None:
    values = stage.values("reward")
    first, last = _early(values), _recent(values)
    if len(values) < TREND or last > first:
        return None
    return f"The reward did not rise: {first:.3g} in the first steps, {last:.3g} in the last."


def _unscored_evaluation(entry: Mapping[str, Any]) -> str | None:
    unscored, samples = entry["unscored"], entry["problems"] * entry["samples"]
    if unscored <= UNSCORED * samples:
        return None
    return f"{unscored:,} of the samples could not be scored and are left out of the metrics."


CHECKS: tuple[tuple[Level, Callable[[Stage], str | None]], ...] = (
    ("problem", _not_finite),
    ("problem", _unscored),
    ("problem", _mismatch),
    ("caution", _truncated),
    ("caution", _zero_variance),
    ("caution", _clipped),
    ("caution", _entropy),
    ("caution", _reward_flat),
    ("caution", _predictions_collapsed),
)
