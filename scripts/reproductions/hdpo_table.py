"""HDPO against coupled rewards where everything can be computed: a policy that is a table.

The policy is a softmax over 0, 1 or 2 calls with shared logits and logits for each of three types of prompt;
how often a number of calls leads to the right answer is given. One step takes 32 prompts with 16 completions
and the exact policy gradient. Regime B has a noisy verifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from reproductions.common import claim

from posttrain.methods.hdpo import economy, efficiency_advantages
from posttrain.training.advantages import Floats, group_advantages

SEEDS = (0, 1, 2, 3, 4)
PROMPTS, COMPLETIONS, STEPS = 32, 16, 1500
MIX = np.array([0.6, 0.2, 0.2])
START = np.array([-1.2, 1.2, 0.4])
REGIMES = {
    "A": np.array([[0.95, 0.95, 0.95], [0.6, 0.9, 0.9], [0.05, 0.9, 0.92]]),
    "B": np.array([[0.7, 0.7, 0.7], [0.4, 0.7, 0.7], [0.05, 0.7, 0.72]]),
}
"""Probability of a right answer by type of prompt (easy, medium, hard) and number of calls."""


@dataclass(frozen=True)
class Arm:
    """What is done with the accuracy and the calls of a completion."""

    kind: Literal["grpo", "coupled", "penalty", "unconditional", "all", "qualifying"]
    weight: float = 0.0

    @property
    def name(self) -> str:
        """As in the table."""
        if self.kind == "grpo":
            return "grpo"
        prefix = "hdpo " if self.kind in ("all", "qualifying") else ""
        return f"{prefix}{self.kind} {self.weight:g}"


ARMS = {
    "A": (
        Arm("grpo"),
        *(Arm("coupled", weight) for weight in (0.02, 0.15, 0.5, 2.0)),
        *(Arm("penalty", weight) for weight in (0.02, 0.5, 1.0)),
        Arm("unconditional", 0.15),
        *(Arm("all", weight) for weight in (0.15, 0.5)),
        *(Arm("qualifying", weight) for weight in (0.05, 0.15)),
    )
}
ARMS["B"] = tuple(arm for arm in ARMS["A"] if arm != Arm("penalty", 1.0))


@dataclass(frozen=True)
class Outcome:
    """The final policy: tool use by type, accuracy and mean calls over the mix."""

    use: Floats
    accuracy: float
    calls: float


def weights_of(arm: Arm, correct: Floats, calls: Floats, groups: Floats) -> Floats:
    """What each completion's gradient is multiplied by [completions]."""
    right = correct > 0
    rewards = 0.9 * correct + 0.1
    saved = economy(calls, right)
    if arm.kind == "coupled":
        rewards = rewards + arm.weight * saved
    elif arm.kind == "penalty":
        rewards = rewards - arm.weight * calls
    weights = group_advantages(rewards, groups, eps=1e-6) / len(rewards)
    if arm.kind in ("unconditional", "all", "qualifying"):
        everyone = np.ones(len(right), dtype=bool)
        advantages = efficiency_advantages(saved, everyone if arm.kind == "unconditional" else right, groups)
        active = (np.abs(advantages) > 1e-9).sum()
        divisor = max(active, 1) if arm.kind == "qualifying" else len(rewards)
        weights = weights + arm.weight * advantages / divisor
    return weights


def train(arm: Arm, regime: str, seed: int, steps: int = STEPS) -> Outcome:
    """Train a table from the start policy, which calls a tool 94 % of the time."""
    success = REGIMES[regime]
    rng = np.random.default_rng(seed)
    shared, own = START.copy(), np.zeros((3, 3))
    groups = np.repeat(np.arange(PROMPTS), COMPLETIONS)
    for _ in range(steps):
        types = rng.choice(3, PROMPTS, p=MIX)
        chances = softmax(shared + own[types])
        drawn = rng.random((PROMPTS, COMPLETIONS, 1)) > chances.cumsum(1)[:, None, :]
        calls = drawn.sum(2).clip(0, 2)
        correct = rng.random((PROMPTS, COMPLETIONS)) < success[types[:, None], calls]
        weights = weights_of(arm, correct.ravel().astype(float), calls.ravel().astype(float), groups)
        chosen = np.eye(3)[calls] - chances[:, None, :]
        gradient = (weights.reshape(PROMPTS, COMPLETIONS)[:, :, None] * chosen).sum(1)
        for kind in range(3):
            own[kind] += 0.9 * gradient[types == kind].sum(0)
        shared += 0.3 * gradient.sum(0)
    chances = softmax(shared + own)
    return Outcome(
        use=1 - chances[:, 0],
        accuracy=float(MIX @ (chances * success).sum(1)),
        calls=float(MIX @ (chances * np.arange(3)).sum(1)),
    )


def softmax(logits: Floats) -> Floats:
    """Along the last axis."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def selective(outcome: Outcome, grpo: Outcome) -> bool:
    """Tools where they pay and not elsewhere, at no loss of accuracy worth the name."""
    easy, _, hard = outcome.use
    return bool(easy <= 0.1 and hard >= 0.9 and outcome.accuracy >= grpo.accuracy - 0.02)


def measure(seeds: Sequence[int], fast: bool) -> dict[str, Any]:
    """The whole table; about two minutes for each seed."""
    steps = 20 if fast else STEPS
    arms: dict[str, Any] = {}
    passes: dict[str, list[bool]] = {}
    for regime, listed in ARMS.items():
        found = {arm: [train(arm, regime, seed, steps) for seed in seeds] for arm in listed}
        for arm, outcomes in found.items():
            arms[f"{regime}: {arm.name}"] = {
                "use": np.mean([outcome.use for outcome in outcomes], 0).round(3).tolist(),
                "accuracy": [round(outcome.accuracy, 4) for outcome in outcomes],
                "calls": [round(outcome.calls, 3) for outcome in outcomes],
            }
            verdicts = [selective(a, b) for a, b in zip(outcomes, found[Arm("grpo")], strict=True)]
            passes.setdefault(arm.name, []).append(all(verdicts))
    both = {name: all(verdicts) for name, verdicts in passes.items()}
    failing = [
        name for name, passed in both.items() if not passed and name.startswith(("coupled", "penalty"))
    ]
    return {
        "arms": arms,
        "passes_in_both_regimes": both,
        "claims": [
            claim(
                "hdpo all 0.15 is selective in both regimes",
                "yes",
                [both["hdpo all 0.15"]],
                both["hdpo all 0.15"],
            ),
            claim("a coupled weight or penalty fails in one", "at least 1", [len(failing)], bool(failing)),
        ],
    }
