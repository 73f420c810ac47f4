"""From prompts to scored rollouts: plan, generate, score, redraw. The first half of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from posttrain.errors import RewardError, TrainingError
from posttrain.methods.base import Method, RolloutPlan, StepContext
from posttrain.recipe.schema import PolicyStage, RewardOptions, RolloutConfig
from posttrain.rewards.scorer import Scorer, ScoreReport
from posttrain.rollout.engine import RolloutEngine
from posttrain.rollout.types import (
    Example,
    Rollout,
    RolloutBatch,
    RolloutRequest,
    Sampling,
    derive_seed,
    make_rollouts,
    with_seed,
)
from posttrain.training.advantages import (
    BatchStats,
    Floats,
    batch_moments,
    compute_advantages,
    decoupled_rewards,
    default_scale,
    zero_variance,
)
from posttrain.training.prompts import PromptOrder
from posttrain.training.tally import Tally

SOLUTION = "solution"


@dataclass
class Collected:
    """Everything one step sampled.

    `batch` is what may be trained on; `dropped` are the rollouts left out, with the reason by rollout id;
    `redrawn` those that could not be scored and were drawn again. `seconds` are by phase.
    """

    batch: RolloutBatch
    dropped: list[Rollout] = field(default_factory=list)
    redrawn: list[Rollout] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    """What scoring had to report (`ScoreReport.counts`), summed over its calls."""

    def drop(self, rollouts: Sequence[Rollout], reason: Callable[[Rollout], str]) -> None:
        """Leave rollouts out of the batch."""
        ids = {rollout.id for rollout in rollouts}
        self.dropped += rollouts
        self.reasons |= {rollout.id: reason(rollout) for rollout in rollouts}
        self.batch = self.batch.filter(lambda rollout: rollout.id not in ids)

    def count(self, report: ScoreReport) -> None:
        """Add what a call of the scorer reports."""
        for name, count in report.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to a phase."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - started


def has_failed(rollout: Rollout) -> bool:
    """Whether a rollout lacks its score because a reward that counts failed on it."""
    return rollout.reward is None and bool(rollout.reward_errors)


def unscored_reason(rollout: Rollout) -> str:
    """Why a rollout has no reward, in a few words."""
    if rollout.reward_errors:
        return "unscored: " + "; ".join(f"{name}: {why}" for name, why in rollout.reward_errors.items())
    return "unscored: no reward applies"


class Collector:
    """Samples and scores the rollouts of a step.

    A prompt has a slot in its step, and all its random choices derive from (run seed, step, slot), so they do
    not depend on how slots are spread over ranks.
    """

    def __init__(
        self,
        *,
        engine: RolloutEngine,
        scorer: Scorer,
        order: PromptOrder,
        encode: Callable[[Example], tuple[int, ...]],
        stage: PolicyStage,
        rollout: RolloutConfig,
        rewards: RewardOptions,
        methods: Sequence[Method],
        seed: int,
    ):
        self.engine = engine
        self.scorer = scorer
        self.order = order
        self.encode = encode
        self.stage = stage
        self.rewards = rewards
        self.methods = methods
        self.seed = seed
        self.sampling = Sampling(
            max_tokens=rollout.max_tokens,
            n=stage.group_size,
            temperature=rollout.temperature,
            stop=tuple(rollout.stop),
        )

    def plan(self, slots: range, contexts: Sequence[StepContext]) -> list[RolloutRequest]:
        """The requests of this rank's slots of a step. `contexts` belong to the methods, one each."""
        step = contexts[0].step
        plan = RolloutPlan([self._request(step, slot, attempt=0) for slot in slots])
        for method, context in zip(self.methods, contexts, strict=False):
            plan = method.plan(plan, context)
        return plan.requests

    def sample(self, requests: list[RolloutRequest], step: int) -> Collected:
        """Generate and score. Touches nothing of the trainer's, so that it may run beside an update.

        Raises:
            RewardError: a reward failed and the recipe says `on_error: fail`.
            TrainingError: not one rollout could be scored.
        """
        collected = Collected(RolloutBatch([]))
        collected.batch = self._sample(requests, collected, step)
        self._replace_zero_variance(collected, step)
        return collected

    def extend(self, collected: Collected, contexts: Sequence[StepContext]) -> None:
        """Add what the methods ask for after scoring: follow-up rollouts, further rewards."""
        for method, context in zip(self.methods, contexts, strict=False):
            collected.batch = method.extend(collected.batch, context)

    def _request(self, step: int, slot: int, attempt: int) -> RolloutRequest:
        position = step * self.stage.prompts_per_step + slot
        example = self.order.replacement(position, attempt) if attempt else self.order.at(position)
        request = RolloutRequest(
            prompt_ids=self.encode(example),
            example=example,
            group=f"{step}.{slot}.{attempt}" if attempt else f"{step}.{slot}",
            sampling=self.sampling,
            role=SOLUTION,
        )
        return with_seed(request, self.seed, "rollout", step, slot, attempt, request.role)

    def _sample(self, requests: list[RolloutRequest], collected: Collected, step: int) -> RolloutBatch:
        """Generate and score; redraw or drop what could not be scored."""
        with collected.timed("generate"):
            batch = make_rollouts(requests, self.engine.generate(requests), self.engine.version)
        own = frozenset[str]().union(*(method.scores for method in self.methods))
        unasked = batch.filter(lambda rollout: rollout.request.role in own)
        batch = batch.filter(lambda rollout: rollout.request.role not in own)
        self.score(batch.rollouts, collected, step)
        for redraw in range(1, self.rewards.max_redraws + 1 if self.rewards.on_error == "redraw" else 1):
            failed = [rollout for rollout in batch if has_failed(rollout)]
            if not failed:
                break
            again = self._draw_again(failed, redraw, collected)
            self.score(again, collected, step)
            replaced = {rollout.id: rollout for rollout in again}
            batch = RolloutBatch([replaced.get(rollout.id, rollout) for rollout in batch])
            for old in failed:
                old.redraw = redraw
                collected.reasons[old.id] = unscored_reason(old)
            collected.redrawn += failed
        failed = [rollout for rollout in batch if rollout.reward is None]
        if len(failed) == len(batch) and failed:
            raise TrainingError(
                f"none of the {len(failed)} rollouts of step {step} could be scored; "
                f"the first: {unscored_reason(failed[0])}"
            )
        kept = Collected(batch)
        kept.drop(failed, unscored_reason)
        collected.dropped += kept.dropped
        collected.reasons |= kept.reasons
        return kept.batch + unasked

    def _draw_again(self, failed: list[Rollout], redraw: int, collected: Collected) -> list[Rollout]:
        requests = [
            replace(
                rollout.request,
                sampling=replace(
                    rollout.request.sampling,
                    n=1,
                    seed=derive_seed(rollout.request.sampling.seed, "redraw", rollout.index, redraw),
                ),
            )
            for rollout in failed
        ]
        with collected.timed("generate"):
            answers = self.engine.generate(requests)
        return [
            Rollout(old.request, completions[0], old.index, self.engine.version)
            for old, completions in zip(failed, answers, strict=True)
        ]

    def score(self, rollouts: Sequence[Rollout], collected: Collected, step: int) -> None:
        """Fill the rewards in place.

        Raises:
            RewardError: a reward failed and the recipe says `on_error: fail`.
        """
        with collected.timed("score"):
            collected.count(self.scorer.score(rollouts, step))
        failed = [rollout for rollout in rollouts if has_failed(rollout)]
        if failed and self.rewards.on_error == "fail":
            name, why = next(iter(failed[0].reward_errors.items()))
            raise RewardError(
                f"reward {name!r} failed on {len(failed)} of {len(rollouts)} rollouts of step {step}; "
                f"the first, for example {failed[0].request.example.id!r}: {why}"
            )

    def score_follow_ups(self, rollouts: Sequence[Rollout], tally: Tally, step: int) -> None:
        """Fill the rewards of rollouts that a method has asked for; what happens is added to the metrics."""
        extra = Collected(RolloutBatch([]))
        self.score(rollouts, extra, step)
        for name, count in extra.counts.items():
            tally.total(name, count)

    def signal(self, rollouts: Sequence[Rollout], step: int) -> Floats:
        """What advantages are made of, one number for each scored rollout.

        That is the reward, or with `normalize_then_sum` the sum of the rewards normalised within groups.
        """
        if self.rewards.combine == "sum_then_normalize":
            return np.array([rollout.reward for rollout in rollouts], dtype=np.float64)
        weights = self.scorer.combination.weights(step)
        terms = [self.scorer.combination.terms(rollout.rewards, step) for rollout in rollouts]
        values = np.array([[term.get(name, np.nan) for name in weights] for term in terms], dtype=np.float64)
        return decoupled_rewards(
            values.reshape(len(rollouts), len(weights)),
            np.array(list(weights.values())),
            [rollout.request.group for rollout in rollouts],
        )

    def advantages(
        self, rollouts: Sequence[Rollout], step: int, summed: Callable[[Floats], Floats]
    ) -> dict[str, float]:
        """The stage's own advantages, by rollout id; `summed` adds up the values of all ranks."""
        kind, scale = self.stage.loss.kind, self.stage.loss.scale
        if self.rewards.combine == "normalize_then_sum":
            kind, scale = "reinforce_pp", "batch"  # what is left of GDPO once each reward is normalised
        rewards = self.signal(rollouts, step)
        groups = [rollout.request.group for rollout in rollouts]
        stats = None
        if (scale or default_scale(kind)) == "batch":
            stats = BatchStats.from_moments(summed(batch_moments(kind, rewards, groups)))
        advantages = compute_advantages(kind, scale, rewards, groups, stats)
        return {r.id: float(value) for r, value in zip(rollouts, advantages, strict=True)}

    def _replace_zero_variance(self, collected: Collected, step: int) -> None:
        """Dynamic sampling: new prompts for groups whose rewards are all the same (DAPO, section 3.2)."""
        for attempt in range(1, self.stage.dynamic_sampling + 1):
            solutions = collected.batch.with_role(SOLUTION).rollouts
            groups = [rollout.request.group for rollout in solutions]
            flat = zero_variance(self.signal(solutions, step), groups)
            if not flat:
                return
            collected.drop(
                [rollout for rollout in solutions if rollout.request.group in flat],
                lambda rollout: "zero variance: replaced by another prompt",
            )
            slots = sorted(int(str(group).split(".")[1]) for group in flat)
            requests = [self._request(step, slot, attempt) for slot in slots]
            collected.batch = collected.batch + self._sample(requests, collected, step)
