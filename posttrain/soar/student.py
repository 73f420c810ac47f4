"""The students: an inner loop of RLOO from the baseline on one proposed set, and accuracy on hard
problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import TrainingArguments

from posttrain.methods.base import StepContext
from posttrain.recipe.schema import CorrectConfig, PolicyStage, RewardOptions, RolloutConfig
from posttrain.rewards.scorer import Scorer
from posttrain.rollout.engine import RolloutEngine, require_finite
from posttrain.rollout.types import Example, Rollout, RolloutRequest, Sampling, derive_seed, make_rollouts
from posttrain.soar.learner import Forward, Learner
from posttrain.soar.snapshots import References, SharedModel, Snapshot
from posttrain.training.advantages import compute_advantages
from posttrain.training.collect import SOLUTION, Collector
from posttrain.training.prompts import PromptOrder
from posttrain.training.tally import Tally

Asked = tuple[Example, tuple[int, ...]]
"""A problem and the token ids of its prompt."""


class Workbench:
    """The model in memory with its engine: whose weights are in it, and sampling with them."""

    def __init__(self, shared: SharedModel, engine: RolloutEngine, forward: Forward):
        self.shared = shared
        self.engine = engine
        self.forward = forward
        self._stale = False

    def put(self, snapshot: Snapshot) -> None:
        """Put somebody's weights in place."""
        self.shared.restore(snapshot)
        self._stale = True

    def changed(self) -> None:
        """The weights have been trained."""
        self._stale = True

    def generate(self, requests: Sequence[RolloutRequest]) -> Any:
        """Completions under the weights of now."""
        with self.forward.autocast():
            if self._stale:
                self.engine.sync(self.shared.model)
                self._stale = False
            return self.engine.generate(requests)

    @property
    def version(self) -> int:
        """The engine's."""
        return self.engine.version

    @property
    def max_model_len(self) -> int:
        """The engine's."""
        return self.engine.max_model_len


@dataclass
class Spent:
    """What sampling and training have cost."""

    updates: int = 0
    completions: int = 0
    sampled: int = 0
    trained: int = 0

    def add(self, other: Spent) -> None:
        """Count another's cost, too."""
        self.updates += other.updates
        self.completions += other.completions
        self.sampled += other.sampled
        self.trained += other.trained


class Students:
    """Trains students from a snapshot, and measures them.

    Every random choice derives from the seed that a call is given; nothing of one run reaches the next.
    """

    def __init__(
        self,
        bench: Workbench,
        *,
        stage: PolicyStage,
        arguments: TrainingArguments,
        rollout: RolloutConfig,
        rewards: RewardOptions,
        scorer: Scorer,
        correct: CorrectConfig,
        references: References | None,
        tokenizer: Any,
        check: Callable[[], None] = lambda: None,
    ):
        """`stage` is the inner loop, `references` are needed if its loss has a KL term; `check` may raise to
        end the work between two steps.
        """
        self.bench = bench
        self.stage = stage
        self.arguments = arguments
        self.rollout = rollout
        self.rewards = rewards
        self.scorer = scorer
        self.correct = correct
        self.references = references
        self.tokenizer = tokenizer
        self.check = check

    def train(self, start: Snapshot, questions: Sequence[Asked], steps: int, seed: int) -> Spent:
        """An inner loop from `start` on a set; afterwards the student's weights are in the model.

        The optimiser is new, the order of questions and all sampling follow from `seed`.
        """
        self.bench.put(start)
        return self.go_on(questions, steps, seed, self.learner(steps, seed), start)

    def learner(self, steps: int, seed: int) -> Learner:
        """A new optimiser for so many steps."""
        return Learner(
            self.bench.forward,
            loss=self.stage.loss,
            arguments=self.arguments,
            max_tokens=self.rollout.max_tokens,
            steps=steps,
            seed=seed,
            max_bad_steps=self.stage.max_bad_steps,
        )

    def go_on(
        self,
        questions: Sequence[Asked],
        steps: int,
        seed: int,
        learner: Learner,
        start: Snapshot,
        log: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
    ) -> Spent:
        """Steps from where the model is, with an optimiser that may have been used before."""
        collector = self._collector(questions, seed)
        reference = self.references.at(start) if self.references is not None else None
        spent = Spent()
        for step in range(steps):
            self.check()
            context = self._context(step)
            requests = collector.plan(range(self.stage.prompts_per_step), [context])
            collected = collector.sample(requests, step)
            rollouts = collected.batch.with_role(SOLUTION).rollouts
            rewards = collector.signal(rollouts, step)
            groups = [rollout.request.group for rollout in rollouts]
            loss = self.stage.loss
            advantages = compute_advantages(loss.kind, loss.scale, rewards, groups)
            metrics = learner.update(rollouts, advantages.tolist(), reference)
            self.bench.changed()
            everything = [*collected.batch, *collected.dropped]
            spent.add(
                Spent(
                    updates=1,
                    completions=len(everything),
                    sampled=sum(rollout.completion.sampled_tokens for rollout in everything),
                    trained=int(metrics["tokens/trained"]),
                )
            )
            log(step, metrics | {"reward": float(np.mean(rewards)) if len(rewards) else 0.0})
        return spent

    def answers(self, problems: Sequence[Asked], samples: int, seed: int) -> tuple[list[Rollout], Spent]:
        """Scored answers to problems under the weights of now; `samples` 0 is one greedy answer each."""
        sampling = Sampling(
            max_tokens=self.rollout.max_tokens,
            n=max(samples, 1),
            temperature=self.rollout.temperature if samples else 0.0,
            stop=tuple(self.rollout.stop),
        )
        requests = [
            RolloutRequest(
                ids, example, str(index), replace(sampling, seed=derive_seed(seed, "answers", index))
            )
            for index, (example, ids) in enumerate(problems)
        ]
        completions = self.bench.generate(requests)
        require_finite(requests, completions)
        rollouts = make_rollouts(requests, completions, self.bench.version).rollouts
        self.scorer.score(rollouts)
        sampled = sum(rollout.completion.sampled_tokens for rollout in rollouts)
        return rollouts, Spent(completions=len(rollouts), sampled=sampled)

    def is_correct(self, rollout: Rollout) -> bool | None:
        """Whether an answer is right; None where that could not be found out."""
        name = self.correct.reward or next(iter(self.scorer.infos))
        value = rollout.rewards[name]
        return None if value is None else value >= self.correct.threshold

    def accuracy(self, problems: Sequence[Asked], samples: int, seed: int) -> tuple[float, Spent]:
        """Share of right answers among those that could be scored."""
        rollouts, spent = self.answers(problems, samples, seed)
        outcomes = [outcome for r in rollouts if (outcome := self.is_correct(r)) is not None]
        return (float(np.mean(outcomes)) if outcomes else 0.0), spent

    def hits(self, questions: Sequence[Asked], samples: int, seed: int) -> tuple[list[int], Spent]:
        """For each question, how many of `samples` answers agree with the teacher's."""
        rollouts, spent = self.answers(questions, samples, seed)
        counts = [0] * len(questions)
        for rollout in rollouts:
            counts[int(rollout.request.group)] += self.is_correct(rollout) is True
        return counts, spent

    def _collector(self, questions: Sequence[Asked], seed: int) -> Collector:
        ids = {example.id: prompt for example, prompt in questions}
        return Collector(
            engine=self.bench,  # type: ignore[arg-type]  # generates; nothing else is asked of it here
            scorer=self.scorer,
            order=PromptOrder([example for example, _ in questions], seed),
            encode=lambda example: ids[example.id],
            stage=self.stage,
            rollout=self.rollout,
            rewards=self.rewards,
            methods=[],
            seed=seed,
        )

    def _context(self, step: int) -> StepContext:
        return StepContext(
            step=step,
            engine=self.bench.engine,
            tokenizer=self.tokenizer,
            model=self.bench.shared.model,
            rng=np.random.default_rng(0),
            log=Tally().mean,
            score=self.scorer.score,  # type: ignore[arg-type]
        )
