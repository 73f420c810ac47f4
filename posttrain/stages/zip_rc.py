"""ZIP-RC: rollouts, values of their answers, and a model that forecasts both at every token.

What is sampled and valued is written to the run folder (`data/STAGE/rollouts-*.parquet`, `values.json`), and
the trainings have checkpoints, so that an interrupted stage goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import AutoConfig, TrainingArguments, set_seed

from posttrain.data.prompts import encode_prompt
from posttrain.data.sources import load_examples
from posttrain.errors import DataError, TrainingError
from posttrain.recipe.schema import ModelConfig, ZipRcStage
from posttrain.recipe.zip_rc_schema import CriticConfig
from posttrain.rewards.scorer import Scorer
from posttrain.rewards.shared import SharedEngine
from posttrain.rollout.build import build_engine, load_model, load_tokenizer
from posttrain.rollout.engine import RolloutEngine, require_finite
from posttrain.rollout.types import Example, Rollout, RolloutRequest, Sampling, make_rollouts, with_seed
from posttrain.stages.context import StageContext, StageResult
from posttrain.stages.evaluate import is_correct
from posttrain.training.arguments import optimizer_arguments
from posttrain.training.load import compute_dtype
from posttrain.training.means import StepMeans
from posttrain.training.ranks import on_first_rank
from posttrain.training.record import replacing, write_json
from posttrain.zip_rc.grid import OUTCOMES, labels, quantile_edges
from posttrain.zip_rc.head import claim_slice, unused_ids
from posttrain.zip_rc.trainer import ForecastSettings, ForecastTrainer, forecast_row

CRITIC = "critic"
"""Folder of the throw-away head's checkpoints, below the stage's own."""
PROMPTS_AT_A_TIME = 2048
"""Prompts whose rollouts are written together: what an interruption loses at most."""


@dataclass(frozen=True)
class Trace:
    """A finished rollout and whether its answer is right."""

    example: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    correct: bool


def run(stage: ZipRcStage, context: StageContext) -> StageResult:
    """Run the stage: sample, score, value, train, save. Hands on a model with the grid in its configuration.

    Raises:
        DataError: no rollout was finished and scored.
        TrainingError: values of right and of wrong answers are not as far apart as they should be.
    """
    traces, counts = _rollouts(stage, context)
    if not traces:
        raise DataError(f"{context.name}: none of the {counts['rollouts']} rollouts was finished and scored")
    edges = tuple(stage.length_edges or quantile_edges(lengths_of(traces), stage.length_bins))
    correct = [float(trace.correct) for trace in traces]
    steps = stage.steps_for(len(traces))
    of = stage.trainings * steps
    summary: dict[str, Any] = {**counts, "correct": float(np.mean(correct)), "length_edges": list(edges)}
    if stage.label == "value":
        values = _values(stage, context, traces, edges)
        levels = tuple(level / (stage.reward_bins - 1) for level in range(stage.reward_bins))
        right, wrong = (_mean(np.array(values)[np.array(correct) == outcome]) for outcome in (1.0, 0.0))
        summary |= {"value_if_right": right, "value_if_wrong": wrong}
        _check_separation(stage, context.name, right, wrong)
    else:
        values, levels = correct, OUTCOMES
    part = Part("", values, levels, stage, before=of - steps)
    trainer = _train(stage, context, traces, edges, part)
    summary |= {"steps": of, "cells": trainer.grid.size, "first_id": trainer.grid.first_id}
    sampled = {"tokens/sampled": summary.pop("tokens/sampled")}
    result = context.hand_over(trainer, {"zip_rc": summary, **sampled})
    # What it was trained from had the adapter merged.
    return replace(result, model=result.model.model_copy(update={"adapter": None}))


def lengths_of(traces: Sequence[Trace]) -> list[int]:
    """Tokens of the completions."""
    return [len(trace.completion_ids) for trace in traces]


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _check_separation(stage: ZipRcStage, name: str, right: float | None, wrong: float | None) -> None:
    least = stage.critic.separation
    if least is None or right is None or wrong is None or right - wrong >= least:
        return
    raise TrainingError(
        f"{name}: the throw-away head's values of right answers are {right - wrong:.3f} above those of wrong "
        f"ones on average, less than critic.separation {least:g}: it cannot tell them apart"
    )


# --- rollouts ----------------------------------------------------------------------------------------------


def _rollouts(stage: ZipRcStage, context: StageContext) -> tuple[list[Trace], dict[str, int]]:
    """Finished and scored rollouts of the model as it is, and counts of all; written, or read again."""
    recipe, folder = context.recipe, context.folder("data")
    source = context.data(stage.data or recipe.data.train)
    examples = load_examples(source)
    paths = [folder / f"rollouts-{start:08d}.parquet" for start in range(0, len(examples), PROMPTS_AT_A_TIME)]
    missing = on_first_rank(lambda: [place for place, path in enumerate(paths) if not path.is_file()])
    if missing:
        tokenizer = load_tokenizer(context.model)
        sampling = Sampling(
            max_tokens=recipe.rollout.max_tokens,
            n=stage.samples,
            temperature=recipe.rollout.temperature,
            stop=tuple(recipe.rollout.stop),
            banned_ids=_slice_ids(stage, context.model, tokenizer),
        )
        engine = build_engine(recipe.rollout, context.model, tokenizer, seed=recipe.seed)
        try:
            with context.scorer(recipe.rewards_of(stage), SharedEngine(engine, tokenizer)) as scorer:
                for place in missing:
                    context.show(place, len(paths), {"phase": "sampling"})
                    part = examples[place * PROMPTS_AT_A_TIME :][:PROMPTS_AT_A_TIME]
                    prompts = [(row, encode_prompt(row, tokenizer, source.format)) for row in part]
                    rows, counts = _sample(stage, context, engine, scorer, prompts, sampling)
                    on_first_rank(partial(_write, paths[place], rows, counts))
        finally:
            engine.close()
    read = [_read(path) for path in paths]
    traces = [trace for part, _ in read for trace in part]
    return traces, {name: sum(counts[name] for _, counts in read) for name in read[0][1]}


def _write(path: Path, rows: Sequence[Trace], counts: dict[str, int]) -> None:
    columns = {
        "example": pa.array([row.example for row in rows], pa.string()),
        "prompt_ids": pa.array([row.prompt_ids for row in rows], pa.list_(pa.int32())),
        "completion_ids": pa.array([row.completion_ids for row in rows], pa.list_(pa.int32())),
        "correct": pa.array([row.correct for row in rows], pa.bool_()),
    }
    with replacing(path) as file:
        pq.write_table(pa.table(columns, metadata={"counts": json.dumps(counts)}), file)


def _read(path: Path) -> tuple[list[Trace], dict[str, int]]:
    table = pq.read_table(path)
    columns = [table[name].to_pylist() for name in table.column_names]
    traces = [Trace(name, tuple(p), tuple(c), right) for name, p, c, right in zip(*columns, strict=True)]
    return traces, json.loads(table.schema.metadata[b"counts"])


def _sample(
    stage: ZipRcStage,
    context: StageContext,
    engine: RolloutEngine,
    scorer: Scorer,
    prompts: Sequence[tuple[Example, tuple[int, ...]]],
    sampling: Sampling,
) -> tuple[list[Trace], dict[str, int]]:
    """Sample and score this process's share of the prompts; the traces of all processes, in order."""
    start, end = (place * len(prompts) // context.world for place in (context.rank, context.rank + 1))
    requests = [
        with_seed(
            RolloutRequest(ids, example, example.id, sampling), context.recipe.seed, context.name, example.id
        )
        for example, ids in prompts[start:end]
    ]
    answers = engine.generate(requests)
    require_finite(requests, answers)
    batch = make_rollouts(requests, answers, engine.version)
    scorer.score(batch.rollouts)
    reward = stage.correct.reward or context.recipe.rewards_of(stage)[0].name
    outcomes = [is_correct(rollout, reward, stage.correct.threshold) for rollout in batch]
    traces = [
        _trace(rollout, outcome)
        for rollout, outcome in zip(batch, outcomes, strict=True)
        if outcome is not None and not rollout.truncated
    ]
    counts = {
        "rollouts": len(batch),
        "truncated": sum(rollout.truncated for rollout in batch),
        "unscored": sum(outcome is None for outcome in outcomes),
        "tokens/sampled": sum(len(rollout.completion.token_ids) for rollout in batch),
    }
    every = gather_object([counts])
    return gather_object(traces), {name: sum(part[name] for part in every) for name in counts}


def _trace(rollout: Rollout, correct: bool) -> Trace:
    request, tokens = rollout.request, rollout.completion.token_ids
    return Trace(request.example.id, request.prompt_ids, tokens, correct)


def _slice_ids(stage: ZipRcStage, model: ModelConfig, tokenizer: Any) -> tuple[int, ...]:
    """Ids that the slice will take, as far as the model has them: untrained rows may be likely by chance."""
    config = AutoConfig.from_pretrained(
        model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    return tuple(unused_ids(config, tokenizer)[: stage.cells])


# --- training ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One of the stage's trainings.

    Attributes:
        name: of its folder of checkpoints below the stage's, and of its metrics.
        rewards: the label of every trace, copied to all of its positions.
        levels: reward values of the grid.
        settings: its variant, weight of the KL term and optimiser.
        before: optimiser steps of the trainings before.
    """

    name: str
    rewards: Sequence[float]
    levels: Sequence[float]
    settings: ZipRcStage | CriticConfig
    before: int

    @property
    def lite(self) -> bool:
        """Whether only the head's rows learn."""
        return self.settings.variant == "lite"

    @property
    def kl(self) -> float:
        """Weight of the KL term."""
        return 0.0 if self.lite else self.settings.kl


def _values(
    stage: ZipRcStage, context: StageContext, traces: Sequence[Trace], edges: tuple[int, ...]
) -> list[float]:
    """The value of every trace's answer, by a head that is trained on right and wrong and thrown away.

    As in the official code it is trained on the rollouts that it then values.
    """
    path = context.folder("data") / "values.json"
    if not on_first_rank(path.is_file):
        correct = [float(trace.correct) for trace in traces]
        part = Part(CRITIC, correct, OUTCOMES, stage.critic, before=0)
        trainer = _train(stage, context, traces, edges, part)
        rows = [forecast_row(trace.prompt_ids, trace.completion_ids) for trace in traces]
        for row in rows:
            row.positions, row.cells = row.positions[-stage.value_tokens :], row.cells[-stage.value_tokens :]
        context.show(0, 1, {"phase": "valuing rollouts"})
        values = trainer.expected_rewards(rows)
        on_first_rank(lambda: write_json(path, values))
    return json.loads(path.read_text())


def _train(
    stage: ZipRcStage, context: StageContext, traces: Sequence[Trace], edges: tuple[int, ...], part: Part
) -> ForecastTrainer:
    """Train the model that the stage was given on the labels of a part."""
    recipe = context.recipe
    tokenizer = load_tokenizer(context.model)
    set_seed(recipe.seed)
    model = _load(context.model.model_copy(update={"dtype": "float32"}))
    grid = claim_slice(model, tokenizer, part.levels, edges)
    steps = stage.steps_for(len(traces))
    checkpointer = context.checkpointer(stage, part=part.name, before=part.before)
    arguments = TrainingArguments(
        output_dir=checkpointer.output_dir,
        max_steps=steps,
        gradient_checkpointing=stage.gradient_checkpointing,
        logging_steps=1,
        save_strategy="no",  # the checkpointer asks for them
        seed=recipe.seed,
        disable_tqdm=True,
        **context.track(part.name),
        remove_unused_columns=False,
        **optimizer_arguments(part.settings.optimizer, dtype=compute_dtype(context.model)),
    )
    reference = None
    if part.kl > 0:
        reference = _load(context.model).requires_grad_(False).eval()
        claim_slice(reference, tokenizer, part.levels, edges)
        reference.to(arguments.device)
    rows = [
        forecast_row(
            trace.prompt_ids,
            trace.completion_ids,
            labels(grid, reward, len(trace.completion_ids)),
        )
        for trace, reward in zip(traces, part.rewards, strict=True)
    ]

    def log(step: int, of: int, values: dict[str, Any]) -> None:
        """A line of metrics; steps are counted over all trainings of the stage."""
        named = {f"{part.name}/{key}" if part.name else key: value for key, value in values.items()}
        context.log_step(part.before + step, stage.trainings * of, named)

    metrics = StepMeans(stage.log_every, log)
    trainer = ForecastTrainer(
        model=model,
        tokenizer=tokenizer,
        arguments=arguments,
        grid=grid,
        rows=rows,
        settings=ForecastSettings(
            batch_size=stage.batch_size,
            micro_batch_tokens=stage.micro_batch_tokens,
            kl=part.kl,
            kl_top=stage.kl_top,
            lite=part.lite,
        ),
        reference=reference,
        seed=recipe.seed,
        callbacks=[metrics],
    )
    checkpointer.train(trainer, metrics)
    return trainer


def _load(config: ModelConfig) -> Any:
    """The model with its adapter, if it has one, merged."""
    model = load_model(config)
    return model.merge_and_unload() if isinstance(model, PeftModel) else model
