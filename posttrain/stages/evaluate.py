"""Evaluation: sample answers to held-out problems; metrics with confidence intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from accelerate.utils import gather_object

from posttrain.data.sources import load_examples
from posttrain.evaluation.forecasts import forecast_quality, forecast_traces
from posttrain.evaluation.metrics import Estimate, estimate
from posttrain.evaluation.pareto import difficulties, measure_pareto, tapes_by_problem
from posttrain.evaluation.samples import GREEDY_ROLE, group_by_problem, problem_values
from posttrain.evaluation.self_predictions import questions, self_assessment
from posttrain.evaluation.thinking import Trace, thinking_curves, thinking_metrics, trace_points, wanted
from posttrain.recipe.mrt_schema import THINKING_METRICS
from posttrain.recipe.pareto_schema import FORECAST_METRICS
from posttrain.recipe.schema import EvaluateStage
from posttrain.rewards.scorer import Scorer
from posttrain.rewards.shared import SharedEngine
from posttrain.rollout.build import build_engine, load_grid, load_tokenizer
from posttrain.rollout.engine import RolloutEngine, require_finite
from posttrain.rollout.probes import MetaProver
from posttrain.rollout.tools_engine import prompts_of, with_tools
from posttrain.rollout.types import Rollout, RolloutBatch, RolloutRequest, Sampling, make_rollouts, with_seed
from posttrain.stages.context import StageContext, StageResult
from posttrain.training.record import rollout_rows, write_json, write_rollouts
from posttrain.zip_rc.grid import Grid

SEED = 0
"""Evaluations use the same sampling seeds whatever the run's seed: two runs differ by their models alone."""

Score = Callable[[Sequence[Rollout]], None]
"""Scores rollouts in place."""


def run(stage: EvaluateStage, context: StageContext) -> StageResult:
    """Run the stage: sample, score, estimate, write. The model is handed on as it is."""
    recipe = context.recipe
    source = context.data(stage.data or recipe.data.eval)
    rewards = recipe.rewards_of(stage)
    reward = stage.correct.reward or rewards[0].name
    tokenizer = load_tokenizer(context.model)
    prompts = prompts_of(recipe.tools, tokenizer, source.format)
    examples = load_examples(source)
    grid = None if set(FORECAST_METRICS).isdisjoint(stage.metrics) else load_grid(context.model)
    levels = difficulties(examples, stage.pareto.difficulty) if "pareto" in stage.metrics else None
    sampling = Sampling(
        max_tokens=stage.max_tokens or recipe.rollout.max_tokens,
        n=stage.samples,
        temperature=stage.temperature,
        top_p=stage.top_p,
        top_k=stage.top_k,
        stop=tuple(recipe.rollout.stop),
        scored_ids=grid.ids if grid else (),
    )
    requests = [
        with_seed(
            RolloutRequest(prompts.encode(example), example, example.id, sampling),
            SEED,
            "evaluate",
            example.id,
        )
        for example in examples
    ]
    engine = build_engine(recipe.rollout, context.model, tokenizer, seed=SEED)
    engine = with_tools(engine, recipe.tools, prompts)
    counts: Counter[str] = Counter()
    try:
        with context.scorer(rewards, SharedEngine(engine, tokenizer)) as scorer:
            score = partial(_score, scorer, counts)
            sampled = _answer(requests, engine, score, context, "sampling")
            greedy = RolloutBatch([])
            if "greedy" in stage.metrics:
                greedy = _answer([_once(request) for request in requests], engine, score, context, "greedy")
            traces = _cut_short(stage, sampled, engine, tokenizer, score, reward, context)
            asked = questions(requests, stage.meta, prompts.encode) if "meta" in stage.metrics else []
            told = RolloutBatch([])
            if asked:
                told = _answer(asked, engine, None, context, "self-predictions")
    finally:
        engine.close()

    rollouts = (sampled + greedy).rollouts
    correct = [is_correct(rollout, reward, stage.correct.threshold) for rollout in rollouts]
    metrics = measure(stage, rollouts, correct) | thinking_metrics(stage, traces)
    rows = rollout_rows(
        rollouts,
        step=0,
        prompt_text={example.id: prompts.render(example) for example in examples},
    )
    for row, outcome in zip(rows, correct, strict=True):
        row["correct"] = outcome
    summary = {
        "stage": context.name,
        "model": context.model.path,
        "problems": len(examples),
        "samples": stage.samples,
        "correct": {"reward": reward, "threshold": stage.correct.threshold},
        "metrics": {name: value.to_dict() for name, value in metrics.items()},
        "unscored": sum(outcome is None for outcome in correct),
        "counts": dict(sum(gather_object([counts]), Counter())),
        "tokens/sampled": sum(rollout.completion.sampled_tokens for rollout in [*rollouts, *told]),
    }
    if traces:
        summary["thinking"] = thinking_curves(stage, traces)
    if asked:
        sampled_ones = zip(sampled, correct[: len(sampled)], strict=True)
        summary["meta"] = self_assessment(list(sampled_ones), told.rollouts, stage.meta)
    if grid:
        scored = list(zip(sampled, correct[: len(sampled)], strict=True))
        summary |= _foreseen(stage, context, grid, scored, levels)
    if context.rank == 0:
        write_rollouts(context.folder("rollouts") / "samples.parquet", rows)
        write_json(context.folder("evaluations") / "metrics.json", summary)
    return StageResult(context.model, {"evaluation": summary})


def _foreseen(
    stage: EvaluateStage,
    context: StageContext,
    grid: Grid,
    sampled: Sequence[tuple[Rollout, bool | None]],
    levels: Mapping[str, float] | None,
) -> dict[str, Any]:
    """What the summary says about forecasts; `pareto.json` has metric `pareto` by problem."""
    found: dict[str, Any] = {}
    if "forecasts" in stage.metrics:
        found["forecasts"] = forecast_quality(grid, forecast_traces(grid, sampled))
    if "pareto" in stage.metrics and context.rank == 0:
        context.show(0, 1, {"phase": "playing policies"})
        tapes = tapes_by_problem(grid, sampled, stage.pareto.interval)
        pareto = measure_pareto(tapes, grid, stage.pareto, stage.samples, levels)
        found["pareto"] = pareto.summary(stage.confidence)
        write_json(context.folder("evaluations") / "pareto.json", pareto.table())
    return found


def _once(request: RolloutRequest) -> RolloutRequest:
    """The request for the completion at temperature 0."""
    sampling = replace(request.sampling, n=1, temperature=0.0, top_p=1.0, top_k=0, scored_ids=())
    return replace(request, sampling=sampling, role=GREEDY_ROLE)


def _score(scorer: Scorer, counts: Counter[str], rollouts: Sequence[Rollout]) -> None:
    """Score, and add to the counts what there is to report (`ScoreReport.counts`)."""
    counts.update(scorer.score(rollouts).counts)


def _answer(
    requests: Sequence[RolloutRequest],
    engine: RolloutEngine,
    score: Score | None,
    context: StageContext,
    what: str,
) -> RolloutBatch:
    """Sample and score this process's share of the requests; the rollouts of all processes, in order.

    Without `score` they are not scored.
    """
    context.show(0, 1, {"phase": what})
    start, end = (place * len(requests) // context.world for place in (context.rank, context.rank + 1))
    share = requests[start:end]
    answers = engine.generate(share)
    require_finite(share, answers)
    batch = make_rollouts(share, answers, engine.version)
    if score is not None:
        score(batch.rollouts)
    return RolloutBatch(gather_object(batch.rollouts))


def _cut_short(
    stage: EvaluateStage,
    sampled: RolloutBatch,
    engine: RolloutEngine,
    tokenizer: Any,
    score: Score,
    reward: str,
    context: StageContext,
) -> list[Trace]:
    """The points of every sampled trace, if a metric wants them; of all processes, in order."""
    if not wanted(stage):
        return []
    context.show(0, 1, {"phase": "cutting traces short"})
    start, end = (place * len(sampled) // context.world for place in (context.rank, context.rank + 1))
    prover = MetaProver(engine, tokenizer, score, stage.thinking.probes)
    traces = trace_points(
        stage,
        sampled.rollouts[start:end],
        prover,
        lambda rollout: is_correct(rollout, reward, stage.correct.threshold),
    )
    return list(gather_object(traces))


def is_correct(rollout: Rollout, reward: str, threshold: float) -> bool | None:
    """Whether a rollout's reward reaches the threshold; None when it has no value."""
    value = rollout.rewards.get(reward)
    return None if value is None else value >= threshold


def measure(
    stage: EvaluateStage, rollouts: Sequence[Rollout], correct: Sequence[bool | None]
) -> dict[str, Estimate]:
    """The metrics a stage asks for, by name.

    Outcomes are grouped by problem; a sample without a score is left out, never counted as wrong.
    """
    rows = [
        {
            "example_id": rollout.request.example.id,
            "role": rollout.request.role,
            "correct": outcome,
            "length": float(len(rollout.completion.token_ids)),
            "completion": rollout.completion.text,
        }
        for rollout, outcome in zip(rollouts, correct, strict=True)
    ]
    problems = list(group_by_problem(rows).values())
    names = [name for name in stage.metrics if name not in ("meta", *FORECAST_METRICS, *THINKING_METRICS)]
    return {name: estimate(problem_values(name, problems), stage.confidence) for name in names}
