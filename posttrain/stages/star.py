"""STaR and MRT-STaR: the model's own traces, filtered, as demonstrations for a later `sft` stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate.utils import gather_object

from posttrain.data.prompts import encode_prompt
from posttrain.data.sources import load_examples
from posttrain.data.star import best_prefix, best_trace
from posttrain.errors import DataError
from posttrain.recipe.mrt_schema import StarStage
from posttrain.rewards.shared import SharedEngine
from posttrain.rollout.build import build_engine, load_tokenizer
from posttrain.rollout.engine import require_finite
from posttrain.rollout.probes import MetaProver, Point, success
from posttrain.rollout.types import Rollout, RolloutRequest, Sampling, make_rollouts, with_seed
from posttrain.stages.context import ROWS, StageContext, StageResult
from posttrain.training.ranks import on_first_rank
from posttrain.training.record import replacing, write_json

Kept = tuple[Rollout, str]
"""A trace, and the completion that is to be imitated."""


def run(stage: StarStage, context: StageContext) -> StageResult:
    """Run the stage: sample, score, select, write. The model is handed on as it is.

    Raises:
        DataError: not one trace was kept.
    """
    recipe = context.recipe
    source = context.data(stage.data or recipe.data.train)
    tokenizer = load_tokenizer(context.model)
    examples = load_examples(source)
    start, end = (place * len(examples) // context.world for place in (context.rank, context.rank + 1))
    sampling = Sampling(
        max_tokens=recipe.rollout.max_tokens,
        n=stage.samples,
        temperature=recipe.rollout.temperature,
        stop=tuple(recipe.rollout.stop),
    )
    requests = [
        with_seed(
            RolloutRequest(encode_prompt(example, tokenizer, source.format), example, example.id, sampling),
            recipe.seed,
            context.name,
            example.id,
        )
        for example in examples[start:end]
    ]
    engine = build_engine(recipe.rollout, context.model, tokenizer, seed=recipe.seed)
    try:
        with context.scorer(recipe.rewards, SharedEngine(engine, tokenizer)) as scorer:
            context.show(0, 1, {"phase": "sampling"})
            answers = engine.generate(requests)
            require_finite(requests, answers)
            batch = make_rollouts(requests, answers, engine.version)
            scorer.score(batch.rollouts)
            context.show(0, 1, {"phase": "selecting"})
            prover = MetaProver(engine, tokenizer, scorer.score, stage.probes)
            kept = [row for row in select(stage, batch.rollouts, prover) if row[1].strip()]
    finally:
        engine.close()

    rows = gather_object([_row(rollout, completion) for rollout, completion in kept])
    rollouts = gather_object([(r.reward, len(r.completion.token_ids)) for r in batch])
    if not rows:
        raise DataError(f"stage {stage.name}: none of {len(rollouts)} traces is worth imitating")
    scored = [reward for reward, _ in rollouts if reward is not None]
    summary = {
        "prompts": len(examples),
        "traces": len(rollouts),
        "correct": sum(reward >= stage.threshold for reward in scored),
        "unscored": len(rollouts) - len(scored),
        "kept": len(rows),
        "rows": len(rows[: stage.limit]),
        "probe_tokens": sum(gather_object([prover.tokens])),
    }
    sampled = sum(length for _, length in rollouts) + summary["probe_tokens"]
    context.say(f"   {summary['correct']} of {len(rollouts)} traces are right, {summary['kept']} are kept")

    def write() -> None:
        folder = context.folder("data")
        with replacing(folder / ROWS) as file:
            pq.write_table(pa.Table.from_pylist(rows[: stage.limit]), file)
        write_json(folder / "summary.json", summary)

    on_first_rank(write)
    return StageResult(context.model, {"star": summary, "tokens/sampled": sampled})


def select(stage: StarStage, rollouts: Sequence[Rollout], prover: MetaProver) -> list[Kept]:
    """What of the traces is to be imitated."""
    right = [
        rollout for rollout in rollouts if rollout.reward is not None and rollout.reward >= stage.threshold
    ]
    if stage.selection == "correct":
        return [(rollout, rollout.completion.text) for rollout in right]
    if stage.selection == "best_prefix":
        found = [_shortened(stage, points, prover) for points in prover.ask_everywhere(rollouts)]
        return [kept for kept in found if kept is not None]
    prompts: dict[str, list[tuple[Rollout, list[float]]]] = {}
    for rollout, points in zip(right, prover.ask_everywhere(right), strict=True):
        values = [success(answers) for _, answers in points]
        if not any(map(math.isnan, values)):
            prompts.setdefault(rollout.request.group, []).append((rollout, values))
    kept = []
    for traces in prompts.values():
        lengths = [len(rollout.completion.token_ids) for rollout, _ in traces]
        best = best_trace([values for _, values in traces], lengths)
        if best is not None:
            kept.append((traces[best][0], traces[best][0].completion.text))
    return kept


def _shortened(stage: StarStage, points: Sequence[Point], prover: MetaProver) -> Kept | None:
    """The best prefix of a trace with a right answer given there, the notice that time is up left out."""
    best = best_prefix([success(answers) for _, answers in points], stage.allow_empty_thinking)
    if best is None:
        return None
    cut, answers = points[best]
    answer = next((answer for answer in answers if _is_right(answer, stage)), None)
    if answer is None:
        return None
    kept = prover.decode([list(cut.rollout.completion.token_ids[: cut.at])])[0]
    config = prover.config
    close = config.close + config.cue.partition(config.close)[2] if cut.forced else ""
    return cut.rollout, kept + close + answer.completion.text


def _is_right(rollout: Rollout, stage: StarStage) -> bool:
    return rollout.reward is not None and rollout.reward >= stage.threshold


def _row(rollout: Rollout, completion: str) -> dict[str, Any]:
    example = rollout.request.example
    return {"prompt": example.prompt, "answer": example.answer, "completion": completion}
