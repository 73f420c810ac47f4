"""The controller of one prompt: every few tokens, which samples go on, and in the end which answer counts.

Samples that do not go on are paused, never discarded: a later decision may take them up again. The controller
neither generates nor reads anything itself: it says what to generate (`next`), is told what came of it
(`record`), and so decides for an engine as for samples that are already there.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from posttrain.rollout.types import FinishReason
from posttrain.zip_rc.grid import Grid, expected_length, expected_reward, reward_marginal
from posttrain.zip_rc.utility import Floats, Mask, Prices, expected_max, search

State = Literal["waiting", "running", "paused", "finished", "truncated"]


@dataclass(frozen=True)
class Outlook:
    """What a policy decides on.

    Attributes:
        grid: rewards and lengths that the bins stand for.
        reference: tokens of one average sample of this prompt, as foreseen before its first token.
        joints: forecasts of the unfinished samples (n, R, L), n >= 1; one that has not begun has the
            prompt's.
        started: which of them have begun (n,).
        finished: expected rewards of the samples that have ended, 0 for those that ran into their cap.
    """

    grid: Grid
    reference: float
    joints: Floats
    started: Mask
    finished: Sequence[float]


class Policy(Protocol):
    """Decides which of the unfinished samples go on."""

    def choose(self, outlook: Outlook) -> Mask:
        """Which go on (n,); none stops the prompt, unless no sample has ended yet."""
        ...


@dataclass(frozen=True)
class UtilityPolicy:
    """The set with the highest sampling utility.

    `beta` is what one average sample costs in units of reward; `alpha` is the share of compute in that cost,
    the rest being latency. The paper's main table has 0.01 and 0.1.
    """

    alpha: float = 0.1
    beta: float = 0.01

    def choose(self, outlook: Outlook) -> Mask:
        """See `Policy.choose`."""
        prices = Prices.of(self.alpha, self.beta)
        return search(outlook.joints, outlook.grid, prices, outlook.reference, outlook.finished).keep


@dataclass(frozen=True)
class ThresholdPolicy:
    """All samples but those that have begun and whose expected reward is below `least`."""

    least: float

    def choose(self, outlook: Outlook) -> Mask:
        """See `Policy.choose`."""
        return ~outlook.started | (expected_reward(outlook.grid, outlook.joints) >= self.least)


@dataclass(frozen=True)
class EarlyStopPolicy:
    """All samples, until one has ended with an expected reward of at least `enough`."""

    enough: float

    def choose(self, outlook: Outlook) -> Mask:
        """See `Policy.choose`."""
        return np.full(len(outlook.joints), max(outlook.finished, default=0.0) < self.enough)


@dataclass(frozen=True)
class Chunk:
    """What a sample was extended by.

    Attributes:
        tokens: how many, at least one.
        joint: the forecast (R, L) of its last position, the one that predicted the last of these tokens.
        ended: None while the sample can go on.
        answer: for the vote, in a form that is equal for equal answers; None gives none.
    """

    tokens: int
    joint: Floats
    ended: FinishReason | None = None
    answer: Hashable | None = None


@dataclass
class Sample:
    """One sample of the prompt. `joint` is None, and `value` the prompt's, until it has begun."""

    tokens: int = 0
    joint: Floats | None = None
    value: float = 0.0
    remaining: float = 0.0
    state: State = "waiting"
    answer: Hashable | None = field(default=None, repr=False)

    @property
    def ended(self) -> bool:
        """Whether nothing can be added to it."""
        return self.state in ("finished", "truncated")


class Controller:
    """Decides for the samples of one prompt.

    The first decision needs the prompt's forecast, which comes with the first token of the first sample.

    Args:
        grid: of the model.
        policy: decides.
        samples: how many the prompt may have, begun or not.
        cap: tokens of one sample.
        interval: tokens between decisions. Chunks end at its multiples, so that a sample has the same tokens
            whenever it was paused.
        budget: tokens of all samples together, at least `cap`; never exceeded. None has no limit.
    """

    def __init__(
        self, grid: Grid, policy: Policy, *, samples: int, cap: int, interval: int, budget: int | None = None
    ) -> None:
        self.samples = [Sample() for _ in range(samples)]
        self.latency = 0
        """Tokens that were generated one after another."""
        self._grid = grid
        self._policy = policy
        self._cap = cap
        self._interval = interval
        self._budget = budget
        self._root: Floats | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return sum(sample.tokens for sample in self.samples)

    @property
    def confidence(self) -> float:
        """Expected reward of the answer if the samples that run are run to their ends.

        That of an answer that was cut off is 0.
        """
        finished = [sample.value for sample in self.samples if sample.state == "finished"]
        running = [sample for sample in self.samples if sample.state == "running"]
        if not running or self._root is None:
            return self.samples[self.best()].value if finished else 0.0
        best = max(finished, default=0.0)
        rewards = reward_marginal(_joints(running, self._root))
        return expected_max(np.maximum(self._grid.rewards, best), rewards)

    def next(self) -> dict[int, int]:
        """Which samples go on, and by how many tokens at most; none when the prompt is done."""
        root = self._root
        if root is None:
            return {0: 1}
        unfinished = [index for index, sample in enumerate(self.samples) if not sample.ended]
        chosen = self._affordable(self._choose(unfinished, root)) if unfinished else []
        for index in unfinished:
            sample = self.samples[index]
            sample.state = "running" if index in chosen else "paused" if sample.tokens else "waiting"
        return {index: self._chunk(index) for index in chosen}

    def record(self, chunks: Mapping[int, Chunk]) -> None:
        """What came of the samples that `next` named."""
        for index, chunk in chunks.items():
            sample = self.samples[index]
            sample.tokens += chunk.tokens
            sample.joint = chunk.joint
            sample.answer = chunk.answer
            if chunk.ended is not None:
                sample.state = "finished" if chunk.ended == "stop" else "truncated"
            self._forecast(sample, chunk.joint)
            if self._root is None:
                self._root = chunk.joint
                for other in self.samples[1:]:
                    self._forecast(other, chunk.joint)
        self.latency += max(chunk.tokens for chunk in chunks.values())

    def best(self) -> int:
        """The sample whose answer counts: of the finished ones if there are any, else of those cut off."""
        for state in ("finished", "truncated"):
            ended = [index for index, sample in enumerate(self.samples) if sample.state == state]
            if ended:
                values = [self.samples[index].value for index in ended]
                return ended[weighted_vote(values, [self.samples[index].answer for index in ended])]
        raise ValueError("no sample of the prompt has ended")

    def _choose(self, unfinished: Sequence[int], root: Floats) -> list[int]:
        """What the policy wants; while no sample has ended, at least the one with the highest value."""
        ended = [sample for sample in self.samples if sample.ended]
        others = [self.samples[index] for index in unfinished]
        outlook = Outlook(
            grid=self._grid,
            reference=float(expected_length(self._grid, root)),
            joints=_joints(others, root),
            started=np.array([sample.tokens > 0 for sample in others]),
            finished=[sample.value if sample.state == "finished" else 0.0 for sample in ended],
        )
        chosen = [unfinished[place] for place in np.flatnonzero(self._policy.choose(outlook))]
        return chosen if chosen or ended else [max(unfinished, key=lambda index: self.samples[index].value)]

    def _affordable(self, chosen: Sequence[int]) -> list[int]:
        """Those of the chosen that the budget pays for, the best first.

        While no sample has ended, the way to its cap stays paid for the one that is furthest.
        """
        if self._budget is None:
            return list(chosen)
        spare, lead = self._budget - self.tokens, None
        if not any(sample.ended for sample in self.samples):
            lead = max(range(len(self.samples)), key=lambda index: self.samples[index].tokens)
            spare -= self._cap - self.samples[lead].tokens
        paid = [index for index in chosen if index == lead]
        for index in sorted(chosen, key=lambda index: -self.samples[index].value):
            if index != lead and self._chunk(index) <= spare:
                spare -= self._chunk(index)
                paid.append(index)
        return paid or ([] if lead is None else [lead])

    def _chunk(self, index: int) -> int:
        tokens = self.samples[index].tokens
        return min(self._interval - tokens % self._interval, self._cap - tokens)

    def _forecast(self, sample: Sample, joint: Floats) -> None:
        sample.value = float(expected_reward(self._grid, joint))
        sample.remaining = 0.0 if sample.ended else float(expected_length(self._grid, joint))


def _joints(samples: Sequence[Sample], root: Floats) -> Floats:
    return np.stack([root if sample.joint is None else sample.joint for sample in samples])


def weighted_vote(values: Sequence[float], answers: Sequence[Hashable | None]) -> int:
    """Which of finished samples to take: weighted best-of-N.

    The answer whose samples have the largest sum of expected rewards wins, and of its samples the one with
    the highest; ties go to the first. A sample without an answer stands for itself.
    """
    keys = [
        ("sample", place) if answer is None else ("answer", answer) for place, answer in enumerate(answers)
    ]
    totals: dict[Hashable, float] = {}
    for key, value in zip(keys, values, strict=True):
        totals[key] = totals.get(key, 0.0) + value
    winner = max(totals, key=lambda key: totals[key])
    return max((place for place, key in enumerate(keys) if key == winner), key=lambda place: values[place])
