"""Find the problems that a model never solves (fail@N), as rows for later stages.

The outcome of every problem is written down as it is known, so that an interrupted stage goes on with the
problems that are left.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate.utils import gather_object

from posttrain.data.prompts import Prompts, check_lengths
from posttrain.data.sources import dress, load_examples
from posttrain.errors import DataError
from posttrain.recipe.schema import HardSubsetStage
from posttrain.rewards.scorer import Scorer
from posttrain.rewards.shared import SharedEngine
from posttrain.rollout.build import build_engine, load_tokenizer
from posttrain.rollout.engine import RolloutEngine, require_finite
from posttrain.rollout.types import Example, RolloutRequest, Sampling, derive_seed, make_rollouts, with_seed
from posttrain.stages.context import StageContext, StageResult, rows_file
from posttrain.training.ranks import on_first_rank
from posttrain.training.record import replacing, write_json

Asked = tuple[Example, tuple[int, ...]]


@dataclass(frozen=True)
class Outcome:
    """What is known about a problem: completions drawn, right ones, and those without a score."""

    drawn: int
    right: int
    unscored: int
    tokens: int

    @property
    def is_hard(self) -> bool:
        """Never solved. One with unscored completions may have been: a broken reward is no wrong answer."""
        return self.right == 0 and self.unscored == 0


def run(stage: HardSubsetStage, context: StageContext) -> StageResult:
    """Run the stage: sample, score, split, write. The model is handed on as it is.

    Raises:
        DataError: fewer than two problems are hard.
    """
    recipe = context.recipe
    source = context.data(stage.data or recipe.data.train)
    tokenizer = load_tokenizer(context.model)
    prompts = Prompts(tokenizer, source.format)
    # Rows are written as they were: later stages put the same template around them and other questions.
    examples = load_examples(source.model_copy(update={"template": None, "system": None}))
    found = _Outcomes(context.folder("journal"), context.rank)
    known = on_first_rank(found.read)
    left = [example for example in examples if example.id not in known][context.rank :: context.world]
    if known:
        context.say(f"   {len(known)} of {len(examples)} problems are known from before")
    engine = build_engine(recipe.rollout, context.model, tokenizer, seed=recipe.seed)
    try:
        with context.scorer(recipe.rewards_of(stage), SharedEngine(engine, tokenizer)) as scorer:
            room = engine.max_model_len - recipe.rollout.max_tokens
            dressed = [replace(e, prompt=dress(e.prompt, source, f"problem {e.id}")) for e in left]
            asked = [(example, prompts.encode(example)) for example in dressed]
            if asked:
                check_lengths(asked, room, "error")
            for start in range(0, len(asked), stage.problems_at_a_time):
                context.stop.check()
                part = asked[start : start + stage.problems_at_a_time]
                found.add(never_solved(stage, context, part, engine, scorer))
                context.show(start + len(part), len(asked), {"phase": "sampling"})
    finally:
        engine.close()
    for outcomes in gather_object([found.own]):
        known |= outcomes
    hard = [example for example in examples if known[example.id].is_hard]
    if len(hard) < 2:
        raise DataError(
            f"stage {stage.name}: {len(hard)} of {len(examples)} problems were never solved in "
            f"{stage.samples} completions, and two halves need at least 2"
        )
    order = np.random.default_rng(derive_seed("hard_subset", source.seed)).permutation(len(hard))
    cut = min(max(round(len(hard) * stage.train_share), 1), len(hard) - 1)
    halves = {"train": order[:cut], "test": order[cut:]}
    summary = {
        "problems": len(examples),
        "hard": len(hard),
        "undecided": sum(outcome.right == 0 and outcome.unscored > 0 for outcome in known.values()),
        **{split: len(numbers) for split, numbers in halves.items()},
    }
    context.say(f"   {len(hard)} of {len(examples)} problems are never solved in {stage.samples} completions")

    def write() -> None:
        folder = context.folder("data")
        for split, numbers in halves.items():
            rows = [_row(hard[index]) for index in numbers]
            with replacing(folder / rows_file(split)) as file:
                pq.write_table(pa.Table.from_pylist(rows), file)
        write_json(folder / "summary.json", summary)

    on_first_rank(write)
    sampled = sum(outcome.tokens for outcome in known.values())
    return StageResult(context.model, {"hard_subset": summary, "tokens/sampled": sampled})


def rounds(first: int, samples: int) -> Iterator[int]:
    """Sizes of the rounds in which a problem's completions are drawn: doubling, `samples` in all."""
    size = first
    while samples > 0:
        yield min(size, samples)
        samples, size = samples - size, 2 * size


def never_solved(
    stage: HardSubsetStage,
    context: StageContext,
    problems: Sequence[Asked],
    engine: RolloutEngine,
    scorer: Scorer,
) -> dict[str, Outcome]:
    """Outcomes by example id. A problem is out of the next round once a completion is right."""
    recipe = context.recipe
    outcomes = {example.id: Outcome(0, 0, 0, 0) for example, _ in problems}
    name = stage.correct.reward or next(iter(scorer.infos))
    for number, size in enumerate(rounds(stage.first, stage.samples)):
        sampling = Sampling(
            max_tokens=recipe.rollout.max_tokens,
            n=size,
            temperature=recipe.rollout.temperature,
            stop=tuple(recipe.rollout.stop),
        )
        requests = [
            with_seed(
                RolloutRequest(ids, example, example.id, sampling),
                recipe.seed,
                "hard_subset",
                example.id,
                number,
            )
            for example, ids in problems
            if outcomes[example.id].right == 0
        ]
        if not requests:
            break
        answers = engine.generate(requests)
        require_finite(requests, answers)
        batch = make_rollouts(requests, answers, engine.version)
        scorer.score(batch.rollouts)
        for rollout in batch:
            before, value = outcomes[rollout.request.group], rollout.rewards[name]
            outcomes[rollout.request.group] = Outcome(
                before.drawn + 1,
                before.right + (value is not None and value >= stage.correct.threshold),
                before.unscored + (value is None),
                before.tokens + rollout.completion.sampled_tokens,
            )
    return outcomes


class _Outcomes:
    """Outcomes as JSON lines; every process appends to a file of its own."""

    def __init__(self, folder: Path, rank: int):
        self._folder = folder
        self._path = folder / f"problems-{rank}.jsonl"
        self.own: dict[str, Outcome] = {}

    def read(self) -> dict[str, Outcome]:
        """Those of all processes; a last line that a kill cut short is left out."""
        known = {}
        for path in self._folder.glob("problems-*.jsonl"):
            for text in path.read_text().splitlines():
                try:
                    line = json.loads(text)
                    name = line.pop("id")
                    known[name] = Outcome(**line)
                except (ValueError, KeyError, TypeError):
                    continue
        return known

    def add(self, outcomes: dict[str, Outcome]) -> None:
        """Write down outcomes, forced to disk."""
        self.own |= outcomes
        with self._path.open("a") as file:
            for name, outcome in outcomes.items():
                file.write("\n" + json.dumps({"id": name, **vars(outcome)}))
            file.flush()
            os.fsync(file.fileno())


def _row(example: Example) -> dict[str, Any]:
    return {"prompt": example.prompt, "answer": example.answer}
