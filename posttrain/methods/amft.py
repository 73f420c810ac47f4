"""AMFT: one stage of imitation and reinforcement whose mixture is learned. EXPERIMENTAL.

He, Feng and Li, "AMFT: Aligning LLM reasoners by meta-learning the optimal imitation-exploration balance",
arXiv:2508.06944. Its authors withdrew the paper in October 2025 while it is investigated, and the code they
had released could not have run: nothing here relies on their results. The mechanism, a hypergradient on the
weight of a loss, is standard (`posttrain.training.mixing`).

    for each step:
        mu <- clip(mu + entropy_rate · (H* - H))                  H: of this step's completions
        loss = (1 - mu) · (all policy channels) + mu · (negative log-likelihood of demonstrations)
        every `interval` steps:
            v  = gradient of the mean reward of fresh answers to held-out prompts
            g  = -<v, g_S - g_R>, on the scale asked for           what imitation climbs, minus what RL does
            mu <- clip(mu + rate · g)                              from the next step on

Differences from the paper: the policy loss is the stage's (without a value function); mu moves by the
meta-gradient after the step it was measured in and not before, since the gradients are those of that step's
own update; both entropies are of sampled completions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from posttrain.data.demonstrations import demonstration_ids
from posttrain.data.prompts import encode_prompt
from posttrain.data.sources import load_examples
from posttrain.errors import DataError
from posttrain.methods.base import (
    CHANNELS,
    Channel,
    Compared,
    Comparison,
    LossTerm,
    Method,
    RolloutPlan,
    StepContext,
)
from posttrain.recipe.amft_schema import AmftConfig
from posttrain.rollout.types import Rollout, RolloutBatch, RolloutRequest, with_seed
from posttrain.training.advantages import leave_one_out, zero_variance
from posttrain.training.mixing import Slopes, entropy_pull, meta_gradient, moved, scheduled
from posttrain.training.prompts import PromptOrder

logger = logging.getLogger(__name__)

SOLUTION, HELD_OUT = "solution", "held_out"
DEMONSTRATIONS = "demonstrations"

Row = tuple[tuple[int, ...], tuple[int, ...]]


class Amft(Method):
    """Imitation beside the stage's policy gradient, with a learned or scheduled weight; see the module."""

    name = "amft"
    Config = AmftConfig
    config: AmftConfig

    def __init__(self, config: AmftConfig):
        super().__init__(config)
        self.mu = config.mu
        self.target = config.target_entropy
        self._demonstrations: PromptOrder | None = None
        self._held_out: PromptOrder | None = None
        self._encoded: dict[str, Row] = {}

    def weight(self, step: int) -> float:
        """The weight of imitation in a step: in the warm-up 1, then the schedule's or the learned one."""
        if step < self.config.warmup_steps:
            return 1.0
        return self.mu if self.config.schedule is None else scheduled(self.config.schedule, step)

    def measures(self, step: int) -> bool:
        """Whether the meta-gradient is measured in a step."""
        since = step - self._begin
        return self.config.learns and since >= 0 and since % self.config.interval == 0

    @property
    def _begin(self) -> int:
        """The step of the first measurement."""
        return max(self.config.warmup_steps, self.config.first)

    # --- what is sampled -------------------------------------------------------------------------------

    def plan(self, plan: RolloutPlan, context: StepContext) -> RolloutPlan:
        """Sample nothing for a step of imitation alone; add held-out prompts to one that is measured.

        Raises:
            DataError: a held-out prompt is one that is trained on.
        """
        if self.config.schedule is not None or context.step < self.config.warmup_steps:
            return RolloutPlan([]) if self.weight(context.step) == 1.0 else plan
        if self.config.held_out is None or not self.config.learns:
            return plan
        held_out = self._held_out_order(context)
        known = {example.id for example in held_out.examples}
        for request in plan.requests:
            if request.example.id in known:
                raise DataError(f"amft: prompt {request.example.id!r} is held out and trained on, too")
        if not self.measures(context.step):
            return plan
        return RolloutPlan([*plan.requests, *self._questions(held_out, context)])

    def _questions(self, held_out: PromptOrder, context: StepContext) -> list[RolloutRequest]:
        assert self.config.held_out is not None
        asked = self.config.held_out
        number = (context.step - self._begin) // self.config.interval
        sampling = replace(context.sampling, n=asked.group_size)
        requests = []
        for slot in share(asked.prompts, context):
            example = held_out.at(number * asked.prompts + slot)
            ids = encode_prompt(example, context.tokenizer, asked.data.format)
            group = f"{context.step}.{HELD_OUT}.{slot}"
            request = RolloutRequest(ids, example, group, sampling, HELD_OUT)
            requests.append(with_seed(request, context.seed, self.name, context.step, slot))
        return requests

    def _held_out_order(self, context: StepContext) -> PromptOrder:
        assert self.config.held_out is not None
        if self._held_out is None:
            source, room = (
                self.config.held_out.data,
                context.engine.max_model_len - context.sampling.max_tokens,
            )
            examples = load_examples(source)
            for example in examples:
                length = len(encode_prompt(example, context.tokenizer, source.format))
                if length > room:
                    raise DataError(
                        f"amft.held_out: prompt {example.id!r} has {length} tokens; {room} fit with an answer"
                    )
            self._held_out = PromptOrder(examples, context.seed)
        return self._held_out

    # --- what is trained -------------------------------------------------------------------------------

    def channels(self, batch: RolloutBatch, context: StepContext) -> list[Channel]:
        """Adds none: looks at the entropy of the step's completions and moves the weight by it."""
        surprise, tokens = np.sum(context.gather(surprisal(batch.with_role(SOLUTION).rollouts)), axis=0)
        if tokens and context.step >= self.config.warmup_steps:
            self._regulate(float(surprise / tokens), context)
        context.log("mu", self.weight(context.step))
        return []

    def _regulate(self, entropy: float, context: StepContext) -> None:
        context.log("entropy", entropy)
        if self.config.schedule is not None or self.config.entropy_rate == 0:
            return
        if self.target is None and math.isfinite(entropy):
            self.target = entropy
            if self.config.warmup_steps == 0:
                logger.warning(
                    "amft: without a warm-up the target entropy is that of the first step: %.3g", entropy
                )
        if self.target is not None:
            context.log("target_entropy", self.target)
            pull = entropy_pull(entropy, self.target, self.config.entropy_deadband)
            context.log("entropy_pull", pull)
            self._move(self.config.entropy_rate * pull)

    def weigh(self, channels: list[Channel], context: StepContext) -> list[Channel]:
        """All policy channels, whatever method they are of, have the weight that imitation leaves."""
        left = 1.0 - self.weight(context.step)
        return [replace(channel, weight=left * channel.weight) for channel in channels]

    def auxiliary(self, context: StepContext) -> list[LossTerm]:
        """This rank's demonstrations of the step; none where the policy gradient is alone."""
        mu = self.weight(context.step)
        if mu == 0.0:
            return []
        if self._demonstrations is None:
            self._demonstrations = self._load_demonstrations(context)
        order, size = self._demonstrations, self.config.batch_size
        chosen = [order.at(context.step * size + slot) for slot in share(size, context)]
        return [LossTerm(DEMONSTRATIONS, [self._encoded[example.id] for example in chosen], mu)]

    def _load_demonstrations(self, context: StepContext) -> PromptOrder:
        """The demonstrations in their order; those that do not fit are left out, never cut.

        Raises:
            DataError: none fits, or a held-out prompt is among them: imitation would be credited with it.
        """
        source, room = self.config.demonstrations, context.engine.max_model_len
        examples = load_examples(source)
        held_out = self._held_out_order(context).examples if self.config.learns else []
        shown = {example.id for example in examples}
        for example in held_out:
            if example.id in shown:
                raise DataError(f"amft: prompt {example.id!r} is held out and demonstrated, too")
        rows = {
            example.id: demonstration_ids(example, context.tokenizer, source.format) for example in examples
        }
        self._encoded = {key: row for key, row in rows.items() if len(row[0]) + len(row[1]) <= room}
        if not self._encoded:
            raise DataError(f"amft: none of {len(examples)} demonstrations fits into {room} tokens")
        if len(self._encoded) < len(rows):
            left_out = len(rows) - len(self._encoded)
            logger.warning(
                "amft: %d demonstrations do not fit into %d tokens and are left out", left_out, room
            )
        return PromptOrder([example for example in examples if example.id in self._encoded], context.seed)

    # --- what it is worth ------------------------------------------------------------------------------

    @property
    def compares(self) -> bool:
        """Whether the meta-gradient moves mu."""
        return self.config.learns

    def compare(self, batch: RolloutBatch, context: StepContext) -> Comparison | None:
        """In a step that is measured: the gradient of the held-out reward, by its answers' advantages."""
        if not self.measures(context.step):
            return None
        answers = batch.with_role(HELD_OUT).rollouts
        rewards = np.array([rollout.reward for rollout in answers], dtype=np.float64)
        for reward in rewards:
            context.log("utility", float(reward))
        groups = [rollout.request.group for rollout in answers]
        assert self.config.held_out is not None
        told_apart = sum(context.gather(len({*groups} - zero_variance(rewards, groups))))
        context.log("evidence", told_apart)
        if told_apart < self.config.held_out.evidence:
            context.log("no_evidence", 1.0)
            return None
        advantages = leave_one_out(rewards, groups)
        by_id = {rollout.id: float(value) for rollout, value in zip(answers, advantages, strict=True)}
        mu = self.weight(context.step)
        return Comparison(by_id, {DEMONSTRATIONS: 1.0 / mu, CHANNELS: -1.0 / (1.0 - mu)})

    def compared(self, result: Compared, context: StepContext) -> None:
        """Move the weight along the meta-gradient; without evidence it stays."""
        mu = self.weight(context.step)
        slopes = Slopes(
            imitation=result.products[DEMONSTRATIONS] / mu,
            policy=result.products[CHANNELS] / (1.0 - mu),
            utility_norm=result.norm,
            difference_norm=result.combined_norm,
        )
        gradient = meta_gradient(slopes, self.config.scale, result.learning_rate)
        context.log("no_evidence", float(gradient is None))
        if gradient is None:
            return
        context.log("meta_gradient", gradient)
        context.log("climb/imitation", -slopes.imitation / slopes.utility_norm)
        context.log("climb/policy", -slopes.policy / slopes.utility_norm)
        context.log("norm/utility", slopes.utility_norm)
        context.log("norm/difference", slopes.difference_norm)
        self._move(self.config.rate * gradient)

    def _move(self, by: float) -> None:
        self.mu = moved(self.mu, by, self.config.low, self.config.high)

    def state_dict(self) -> dict[str, Any]:
        """The weight and the target; what is sampled and shown follows from the step."""
        return {"mu": self.mu, "target": self.target}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.mu, self.target = state["mu"], state["target"]


def share(count: int, context: StepContext) -> range:
    """This rank's part of `count` places of a step; sizes differ by at most one."""
    return range(context.rank * count // context.world, (context.rank + 1) * count // context.world)


def surprisal(rollouts: Sequence[Rollout]) -> tuple[float, int]:
    """Sum of -log p over the tokens that the policy wrote, and their number: its mean estimates the entropy.

    Exact on average, since the tokens are drawn from the distribution whose entropy it is.
    """
    total = -sum(sum(rollout.completion.logprobs) for rollout in rollouts)
    return total, sum(rollout.completion.sampled_tokens for rollout in rollouts)


METHOD = Amft
