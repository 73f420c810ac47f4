"""MRT: pay for steady progress per episode of thinking, not for the outcome alone.

Qu et al. 2025, "Optimizing test-time compute via meta reinforcement fine-tuning" (arXiv:2503.07572). A
completion's thinking is a sequence of episodes; J is the probability that an answer forced after an episode
is right, and the progress of an episode is the change of J. To the outcome reward is added the progress:

    implicit_group        half of a group goes on from a prefix of an earlier trace, half is forced to answer
                          there; one normalisation over both (the paper's figure)
    termination_baseline  all go on; advantage = reward - mean reward of the forced answers (authors' note)
    explicit              all go on; reward + alpha · progress of the next episode (the paper's objective)
    online                whole traces; forced answers after every episode, each episode's progress on its own
                          tokens beside the outcome (MRT-online, the authors' release 0.1)
    backtrack             the explicit form for traces that return to an earlier step: reward + alpha ·
                          (success after the return - success of answering before it)

The first two only subtract a baseline: a forced answer at the prefix does not depend on what comes after, so
their expected gradient is that of the outcome from the same prefixes. What differs is where rollouts start.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from posttrain.data.episodes import token_places
from posttrain.methods.base import Channel, Method, RolloutPlan, StepContext
from posttrain.recipe.mrt_schema import FROM_PREFIX, MrtConfig
from posttrain.rollout.probes import PROBE, Cut, MetaProver, success
from posttrain.rollout.types import Fork, Rollout, RolloutBatch, RolloutRequest, derive_seed
from posttrain.training.advantages import BatchStats, Floats
from posttrain.training.progress import (
    baseline_advantages,
    bonus_advantages,
    implicit_advantages,
    progress,
    progress_to_go,
    spread_over_tokens,
    telescoping_error,
)

SOLUTION = "solution"
TERMINATE = "terminate"
"""Role of the forced answers that are trained on (`implicit_group`)."""


@dataclass(frozen=True)
class Trace:
    """A stored trace: the step it was sampled at, its thinking's tokens, the lengths of its prefixes, and
    the rollout it is of."""

    step: int
    token_ids: list[int]
    prefixes: list[int]
    rollout: str


class MRT(Method):
    """See the module."""

    name = "mrt"
    Config = MrtConfig

    def __init__(self, config: MrtConfig):
        super().__init__(config)
        self.config: MrtConfig = config
        self.traces: dict[str, Trace] = {}

    def plan(self, plan: RolloutPlan, context: StepContext) -> RolloutPlan:
        """Have rollouts start from prefixes of earlier traces, and forced answers beside them."""
        if self.config.mode not in FROM_PREFIX:
            return plan
        prover = self._prover(context)
        solutions = [request for request in plan.requests if request.role == SOLUTION]
        self._store_traces(solutions, prover, context)
        requests: list[RolloutRequest] = []
        for request in plan.requests:
            if request.role == SOLUTION:
                requests += self._from_prefix(request, prover, context)
            else:
                requests.append(request)
        return RolloutPlan(requests)

    def extend(self, batch: RolloutBatch, context: StepContext) -> RolloutBatch:
        """Ask for the forced answers that the progress of the rollouts is measured with."""
        prover = self._prover(context)
        solutions = batch.with_role(SOLUTION).rollouts
        ask = {"explicit": _ask_after_next, "online": _ask_everywhere, "backtrack": self._ask_around_return}
        probes = ask[self.config.mode](solutions, prover) if self.config.mode in ask else []
        batch = batch + RolloutBatch(probes)
        sampled = sum(len(rollout.completion.token_ids) for rollout in solutions)
        asked = sum(len(r.completion.token_ids) for r in batch if r.request.role in (PROBE, TERMINATE))
        context.log("probe_tokens", asked)
        context.log("probe_share", asked / max(sampled, 1))
        if prover.prompts:
            context.log("prefix_reuse", prover.reuse())
        return batch

    def channels(self, batch: RolloutBatch, context: StepContext) -> list[Channel]:
        """The outcome replaced by the mode's advantages, or for `online` the progress beside it."""
        if self.config.mode == "online":
            return self._progress(batch.with_role(SOLUTION).rollouts, context)
        if self.config.mode in ("explicit", "backtrack"):
            return [self._with_bonus(batch, context)]
        advantages: dict[str, float] = {}
        for group in _prefix_groups(batch):
            advantages |= self._against_terminations(group, context)
        return [Channel("outcome", advantages)]

    def state_dict(self) -> dict[str, Any]:
        """The stored traces."""
        return {"traces": {example: asdict(trace) for example, trace in self.traces.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the stored traces back."""
        self.traces = {example: Trace(**trace) for example, trace in state["traces"].items()}

    # --- prefixes of earlier traces ----------------------------------------------------------------------

    def _prover(self, context: StepContext) -> MetaProver:
        return MetaProver(context.engine, context.tokenizer, context.score, self.config.probes)

    def _store_traces(
        self, requests: Sequence[RolloutRequest], prover: MetaProver, context: StepContext
    ) -> None:
        """Sample a trace for every prompt that has none, or an old one."""
        fresh = context.step - self.config.refresh_steps
        self.traces = {example: trace for example, trace in self.traces.items() if trace.step > fresh}
        missing = {}
        for request in requests:
            if request.example.id not in self.traces:
                seed = derive_seed(request.sampling.seed, "trace")
                sampling = replace(request.sampling, n=1, seed=seed)
                missing[request.example.id] = replace(request, sampling=sampling, role="trace")
        if not missing:
            return
        batch = context.generate(list(missing.values()))
        for rollout in batch:
            bounds = prover.thinking(rollout).bounds
            tokens = list(rollout.completion.token_ids[: bounds[-1]])
            self.traces[rollout.request.example.id] = Trace(
                context.step, tokens, list(bounds[:-1]), rollout.id
            )
        context.log("trace_tokens", sum(len(rollout.completion.token_ids) for rollout in batch))

    def _from_prefix(
        self, request: RolloutRequest, prover: MetaProver, context: StepContext
    ) -> list[RolloutRequest]:
        """The request from a random prefix of its prompt's trace, and that of forced answers there.

        The budget of tokens counts the prefix. A prefix that leaves no room is not drawn.
        """
        trace, sampling = self.traces[request.example.id], request.sampling
        room = context.engine.max_model_len - len(request.prompt_ids) - len(prover.cue_ids)
        room = min(room - self.config.probes.max_tokens, sampling.max_tokens - 1)
        fitting = [length for length in trace.prefixes if length <= room] or [0]
        rng = np.random.default_rng(derive_seed(sampling.seed, "cut"))
        length = fitting[rng.integers(len(fitting))]
        context.log("prefix_tokens", length)
        prefix = tuple(trace.token_ids[:length])
        start = replace(
            request,
            prompt_ids=request.prompt_ids + prefix,
            given=request.given + prover.decode([list(prefix)])[0],
            sampling=replace(sampling, max_tokens=sampling.max_tokens - length),
            fork=Fork(trace.rollout, length),
        )
        together = self.config.mode == "implicit_group"
        count = sampling.n // 2 if together else self.config.probes.branches
        forced = replace(
            start,
            prompt_ids=start.prompt_ids + prover.cue_ids,
            given=start.given + self.config.probes.cue,
            role=TERMINATE if together else PROBE,
            sampling=replace(
                sampling,
                n=max(count, 1),
                max_tokens=self.config.probes.max_tokens,
                seed=derive_seed(sampling.seed, TERMINATE),
            ),
        )
        if together:
            start = replace(start, sampling=replace(start.sampling, n=sampling.n - count))
        return [start, forced]

    def _against_terminations(
        self, group: tuple[list[Rollout], list[Rollout]], context: StepContext
    ) -> dict[str, float]:
        """`implicit_group` and `termination_baseline`: one prefix's rollouts and the answers forced there."""
        solutions, forced = group
        continued, terminated = _rewards(solutions), _rewards(forced)
        if not (len(continued) and len(terminated)):
            return {}
        context.log("success_continued", continued.mean())
        context.log("success_terminated", terminated.mean())
        context.log("progress", continued.mean() - terminated.mean())
        if self.config.mode == "termination_baseline":
            return _by_id(solutions, baseline_advantages(continued, terminated))
        going_on, answering = implicit_advantages(continued, terminated)
        trained = _by_id(forced, answering) if self.config.train_on_terminations else {}
        return _by_id(solutions, going_on) | trained

    # --- progress of single episodes -----------------------------------------------------------------------

    def _ask_around_return(self, rollouts: Sequence[Rollout], prover: MetaProver) -> list[Rollout]:
        """`backtrack`: answers before the line that returns, and new attempts after it."""
        pattern = re.compile(self.config.backtrack + r".*\n?", re.MULTILINE)
        cuts = []
        for rollout in rollouts:
            tokens = rollout.completion.token_ids
            match = pattern.search(prover.decode([list(tokens)])[0])
            if match is not None:
                before, after = token_places(tokens, prover.decode, match.span())
                cuts += [Cut(rollout, before), Cut(rollout, after, forced=False)]
        answers = prover.ask(cuts)
        for index in range(0, len(cuts), 2):
            values = [success(found) for found in answers[index : index + 2]]
            _note(cuts[index].rollout, values=values)
        return [rollout for found in answers for rollout in found]

    def _with_bonus(self, batch: RolloutBatch, context: StepContext) -> Channel:
        """`explicit` and `backtrack`: what could not be measured is not trained on."""
        before = {
            rollout.request.group: success(forced)
            for solutions, forced in _prefix_groups(batch)
            for rollout in solutions
        }
        rollouts, steps = [], []
        for rollout in batch.with_role(SOLUTION):
            noted = rollout.info.get("mrt")
            values = noted["values"] if noted else [0.0, 0.0]  # a rollout that does not return: no bonus
            if self.config.mode == "explicit":
                values = [before.get(rollout.request.group, math.nan), *values[-1:]]
            if not any(map(math.isnan, values)):
                rollouts.append(rollout)
                steps.append(values)
                context.log("progress", values[1] - values[0])
                context.log("progress_not_positive", values[1] <= values[0])
        first, last = np.array(steps, dtype=np.float64).reshape(-1, 2).T
        groups = [rollout.request.group for rollout in rollouts]
        advantages = bonus_advantages(_rewards(rollouts), first, last, groups, self.config.alpha)
        return Channel("outcome", _by_id(rollouts, advantages))

    def _progress(self, rollouts: Sequence[Rollout], context: StepContext) -> list[Channel]:
        """`online`: the progress of every episode on its tokens, standardised over the batch."""
        measured: list[tuple[Rollout, list[tuple[int, int]], Floats]] = []
        for rollout in rollouts:
            values, bounds = rollout.info["mrt"]["values"], rollout.info["mrt"]["bounds"]
            if math.isnan(values[0]):
                continue
            # An episode whose end could not be measured goes with the next.
            known = [index for index, value in enumerate(values) if not math.isnan(value)]
            values, bounds = [values[index] for index in known], [bounds[index] for index in known]
            steps = progress(values)
            spans = list(pairwise(bounds))
            context.log("telescoping_error", telescoping_error(values, steps))
            context.log("episodes", len(steps))
            context.log("success_before", values[0])
            for step in steps:
                context.log("progress", step)
                context.log("progress_not_positive", step <= 0)
            credit = progress_to_go(steps) if self.config.credit == "to_go" else steps
            measured.append((rollout, spans, credit))
        stats = _over_ranks([value for _, _, credit in measured for value in credit])
        return [
            Channel(
                "progress",
                {
                    rollout.id: spread_over_tokens(
                        credit, spans, len(rollout.completion.token_ids), stats
                    ).tolist()
                    for rollout, spans, credit in measured
                },
                weight=self.config.alpha,
            )
        ]


def _ask_after_next(rollouts: Sequence[Rollout], prover: MetaProver) -> list[Rollout]:
    """`explicit`: answers at the end of each rollout's first episode.

    A rollout that ends its thinking, or is ended, before another begins is its own measure.
    """
    cuts = {r.id: Cut(r, places[0]) for r in rollouts if (places := prover.thinking(r).cuts)}
    answers = dict(zip(cuts, prover.ask(list(cuts.values())), strict=True))
    for rollout in rollouts:
        _note(rollout, values=[success(answers[rollout.id]) if rollout.id in answers else rollout.reward])
    return [rollout for found in answers.values() for rollout in found]


def _ask_everywhere(rollouts: Sequence[Rollout], prover: MetaProver) -> list[Rollout]:
    """`online`: answers before the thinking, once for a group, and after every episode but the last.

    The value after the last is the outcome itself: nothing is between the end of the thinking and the answer.
    """
    found = [prover.thinking(rollout) for rollout in rollouts]
    first: dict[str, tuple[Rollout, int]] = {}
    for rollout, thinking in zip(rollouts, found, strict=True):
        first.setdefault(rollout.request.group, (rollout, thinking.start))
    cuts = [Cut(rollout, start) for rollout, start in first.values()]
    cuts += [
        Cut(rollout, at) for rollout, thinking in zip(rollouts, found, strict=True) for at in thinking.cuts
    ]
    answers = prover.ask(cuts)
    start = {group: success(one) for group, one in zip(first, answers, strict=False)}
    rest = iter(answers[len(first) :])
    for rollout, thinking in zip(rollouts, found, strict=True):
        between = [success(next(rest)) for _ in thinking.cuts]
        values = [start[rollout.request.group], *between, rollout.reward]
        _note(rollout, values=values, bounds=list(thinking.bounds))
    return [rollout for one in answers for rollout in one]


def _prefix_groups(batch: RolloutBatch) -> list[tuple[list[Rollout], list[Rollout]]]:
    """Of each group the rollouts that went on from its prefix and the answers forced there."""
    groups = RolloutBatch([r for r in batch if r.request.role in (SOLUTION, TERMINATE, PROBE)]).groups()
    return [
        (
            [r for r in group if r.request.role == SOLUTION],
            [r for r in group if r.request.role != SOLUTION],
        )
        for group in groups.values()
    ]


def _note(rollout: Rollout, **found: Any) -> None:
    """Keep what was measured with the rollout, where checkpoints find it."""
    rollout.info["mrt"] = found


def _rewards(rollouts: Sequence[Rollout]) -> Floats:
    return np.array([r.reward for r in rollouts if r.reward is not None], dtype=np.float64)


def _by_id(rollouts: Sequence[Rollout], advantages: Floats) -> dict[str, float]:
    return {rollout.id: float(value) for rollout, value in zip(rollouts, advantages, strict=True)}


def _over_ranks(values: Sequence[float]) -> BatchStats:
    """Mean and deviation of the values of all ranks."""
    moments = [[len(values), sum(values), sum(value * value for value in values)]]
    return BatchStats.from_moments(np.array(gather_object(moments), dtype=np.float64).sum(axis=0))


METHOD = MRT
