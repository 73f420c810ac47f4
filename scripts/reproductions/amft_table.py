"""AMFT's controller where everything can be computed: a policy that is a table of logits.

Sixty contexts, answers of three tokens out of six, reward 1 if all are right. Demonstrations are wrong at
the last token in 80 % of the cases in 30 % of the contexts, so that imitation alone ends at 0.76. The losses,
their gradients and the utility, the mean probability of the right answer in every second context, are exact
but for the sampling of minibatches. 40 steps of imitation come first; plain gradient descent.

What the short sight of the meta-gradient costs is measured, too: `look_ahead` arms follow the utility after
that many steps, by brute force, and `slopes` compares the one-step estimate with brute force at any distance.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from reproductions.common import claim, paired_interval

from posttrain.training.advantages import Floats, group_advantages
from posttrain.training.mixing import Scale, Slopes, entropy_pull, meta_gradient, moved, scheduled

SEEDS = (0, 1, 2, 3, 4)
LENGTH, ACTIONS = 3, 6
RATE, DEMONSTRATIONS, PROMPTS, GROUP = 8.0, 64, 24, 8
STEPS, WARMUP = 600, 40
LOW, HIGH = 0.05, 0.95


def softmax(logits: Floats) -> Floats:
    """Over the last axis."""
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(-1, keepdims=True))


class World:
    """The right answers, and demonstrators with a blind spot. Policies are [contexts, LENGTH, ACTIONS]."""

    def __init__(self, contexts: int = 60, blind: float = 0.3, slips: float = 0.8):
        self.answers = np.random.default_rng(0).integers(0, ACTIONS, (contexts, LENGTH))
        self.blind = np.arange(contexts) < int(blind * contexts)
        self.slips = slips
        self.held_out = np.arange(0, contexts, 2)
        self.one_hot = np.eye(ACTIONS)[self.answers]

    def utility(self, policy: Floats, contexts: Any = slice(None)) -> float:
        """Mean probability of the right answer."""
        return float((policy[contexts] * self.one_hot[contexts]).sum(-1).prod(-1).mean())

    def utility_gradient(self, policy: Floats) -> Floats:
        """Of the utility over the held-out contexts."""
        gradient, own = np.zeros_like(policy), self.held_out
        chance = (policy[own] * self.one_hot[own]).sum(-1).prod(-1)
        gradient[own] = chance[:, None, None] * (self.one_hot[own] - policy[own]) / len(own)
        return gradient

    def demonstrate(self, contexts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Answers of the demonstrators."""
        wrong = self.blind[contexts] & (rng.random(len(contexts)) < self.slips)
        shown = self.answers[contexts].copy()
        shown[:, -1] = np.where(wrong, (shown[:, -1] + 1) % ACTIONS, shown[:, -1])
        return shown

    def imitation_gradient(self, policy: Floats, contexts: np.ndarray, shown: np.ndarray) -> Floats:
        """Of the negative log-likelihood, a mean over tokens."""
        gradient = np.zeros_like(policy)
        difference = policy[contexts] - np.eye(ACTIONS)[shown]
        np.add.at(gradient, contexts, difference / (len(contexts) * LENGTH))
        return gradient

    def policy_gradient(self, policy: Floats, rng: np.random.Generator) -> Floats:
        """Of the policy loss on fresh answers: advantages normalised in groups, a mean over tokens."""
        contexts = np.repeat(rng.integers(0, len(policy), PROMPTS), GROUP)
        drawn = rng.random((len(contexts), LENGTH, 1))
        answers = (policy[contexts].cumsum(-1) < drawn).sum(-1).clip(0, ACTIONS - 1)
        rewards = (answers == self.answers[contexts]).all(1).astype(float)
        groups = np.repeat(np.arange(PROMPTS), GROUP).tolist()
        advantages = group_advantages(rewards, groups)
        gradient = np.zeros_like(policy)
        difference = policy[contexts] - np.eye(ACTIONS)[answers]
        weights = advantages[:, None, None] / (len(contexts) * LENGTH)
        np.add.at(gradient, contexts, weights * difference)
        return gradient

    def gradients(
        self, policy: Floats, rng: np.random.Generator, imitate: bool = True, explore: bool = True
    ) -> tuple[Floats, Floats]:
        """Both losses' on a minibatch each; zeros for one that is left out."""
        nothing = np.zeros_like(policy)
        contexts = rng.integers(0, len(policy), DEMONSTRATIONS)
        imitation = (
            self.imitation_gradient(policy, contexts, self.demonstrate(contexts, rng)) if imitate else nothing
        )
        return imitation, self.policy_gradient(policy, rng) if explore else nothing


def entropy_of(policy: Floats) -> float:
    """Mean over contexts and tokens, in nats."""
    return float(-(policy * np.log(policy + 1e-12)).sum(-1).mean())


@dataclass(frozen=True)
class Arm:
    """What moves the weight. `rate` below 0 is the controller turned around; a schedule replaces it."""

    mu: float = 0.8
    rate: float = 0.05
    scale: Scale = "cosine"
    interval: int = 5
    utility: Literal["reward", "demonstrations"] = "reward"
    entropy_rate: float = 0.0
    warmup: int = WARMUP
    schedule: dict[int, float] | None = None
    look_ahead: int = 0
    """Steps after which the utility counts, by brute force; 0 is the estimate by inner products."""


@dataclass
class Trained:
    """How an arm did: the weight in every step, the utility every 50 steps and at the end."""

    final: float = 0.0
    mu: list[float] = field(default_factory=list)
    utilities: list[float] = field(default_factory=list)
    logits: list[Floats] = field(default_factory=list)


def train(
    arm: Arm, seed: int, steps: int = STEPS, world: World | None = None, keep: Sequence[int] = ()
) -> Trained:
    """Train one table; `keep` are steps before which its logits are kept."""
    world, rng = world or World(), np.random.default_rng(seed)
    logits, mu, target = np.zeros((len(world.answers), LENGTH, ACTIONS)), arm.mu, None
    found = Trained()
    for step in range(steps):
        policy = softmax(logits)
        if step in keep:
            found.logits.append(logits.copy())
        fixed = 1.0 if step < arm.warmup else arm.schedule and scheduled(arm.schedule, step)
        imitation, exploration = world.gradients(policy, rng, fixed != 0.0, fixed != 1.0)
        if fixed is None:
            entropy = entropy_of(policy)
            target = entropy if target is None else target
            if step % arm.interval == 0:
                slope = look_ahead(world, logits, mu, arm.look_ahead, (seed, step)) if arm.look_ahead else (
                    estimate(world, policy, imitation, exploration, arm, rng)
                )  # fmt: skip
                mu = moved(mu, arm.rate * (slope or 0.0), LOW, HIGH)
            mu = moved(mu, arm.entropy_rate * entropy_pull(entropy, target), LOW, HIGH)
        weight = mu if fixed is None else fixed
        logits = logits - RATE * ((1 - weight) * exploration + weight * imitation)
        found.mu.append(weight)
        if step % 50 == 49:
            found.utilities.append(world.utility(softmax(logits)))
    found.final = world.utility(softmax(logits))
    return found


def estimate(
    world: World, policy: Floats, imitation: Floats, exploration: Floats, arm: Arm, rng: np.random.Generator
) -> float | None:
    """The meta-gradient by inner products."""
    if arm.utility == "reward":
        climb = world.utility_gradient(policy)
    else:
        own = world.held_out
        climb = -world.imitation_gradient(policy, own, world.demonstrate(own, rng))
    difference = imitation - exploration
    slopes = Slopes(
        imitation=float((climb * imitation).sum()),
        policy=float((climb * exploration).sum()),
        utility_norm=float(np.linalg.norm(climb)),
        difference_norm=float(np.linalg.norm(difference)),
    )
    return meta_gradient(slopes, arm.scale, RATE)


def brute_force(world: World, logits: Floats, mu: float, steps: int, seed: Any, delta: float = 0.05) -> float:
    """dU/dmu after so many steps: two trainings with mu ± delta that draw the same random numbers."""
    ends = []
    for weight in (mu + delta, mu - delta):
        moving, rng = logits, np.random.default_rng(seed)
        for _ in range(steps):
            imitation, exploration = world.gradients(softmax(moving), rng)
            moving = moving - RATE * ((1 - weight) * exploration + weight * imitation)
        ends.append(world.utility(softmax(moving), world.held_out))
    return (ends[0] - ends[1]) / (2 * delta)


def look_ahead(world: World, logits: Floats, mu: float, steps: int, seed: Any) -> float:
    """The direction in which the utility after so many steps rises, in [-1, 1]."""
    return float(np.tanh(brute_force(world, logits, mu, steps, seed) / (0.002 * steps)))


def slopes(checkpoint: int, distances: Sequence[int], draws: int = 8, seed: int = 0) -> dict[str, Any]:
    """At a checkpoint of imitation, with mu 0.5: brute force at several distances, and the estimates."""
    world = World()
    arm = Arm(schedule={0: 1.0}, scale="raw")
    (logits,) = train(arm, seed, checkpoint + 1, world, keep=(checkpoint,)).logits
    policy, rng = softmax(logits), np.random.default_rng(seed)
    estimates = [estimate(world, policy, *world.gradients(policy, rng), arm, rng) or 0.0 for _ in range(50)]
    rows = {
        distance: [brute_force(world, logits, 0.5, distance, (seed, draw)) for draw in range(draws)]
        for distance in distances
    }
    return {
        "utility": world.utility(policy),
        "estimate": statistics.mean(estimates),
        "estimate_sd": statistics.stdev(estimates),
        "positive": float(np.mean(np.array(estimates) > 0)),
        **{f"after {distance}": statistics.mean(found) for distance, found in rows.items()},
    }


FIXED = (0.1, 0.3, 0.5, 0.7, 0.9)
SWITCHES = (40, 150, 400)
ARMS = {
    "imitation": Arm(schedule={0: 1.0}),
    "policy gradient": Arm(schedule={0: 0.0}, warmup=0),
    **{f"switch at {step}": Arm(schedule={0: 1.0, step: 0.0}) for step in SWITCHES},
    **{f"fixed {mu:g}": Arm(schedule={0: mu}) for mu in FIXED},
    **{f"amft, rate {rate:g}": Arm(rate=rate) for rate in (0.02, 0.05, 0.1, 0.3)},
    **{f"amft, interval {interval}": Arm(interval=interval) for interval in (1, 20)},
    **{f"amft, from {mu:g}": Arm(mu=mu) for mu in (0.1, 0.5, 0.9)},
    "amft, no warm-up": Arm(warmup=0),
    **{f"amft raw, rate {rate:g}": Arm(rate=rate, scale="raw") for rate in (1e-4, 1.0, 10.0, 100.0)},
    "turned around": Arm(rate=-0.05),
    "likelihood of demonstrations": Arm(utility="demonstrations"),
    "likelihood of demonstrations, turned around": Arm(utility="demonstrations", rate=-0.05),
    "amft and entropy": Arm(entropy_rate=0.01),
    "amft and entropy, other sign": Arm(entropy_rate=-0.01),
    "entropy alone": Arm(rate=0.0, entropy_rate=0.01),
    "entropy alone, other sign": Arm(rate=0.0, entropy_rate=-0.01),
    **{f"look-ahead {steps}": Arm(look_ahead=steps) for steps in (1, 10, 50)},
}
CHECKPOINTS = (40, 100, 150, 300, 500)


LEARNED, TURNED = "amft, rate 0.05", "turned around"
"""They differ in the sign alone."""
FAST_ARMS = ("imitation", "fixed 0.1", LEARNED, TURNED, "switch at 150")


def measure(seeds: Sequence[int], fast: bool) -> dict[str, Any]:
    """All arms on all seeds, and the slopes at checkpoints of imitation."""
    names = FAST_ARMS if fast else ARMS
    runs = {
        name: [train(ARMS[name], seed, WARMUP + 10 if fast else STEPS) for seed in seeds] for name in names
    }
    found = {
        str(checkpoint): slopes(checkpoint, (1,) if fast else (1, 10, 50, 200))
        for checkpoint in (CHECKPOINTS[:1] if fast else CHECKPOINTS)
    }
    return {**report(runs), "slopes": found}


def report(runs: Mapping[str, Sequence[Trained]]) -> dict[str, Any]:
    """Arms, the regret of every controller to the best fixed weight and to the best switch, and claims."""
    finals = {name: [run.final for run in found] for name, found in runs.items()}

    def best(kind: str) -> str:
        return max(
            (name for name in finals if name.startswith(kind)), key=lambda name: statistics.mean(finals[name])
        )

    def gap(one: str, other: str) -> list[float]:
        return [a - b for a, b in zip(finals[one], finals[other], strict=True)]

    fixed, switch = best("fixed"), best("switch")
    to_fixed, to_turned = gap(LEARNED, fixed), gap(LEARNED, TURNED)
    return {
        "arms": {
            name: {
                "utility": finals[name],
                "mu at 100, 200, ...": [run.mu[99::100] for run in found],
                "curve": [run.utilities for run in found],
            }
            for name, found in runs.items()
        },
        "regret": {
            f"of {name} to {other}": gap(other, name)
            for name in finals
            if name.startswith("amft")
            for other in (fixed, switch)
        },
        "claims": [
            claim(
                f"utility, {LEARNED} minus {fixed}, the best fixed weight",
                ">= -0.03",
                to_fixed,
                statistics.mean(to_fixed) >= -0.03,
                interval=paired_interval(finals[LEARNED], finals[fixed]),
            ),
            claim(
                f"utility, {LEARNED} minus {TURNED}",
                ">= 0.05",
                to_turned,
                statistics.mean(to_turned) >= 0.05,
                interval=paired_interval(finals[LEARNED], finals[TURNED]),
            ),
        ],
    }
