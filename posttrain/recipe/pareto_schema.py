"""The part of the recipe's schema about adaptive decoding: metric `pareto` of an evaluation."""

from __future__ import annotations

from pydantic import Field

from posttrain.recipe.data_schema import Section

FORECAST_METRICS = ("forecasts", "pareto")
"""Metrics of models that a stage `zip_rc` has trained."""


class ParetoConfig(Section):
    """Metric `pareto`: accuracy against compute and latency for ways to spend several samples of a problem.

    All of them are played on the stage's own `samples`: what a policy would not have generated is not
    charged.
    """

    interval: int = Field(default=64, ge=1)
    """Tokens between two decisions. 64 as in the paper; for short tasks about a tenth of a solution."""
    alphas: list[float] = Field(default=[0.1, 1.0], min_length=1)
    """Shares of compute in the cost: 0.1 minds latency, 1 only compute. The paper has both."""
    betas: list[float] = Field(default=[0.003, 0.01, 0.03, 0.1, 0.3], min_length=1)
    """Prices of one average sample in units of reward; around the paper's 0.01."""
    thresholds: list[float] = Field(default=[0.1, 0.2, 0.4])
    """Threshold pruning gives up samples with an expected reward below these. The paper has 0.4."""
    early_stops: list[float] = Field(default=[0.6, 0.8, 0.9])
    """Early stop ends a problem when a finished sample has at least this expected reward."""
    difficulty: str | None = None
    """Numeric column of the data that says how hard a problem is; None takes the share of samples that are
    wrong."""
