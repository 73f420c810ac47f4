"""MASA: meta-awareness by self-alignment (Kim et al., arXiv:2510.03259; version 2 calls it MAPR).

For every problem the policy is also asked, before solving it, for the notions a solution needs, its own pass
rate and the length of a solution. The answers are rewarded against the policy's own solution rollouts of the
same problem and trained in groups of their own, as one loss over the union with the solutions:

    1  ask M self-predictions and G solutions of every problem        plan
    2  reward each self-prediction: (length + difficulty + notion) / 3  extend
    3  normalise rewards within the G and within the M                channels
    4  one update on all P (G + M) sequences

The efficient phase asks first, then leaves out problems that would teach nothing, caps the solutions' length
and, if wanted, hints at the notions. `Controls` opens and closes gate and cap.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from posttrain.data.prompts import encode_prompt
from posttrain.data.self_predictions import (
    Prediction,
    hinted_example,
    meta_example,
    parse_prediction,
    problem_text,
    reasoning_of,
    write_prediction,
)
from posttrain.errors import RecipeError
from posttrain.methods.base import Channel, LossTerm, Method, RolloutPlan, StepContext
from posttrain.recipe.masa_schema import EfficientConfig, GuardConfig, MasaConfig
from posttrain.rollout.types import Rollout, RolloutBatch, RolloutRequest, derive_seed
from posttrain.training.advantages import group_advantages
from posttrain.training.self_alignment import (
    Assessment,
    Forecast,
    MetaReward,
    Solutions,
    calibration,
    calibration_bins,
    is_gated,
    length_limit,
    meta_reward,
)

logger = logging.getLogger(__name__)

SOLUTION, META = "solution", "meta"
COLLAPSED = 0.02
"""Standard deviation over problems below which predicted pass rates no longer tell them apart."""
MIN_LEAVING = 10
"""Gated problems that must have been rolled out before the gate is closed for being wrong."""


@dataclass
class Controls:
    """Whether gating and cutting are on, and what decides that: counts of the last steps over all ranks.

    `gate_window` has for every step how many rolled-out problems the gate would have left out and how many of
    them rightly; `cut_window` how many correct uncapped solutions there were and how many a cap would cut.
    """

    gating: bool
    cutting: bool
    gate_window: list[tuple[int, int]]
    cut_window: list[tuple[int, int]]

    def decide(self, step: int, config: EfficientConfig | None) -> None:
        """Open and close the gate and the cap for a step, from what was seen before it."""
        if config is None or step < config.start:
            return
        guard = config.guard
        if guard is None:
            self.gating, self.cutting = config.gate, config.cutoff
            return
        gated, right = self.sums(self.gate_window)
        precision = right / max(gated, 1)
        if self.gating:
            self.gating = gated < MIN_LEAVING or precision >= guard.leave_below
        else:
            self.gating = config.gate and gated >= guard.evidence and precision >= guard.precision
        correct, lost = self.sums(self.cut_window)
        enough = correct >= guard.evidence and lost <= guard.cutoff_false_rate * correct
        self.cutting = config.cutoff and enough

    def add(self, gate: tuple[int, int], cut: tuple[int, int], window: int) -> None:
        """Note the counts of a step."""
        self.gate_window = [*self.gate_window, gate][-window:]
        self.cut_window = [*self.cut_window, cut][-window:]

    @staticmethod
    def sums(window: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """The counts of all steps together."""
        return sum(first for first, _ in window), sum(second for _, second in window)


class Masa(Method):
    """Self-predictions, rewarded by the policy's own solutions; see the module."""

    name = "masa"
    Config = MasaConfig
    scores = frozenset({META})
    config: MasaConfig

    def __init__(self, config: MasaConfig):
        super().__init__(config)
        self.controls = Controls(False, False, [], [])
        self.gated: dict[str, float] = {}
        """Spread of the predictions by id of the problems that stay gated."""
        self.experts: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        """This rank's (prompt, answer) pairs that wait to be cloned."""
        self.cloned: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.clone_steps = 0
        self._early: list[Rollout] = []
        """Self-predictions that were asked for before the solutions of the step."""
        self._limits: dict[str, int] = {}
        """Caps by group of this step's solutions that have one."""

    # --- what to sample --------------------------------------------------------------------------------

    def plan(self, plan: RolloutPlan, context: StepContext) -> RolloutPlan:
        """Ask for self-predictions beside the solutions, or in the efficient phase before them."""
        self._early, self._limits = [], {}
        efficient = self.config.efficient
        self.controls.decide(context.step, efficient)
        if efficient is not None and self._controls_anything(context.step, efficient):
            return self._controlled(plan, context, efficient)
        return RolloutPlan([*plan.requests, *self._questions(plan.requests, context)])

    def _controls_anything(self, step: int, efficient: EfficientConfig) -> bool:
        return step >= efficient.start and (self.controls.gating or self.controls.cutting or efficient.hints)

    def _questions(self, requests: Sequence[RolloutRequest], context: StepContext) -> list[RolloutRequest]:
        """The request for self-predictions of each solution request; none where there is no room for it."""
        config, questions = self.config, []
        for request in requests:
            if request.role != SOLUTION:
                continue
            cap = request.sampling.max_tokens
            example = meta_example(request.example, config.question, cap)
            ids = encode_prompt(example, context.tokenizer, config.question.format)
            seed = derive_seed(request.sampling.seed, META)
            sampling = replace(
                request.sampling, n=config.group_size, max_tokens=config.max_tokens or cap, seed=seed
            )
            fits = len(ids) + sampling.max_tokens <= context.engine.max_model_len
            context.log("too_long", float(not fits))
            if fits:
                questions.append(RolloutRequest(ids, example, _meta_group(request.group), sampling, META))
        return questions

    def _controlled(self, plan: RolloutPlan, context: StepContext, efficient: EfficientConfig) -> RolloutPlan:
        """The efficient phase: self-predictions now; gated, capped and hinted solutions to be sampled."""
        solutions = [request for request in plan.requests if request.role == SOLUTION]
        guard = efficient.guard
        audited = {r.group for r in solutions if guard and _draw(r.sampling.seed, "audit") < guard.audit}
        stays = {r.group for r in solutions if self.controls.gating and r.example.id in self.gated} - audited
        questions = self._questions([r for r in solutions if r.group not in stays], context)
        self._early = context.generate(questions).rollouts
        predictions = self._read(self._early)
        forecasts = self.forecasts(solutions, predictions, context)
        spreads = {r.group: self.gated[r.example.id] for r in solutions if r.group in stays}
        if self.controls.gating:
            spreads |= {
                group: forecast.spread
                for group, forecast in forecasts.items()
                if group not in audited and self._is_gated(forecast)
            }
        gated = self._most_sure(spreads, len(solutions), guard, context)
        if efficient.regate == "static":
            new = {r.example.id: spreads[r.group] for r in solutions if r.group in gated}
            for part in context.gather(new):
                self.gated |= part
        requests: list[RolloutRequest] = []
        for request in plan.requests:
            group = request.group
            if request.role != SOLUTION or group in audited:
                requests.append(request)
            elif group not in gated:
                capped = self._capped(request, forecasts.get(group), efficient)
                requests += self._hinted(capped, predictions.get(group, []), efficient, context)
        kept = sum(request.sampling.n for request in requests if request.role == SOLUTION)
        asked = sum(request.sampling.n for request in solutions)
        counts = np.sum(context.gather([len(gated), len(audited), len(solutions), asked - kept]), axis=0)
        context.log("gate/share", counts[0] / max(counts[2], 1))
        context.log("gate/audited", counts[1] / max(counts[2], 1))
        context.log("gate/solutions_not_sampled", counts[3])
        return RolloutPlan(requests)

    def forecasts(
        self,
        solutions: Sequence[RolloutRequest],
        predictions: Mapping[str, Sequence[Prediction]],
        context: StepContext,
    ) -> dict[str, Forecast]:
        """What is forecast of the problems that were asked about, by group."""
        levels = self.config.question.levels
        return {group: Forecast.of(made, levels) for group, made in predictions.items()}

    def _is_gated(self, forecast: Forecast) -> bool:
        config = self.config.efficient or EfficientConfig()
        return is_gated(forecast, sigma=config.sigma, tolerance=config.tolerance, min_valid=config.min_valid)

    def _most_sure(
        self, spreads: Mapping[str, float], problems: int, guard: GuardConfig | None, context: StepContext
    ) -> set[str]:
        """The groups to gate: of all ranks' candidates the surest, up to the share that may be gated."""
        parts = context.gather([problems, sorted((spread, group) for group, spread in spreads.items())])
        ranked = sorted(candidate for _, candidates in parts for candidate in candidates)
        most = len(ranked) if guard is None else math.floor(guard.max_fraction * sum(n for n, _ in parts))
        return {group for _, group in ranked[:most]} & spreads.keys()

    def _capped(
        self, request: RolloutRequest, forecast: Forecast | None, config: EfficientConfig
    ) -> RolloutRequest:
        """The request with the cap that the forecast asks for."""
        if not self.controls.cutting or forecast is None:
            return request
        limit = self._limit(forecast, request.sampling.max_tokens, config)
        if limit < request.sampling.max_tokens:
            self._limits[request.group] = limit
        return replace(request, sampling=replace(request.sampling, max_tokens=limit))

    @staticmethod
    def _limit(forecast: Forecast, cap: int, config: EfficientConfig) -> int:
        return length_limit(forecast, cap, config.multiplier, config.statistic, config.min_limit)

    def _hinted(
        self,
        request: RolloutRequest,
        predictions: Sequence[Prediction],
        config: EfficientConfig,
        context: StepContext,
    ) -> list[RolloutRequest]:
        """One request for each solution, with the notions of a self-prediction drawn for it."""
        if not config.hints or not predictions:
            return [request]
        requests = []
        for index in range(request.sampling.n):
            seed = derive_seed(request.sampling.seed, "hint", index)
            notions = predictions[seed % len(predictions)].notions
            example = hinted_example(request.example, notions, self.config.question)
            ids = encode_prompt(example, context.tokenizer, self.config.question.format)
            room = len(ids) + request.sampling.max_tokens <= context.engine.max_model_len
            prompt = ids if notions and room else request.prompt_ids
            sampling = replace(request.sampling, n=1, seed=seed)
            requests.append(replace(request, prompt_ids=prompt, sampling=sampling))
        return requests

    # --- what it is worth ------------------------------------------------------------------------------

    def extend(self, batch: RolloutBatch, context: StepContext) -> RolloutBatch:
        """Reward the self-predictions with the statistics of their problem's solutions.

        Those of a problem without solutions, because it was gated or replaced, get none and train nothing.
        """
        batch = batch + RolloutBatch(self._early)
        groups = batch.with_role(SOLUTION).groups()
        known = {rollout.request.group for rollout in batch.with_role(META)}
        # Problems that replaced others after the plan, and those that stayed in a full gate.
        missing = [own[0].request for group, own in groups.items() if _meta_group(group) not in known]
        batch = batch + context.generate(self._questions(missing, context))
        asked = batch.with_role(META).rollouts
        predictions = self._read(asked)
        solutions = self.pair({group: self._solutions(own) for group, own in groups.items()}, context)
        rewards: dict[str, list[MetaReward]] = {}
        for rollout in asked:
            group = _solution_group(rollout.request.group)
            if group in solutions:
                worth = self._reward(rollout, groups[group][0], solutions[group])
                rewards.setdefault(group, []).append(worth)
        self._collect_experts(asked, rewards, solutions, context)
        self._watch(batch, predictions, rewards, solutions, context)
        return batch

    def pair(self, solutions: dict[str, Solutions], context: StepContext) -> dict[str, Solutions]:
        """The solutions that each problem's self-predictions are judged by: its own."""
        return solutions

    def _solutions(self, rollouts: Sequence[Rollout]) -> Solutions:
        correct = [
            (self._outcome(rollout) or 0.0) >= self.config.correct.threshold and not rollout.truncated
            for rollout in rollouts
        ]
        lengths = [len(rollout.completion.token_ids) for rollout in rollouts]
        return Solutions([rollout.completion.text for rollout in rollouts], correct, lengths)

    def _outcome(self, rollout: Rollout) -> float | None:
        name = self.config.correct.reward or next(iter(rollout.rewards))
        if name not in rollout.rewards:
            known = ", ".join(rollout.rewards)
            raise RecipeError(f"methods: masa.correct.reward: there is no reward {name!r}; there are {known}")
        return rollout.rewards[name]

    def _read(self, rollouts: Sequence[Rollout]) -> dict[str, list[Prediction]]:
        """Self-predictions by the group of the solutions they are about."""
        found: dict[str, list[Prediction]] = {}
        for rollout in rollouts:
            prediction = parse_prediction(rollout.completion.text, self.config.question)
            found.setdefault(_solution_group(rollout.request.group), []).append(prediction)
        return found

    def _reward(self, rollout: Rollout, solution: Rollout, solutions: Solutions) -> MetaReward:
        question = self.config.question
        worth = meta_reward(
            parse_prediction(rollout.completion.text, question),
            solutions,
            problem_text(solution.request.example, question),
            question.levels,
            self.config.reward,
        )
        rollout.rewards = {
            "meta_length": worth.length,
            "meta_difficulty": worth.difficulty,
            "meta_notion": worth.notion,
        }
        rollout.reward = worth.total
        return worth

    def channels(self, batch: RolloutBatch, context: StepContext) -> list[Channel]:
        """The self-predictions' advantages, (r - mean) / standard deviation in groups of their own.

        They share the solutions' denominator: one loss over the union, without a weight between the two.
        """
        meta = [rollout for rollout in batch.with_role(META) if rollout.reward is not None]
        rewards = np.array([rollout.reward for rollout in meta], dtype=np.float64)
        advantages = group_advantages(rewards, [rollout.request.group for rollout in meta])
        by_id = {r.id: float(value) for r, value in zip(meta, advantages, strict=True)}
        return [Channel(META, by_id, pool="outcome")]

    def _collect_experts(
        self,
        asked: Sequence[Rollout],
        rewards: Mapping[str, Sequence[MetaReward]],
        solutions: Mapping[str, Solutions],
        context: StepContext,
    ) -> None:
        """Keep each problem's self-prediction with the best notions, the true pass rate and length in it."""
        config = self.config.experts
        if config is None:
            return
        groups = RolloutBatch(list(asked)).groups()
        for group, worth in rewards.items():
            best = max(range(len(worth)), key=lambda index: worth[index].notion)
            if worth[best].notion >= config.min_notion:
                expert = groups[_meta_group(group)][best]
                answer = self._corrected(expert.completion.text, solutions[group])
                ids = context.tokenizer(answer, add_special_tokens=False)["input_ids"]
                self.experts.append((expert.request.prompt_ids, (*ids, int(context.tokenizer.eos_token_id))))
        if sum(context.gather(len(self.experts))) >= config.batch:
            self.cloned, self.experts, self.clone_steps = self.experts, [], config.updates

    def _corrected(self, text: str, solutions: Solutions) -> str:
        """An expert's reasoning and notions with the true statistics."""
        question = self.config.question
        truth = Prediction(
            notions=parse_prediction(text, question).notions,
            pass_rate=math.floor(question.levels * solutions.pass_rate + 0.5),
            length=round(float(np.mean(solutions.correct_lengths))),
        )
        return write_prediction(truth, question, reasoning_of(text))

    def auxiliary(self, context: StepContext) -> list[LossTerm]:
        """The experts, for some steps; every rank has the term, though maybe none of them."""
        if not self.clone_steps or self.config.experts is None:
            return []
        self.clone_steps -= 1
        return [LossTerm("experts", self.cloned, self.config.experts.weight)]

    # --- what is watched -------------------------------------------------------------------------------

    def _watch(
        self,
        batch: RolloutBatch,
        predictions: Mapping[str, Sequence[Prediction]],
        rewards: Mapping[str, Sequence[MetaReward]],
        solutions: Mapping[str, Solutions],
        context: StepContext,
    ) -> None:
        """Log how the predictions do, and note what gate and cap are judged by.

        Statistics are over the problems of all ranks, so that every rank decides the same, whatever their
        number.
        """
        levels, efficient = self.config.question.levels, self.config.efficient or EfficientConfig()
        caps = {r.request.group: r.request.sampling.max_tokens for r in batch.with_role(SOLUTION)}
        assessments, gate, cut, over = [], [0, 0], [0, 0], [0, 0]
        for group, worth in rewards.items():
            own, forecast = solutions[group], Forecast.of(predictions[group], levels)
            assessments.append(Assessment.of(predictions[group], worth, own, levels))
            if group in self._limits:
                continue  # a capped problem's pass rate and lengths are not what they would have been
            if self._is_gated(forecast):
                gate = [gate[0] + 1, gate[1] + (own.pass_rate in (0.0, 1.0))]
            limit = self._limit(forecast, caps[group], efficient)
            lengths = own.correct_lengths
            lost = sum(length > limit for length in lengths)
            cut = [cut[0] + len(lengths), cut[1] + lost]
            long = sum(length > limit for length in own.lengths)
            over = [over[0] + long, over[1] + long - lost]
        limited = [r for r in batch.with_role(SOLUTION) if r.request.group in self._limits]
        counts = [*gate, *cut, *over, len(limited), sum(r.truncated for r in limited)]
        counts += [_tokens(batch, SOLUTION), _tokens(batch, META)]
        parts = context.gather([assessments, counts])
        everything = [assessment for own, _ in parts for assessment in own]
        total = np.sum([own for _, own in parts], axis=0).tolist()
        window = efficient.guard.window if efficient.guard else GuardConfig().window
        self.controls.add((total[0], total[1]), (total[2], total[3]), window)
        self._log_calibration(everything, context)
        self._log_controls(total, context)

    def _log_calibration(self, assessments: Sequence[Assessment], context: StepContext) -> None:
        found = calibration(assessments)
        for name, value in found.items():
            context.log(name, value)
        for level, (problems, truth) in calibration_bins(assessments, self.config.question.levels).items():
            context.log(f"level/{level}/problems", problems)
            context.log(f"level/{level}/truth", truth)
        if len(assessments) > 1 and "rate_spread" in found:
            collapsed = found["rate_spread"] < COLLAPSED
            context.log("collapsed", float(collapsed))
            if collapsed:
                message = "step %d: predicted pass rates are the same for all problems (%.2g)"
                logger.warning(message, context.step + 1, found["rate_predicted"])

    def _log_controls(self, total: Sequence[int], context: StepContext) -> None:
        gated, right, _, _, over, wrong, limited, cut, solution, meta = total
        seen, good = self.controls.sums(self.controls.gate_window)
        correct, lost = self.controls.sums(self.controls.cut_window)
        shares = {
            "gate/wrong": (gated - right, gated),
            "gate/precision": (good, seen),
            "cutoff/false_rate": (lost, correct),
            "cutoff/cut": (cut, limited),
            "cutoff/wrong": (wrong, over),
            "tokens/meta_share": (meta, solution + meta),
        }
        values = {name: part / whole for name, (part, whole) in shares.items() if whole}
        values |= {
            "gate/would": gated,
            "gate/open": self.controls.gating,
            "cutoff/open": self.controls.cutting,
        }
        values |= {"tokens/solution": solution, "tokens/meta": meta}
        for name, value in values.items():
            context.log(name, float(value))

    def state_dict(self) -> dict[str, Any]:
        """Windows, open controls, gated problems and experts."""
        return {
            "gating": self.controls.gating,
            "cutting": self.controls.cutting,
            "gate_window": self.controls.gate_window,
            "cut_window": self.controls.cut_window,
            "gated": self.gated,
            "experts": self.experts,
            "cloned": self.cloned,
            "clone_steps": self.clone_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.controls = Controls(
            state["gating"],
            state["cutting"],
            [(first, second) for first, second in state["gate_window"]],
            [(first, second) for first, second in state["cut_window"]],
        )
        self.gated = dict(state["gated"])
        self.experts = [(tuple(prompt), tuple(answer)) for prompt, answer in state["experts"]]
        self.cloned = [(tuple(prompt), tuple(answer)) for prompt, answer in state["cloned"]]
        self.clone_steps = state["clone_steps"]


def _meta_group(group: str) -> str:
    return f"{group}.{META}"


def _solution_group(group: str) -> str:
    return group.removesuffix(f".{META}")


def _draw(seed: int, what: str) -> float:
    """A number in [0, 1) that belongs to a prompt of a step."""
    return derive_seed(seed, what) / 2**63


def _tokens(batch: RolloutBatch, role: str) -> int:
    return sum(len(rollout.completion.token_ids) for rollout in batch.with_role(role))


METHOD = Masa
