"""Curves for drawing: smoothed, thinned, and named for people."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.report.run_folder import Array, Series, Stage

MAX_POINTS = 500
"""Points of a curve in the report: more than a chart has pixels for."""
MIN_SMOOTHED = 8
"""A curve of fewer points is drawn as it is."""


@dataclass(frozen=True)
class Chart:
    """A chart of one or more metrics. `lines` are (metric, label); `form` says how values are written."""

    title: str
    about: str
    lines: tuple[tuple[str, str], ...]
    form: str = "number"
    wide: bool = False


ENTROPY = Chart("Entropy", "Mean entropy of the next-token distribution, in nats.", (("entropy", "entropy"),))
LOSS = Chart("Loss", "Mean loss of a step.", (("loss", "loss"),), "fine")
TOKEN_ACCURACY = Chart(
    "Token accuracy",
    "Share of demonstration tokens the model would have chosen.",
    (("mean_token_accuracy", "accuracy"),),
    "percent",
)
OPTIMISER = (
    Chart("Gradient norm", "Before clipping.", (("grad_norm", "norm"),), "fine"),
    Chart("Learning rate", "As scheduled.", (("learning_rate", "rate"),), "fine"),
)
SUPERVISED = (("Learning", (LOSS, TOKEN_ACCURACY, ENTROPY, *OPTIMISER)),)
LEARNING = (
    Chart("Reward", "Mean weighted reward of a step's completions.", (("reward", "reward"),), wide=True),
    Chart(
        "Completion length",
        "Tokens the policy wrote.",
        (("completions/mean_length", "mean"), ("completions/max_length", "longest")),
        "tokens",
    ),
    ENTROPY,
    Chart("KL to the reference", "k3 estimate per token, in nats.", (("kl", "KL"),), "fine"),
    Chart("Reward spread", "Standard deviation of the rewards of a step.", (("reward_std", "std"),)),
)
HEALTH = (
    Chart(
        "Samples that teach little",
        "Share of completions cut at the token cap, of groups whose rewards are all equal, and of samples "
        "without a score.",
        (
            ("completions/truncated", "truncated"),
            ("groups/zero_variance", "zero variance"),
            ("rewards/unscored", "unscored"),
        ),
        "percent",
    ),
    Chart(
        "Engine–trainer mismatch",
        "Mean absolute difference of the log-probs that the engine sampled with and the trainer computed.",
        (("sampling/logprob_difference", "difference"),),
        "fine",
    ),
    Chart(
        "Importance ratio",
        "Mean correction weight between engine and trainer; 1 is no mismatch.",
        (("sampling/importance_ratio", "ratio"),),
        "fine",
    ),
    Chart(
        "Clipped ratios",
        "Share of tokens whose ratio was clipped.",
        (("ratio/clipped", "clipped"),),
        "percent",
    ),
)
SELF_PREDICTIONS = (
    Chart(
        "Pass rate",
        "Mean over a step's problems: what the policy says before solving them, and what it does.",
        (("masa/rate_predicted", "predicted"), ("masa/rate_true", "true")),
        "percent",
    ),
    Chart(
        "Rank correlation",
        "Spearman's, over a step's problems, of predictions and truth.",
        (("masa/rate_spearman", "pass rate"), ("masa/length_spearman", "length")),
    ),
    Chart("Error of the pass rate", "Mean absolute error, of 1.", (("masa/rate_mae", "error"),)),
    Chart(
        "Error of the length", "Mean absolute error, in tokens.", (("masa/length_mae", "error"),), "tokens"
    ),
    Chart(
        "Right parts of predictions",
        "Notions that more right than wrong solutions contain, lengths within the range of the right ones, "
        "and answers of which every part can be read.",
        (("masa/notion_precision", "notions"), ("masa/in_range", "lengths"), ("masa/complete", "complete")),
        "percent",
    ),
    Chart(
        "Gate",
        "Problems left out, and of those that were rolled out all the same the ones that would have taught "
        "something.",
        (("masa/gate/share", "left out"), ("masa/gate/wrong", "wrongly")),
        "percent",
    ),
    Chart(
        "Cap",
        "Capped solutions that were cut, and right uncapped ones that would have been.",
        (("masa/cutoff/cut", "cut"), ("masa/cutoff/false_rate", "right ones")),
        "percent",
    ),
    Chart(
        "Tokens",
        "Sampled in a step.",
        (("masa/tokens/solution", "solutions"), ("masa/tokens/meta", "self-predictions")),
        "tokens",
    ),
)
MIXTURE = (
    Chart(
        "Weight of imitation",
        "Of the demonstrations' loss; the policy gradient has the rest of 1.",
        (("amft/mu", "mu"),),
    ),
    Chart(
        "What each loss climbs",
        "Of the held-out reward, along its own gradient: imitation gains weight while its line is the upper.",
        (("amft/climb/imitation", "imitation"), ("amft/climb/policy", "policy gradient")),
        "fine",
    ),
    Chart("Meta-gradient", "On the scale that the recipe asks for.", (("amft/meta_gradient", "mu"),), "fine"),
    Chart("Held-out reward", "Of prompts that nothing is trained on.", (("amft/utility", "reward"),)),
    Chart(
        "Entropy and its target",
        "In nats a token, estimated from the completions.",
        (("amft/entropy", "entropy"), ("amft/target_entropy", "target")),
    ),
)
TEACHING = (
    Chart(
        "Gains of students",
        "On hard problems, over the baseline: of the best set of a step, and the moving average of all that "
        "decides about promotions.",
        (("reward/best_set", "best set"), ("reward/moving_average", "moving average")),
        "fine",
    ),
    Chart(
        "Baseline",
        "Its accuracy on the hard problems of a step; it rises with promotions.",
        (("baseline/accuracy", "accuracy"),),
        "percent",
    ),
    Chart("Promotions", "So far.", (("promotions", "promotions"),)),
    Chart(
        "Proposals",
        "Share of the teacher's that can be read, and of different ones among those that are used.",
        (("teacher/readable", "readable"), ("teacher/unique", "different")),
        "percent",
    ),
    Chart("Teacher's KL", "To the base model, per token, in nats.", (("teacher/kl", "KL"),), "fine"),
)
ELSEWHERE = ("seconds/", "tokens/", "masa/level/")
"""Metrics that other parts of the report show."""


def stage_charts(stage: Stage) -> list[dict[str, Any]]:
    """The charts of one training stage, for drawing: groups of a title and non-empty charts.

    Metrics without a chart of their own, such as those of methods, get one each under "Other metrics".
    """
    groups = SUPERVISED if stage.kind == "sft" else _policy_groups(stage)
    named = {metric for _, charts in groups for chart in charts for metric, _ in chart.lines}
    rest = [metric for metric in stage.metrics if metric not in named and not metric.startswith(ELSEWHERE)]
    other = tuple(Chart(metric, "", ((metric, metric),), "fine") for metric in rest)
    drawn = [
        {"title": title, "charts": _drawable(stage, charts)}
        for title, charts in (*groups, ("Other metrics", other))
    ]
    return [group for group in drawn if group["charts"]]


def _policy_groups(stage: Stage) -> tuple[tuple[str, tuple[Chart, ...]], ...]:
    """The charts of a policy stage; each reward has a line of its own when there are several."""
    means = [name for name in stage.metrics if name.startswith("rewards/") and name.endswith("/mean")]
    lines = tuple((name, name.removeprefix("rewards/").removesuffix("/mean")) for name in means)
    each = Chart("Each reward", "Mean of each reward function, unweighted.", lines)
    learning = (LEARNING[0], each, *LEARNING[1:]) if len(means) > 1 else LEARNING
    own = (
        ("Self-predictions", SELF_PREDICTIONS),
        ("Imitation and reinforcement", MIXTURE),
        ("Teacher and students", TEACHING),
    )
    return ("Learning", learning), *own, ("Health", HEALTH), ("Optimisation", (*OPTIMISER, LOSS))


def _drawable(stage: Stage, charts: Iterable[Chart]) -> list[dict[str, Any]]:
    drawn = []
    for chart in charts:
        lines = [
            {"label": label, **curve(stage.metrics[metric])}
            for metric, label in chart.lines
            if np.isfinite(stage.values(metric)).any()
        ]
        if lines:
            drawn.append(
                {
                    "title": chart.title,
                    "about": chart.about,
                    "form": chart.form,
                    "wide": chart.wide,
                    "lines": lines,
                    "summary": _in_words(chart, stage),
                }
            )
    return drawn


def _in_words(chart: Chart, stage: Stage) -> str:
    """What a screen reader says instead of the picture."""
    parts = []
    for metric, label in chart.lines:
        values = stage.values(metric)
        if len(values):
            parts.append(
                f"{label} from {values[0]:.4g} to {values[-1]:.4g}, lowest {values.min():.4g}, "
                f"highest {values.max():.4g}"
            )
    return f"{chart.title} over {stage.steps} steps: {'; '.join(parts)}."


def curve(series: Series) -> dict[str, list[float | None]]:
    """Steps, raw values and smoothed values of a series, thinned to MAX_POINTS. None stands for NaN."""
    raw = np.where(np.isfinite(series.values), series.values, np.nan)
    smoothed = smooth(raw)
    thin = np.unique(np.linspace(0, len(raw) - 1, min(len(raw), MAX_POINTS)).round().astype(int))
    return {
        "x": series.steps[thin].astype(int).tolist(),
        "raw": rounded(raw[thin]),
        "smooth": rounded(smoothed[thin]) if len(raw) >= MIN_SMOOTHED else [],
    }


def smooth(values: Array) -> Array:
    """Gaussian-weighted running mean over about a fifteenth of the run, gaps left out.

    Centred: unlike an exponential average it does not show a change later than it happened.
    """
    sigma = max(1.0, len(values) / 30)
    reach = min(int(3 * sigma), len(values) - 1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    present = np.isfinite(values)

    def blur(x: Array) -> Array:
        return np.convolve(x, kernel)[reach : reach + len(x)]

    weight = blur(present.astype(float))
    result = np.full(len(values), np.nan)
    np.divide(blur(np.where(present, values, 0.0)), weight, out=result, where=weight > 1e-9)
    return result


def rounded(values: Array, digits: int = 5) -> list[float | None]:
    """Significant digits enough for a picture, None for what is not a number."""
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values]
