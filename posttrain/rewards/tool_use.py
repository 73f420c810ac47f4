"""Rewards that see what tools a completion used: for comparisons with methods that keep cost apart.

In a recipe: `{name: tool_calls, from: posttrain.rewards.tool_use, weight: -0.1}`.
"""

from __future__ import annotations

from posttrain.rewards.registry import reward
from posttrain.rollout.types import Completion, Example


@reward("tool_calls", version="1", deterministic=False)
def tool_calls(completion: Completion, example: Example) -> float:
    """Number of tool calls, those that failed included."""
    return float(len(completion.tool_calls))


@reward("tool_economy", version="1", range=(0.0, 1.0), deterministic=False)
def tool_economy(completion: Completion, example: Example) -> float:
    """1 / (1 + calls)."""
    return 1.0 / (1.0 + len(completion.tool_calls))
