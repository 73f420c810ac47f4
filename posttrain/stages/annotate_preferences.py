"""How strong preferences are, by the votes of reward models that have not seen them, and what follows."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from transformers import set_seed

from posttrain.data.preferences import NUMBERS, PreferencePair, load_pairs
from posttrain.errors import DataError
from posttrain.recipe.schema import AnnotatePreferencesStage
from posttrain.rollout.build import load_tokenizer
from posttrain.rollout.types import derive_seed
from posttrain.stages.context import ROWS, StageContext, StageResult
from posttrain.stages.reward_model import (
    EncodedPair,
    encode_pairs,
    start_model,
    token_limit,
    train_reward_model,
)
from posttrain.training.load import compute_dtype, load_scalar_model
from posttrain.training.preferences import (
    assign_folds,
    preference_strength,
    ranking_auc,
    suspects,
    treat,
)
from posttrain.training.ranks import on_first_rank
from posttrain.training.record import replacing, write_json

ANNOTATED = ("pref_mean", "pref_std", "votes", "fold", "suspect", *NUMBERS)
"""Columns that the rows get."""


def run(stage: AnnotatePreferencesStage, context: StageContext) -> StageResult:
    """Run the stage: train the members, vote, treat, write. The policy is handed on as it is."""
    source = context.data(stage.data)
    pairs = load_pairs(source)
    _require_plain(pairs)
    start = start_model(stage, context)
    tokenizer = load_tokenizer(start)
    encoded = encode_pairs(pairs, tokenizer, source.format, token_limit(stage, start))
    folds = _folds(pairs, stage, context.recipe.seed)
    votes = _vote(encoded, folds, stage, context, tokenizer)
    mean, deviation = preference_strength(votes)
    suspect = suspects(mean, threshold=stage.threshold, share=stage.share)
    treated = treat(stage.treatment, mean, suspect, stage.alpha)
    summary = {
        "pairs": len(pairs),
        "votes": stage.members,
        "treatment": stage.treatment,
        "suspect": int(suspect.sum()),
        "negative_share": float((mean < 0).mean()),
        "mean": float(mean.mean()),
        "std": float(deviation.mean()),
        **_against_truth(pairs, mean, suspect),
    }
    context.say(f"   {summary['negative_share']:.1%} of {len(pairs)} pairs have a negative mean vote")
    context.say(f"   {summary['suspect']} pairs are suspect (treatment: {stage.treatment})")
    columns = {
        "pref_mean": mean,
        "pref_std": deviation,
        "votes": votes,
        "fold": folds.T,
        "suspect": suspect,
        **asdict(treated),
    }

    def write() -> None:
        folder = context.folder("data")
        _write_rows(folder / ROWS, pairs, columns)
        _write_audit(folder / "audit.jsonl", pairs, mean, deviation, suspect, stage.audit)
        listed = [pair.where for pair, found in zip(pairs, suspect, strict=True) if found]
        write_json(folder / "summary.json", {**summary, "suspects": listed})

    on_first_rank(write)
    return StageResult(context.model, {"preferences": summary})


def _require_plain(pairs: Sequence[PreferencePair]) -> None:
    """Rows must not have numbers of their own: the stage gives them."""
    for pair in pairs:
        for name, default in NUMBERS.items():
            if getattr(pair, name) != default:
                raise DataError(
                    f"{pair.where}: the {name} is {getattr(pair, name):g} already, and "
                    f"annotate_preferences would overwrite it"
                )


def _folds(pairs: Sequence[PreferencePair], stage: AnnotatePreferencesStage, seed: int) -> NDArray[np.int64]:
    """The fold of every pair for every member, shape [K, N]."""
    prompts = [json.dumps(pair.prompt) for pair in pairs]
    try:
        return np.stack([assign_folds(prompts, stage.folds, seed, k) for k in range(stage.members)])
    except ValueError as error:
        raise DataError(f"annotate_preferences: {error}") from error


def _vote(
    encoded: Sequence[EncodedPair],
    folds: NDArray[np.int64],
    stage: AnnotatePreferencesStage,
    context: StageContext,
    tokenizer: Any,
) -> NDArray[np.float64]:
    """The vote of every member on every pair, shape [N, K].

    The votes of a trained model are kept in the run folder: after a stop the next model is trained.
    """
    kept = context.folder("checkpoints")
    votes = np.zeros(folds.shape)
    jobs = [(member, fold) for member in range(stage.members) for fold in range(stage.folds)]
    files = [kept / f"votes-{member:02d}-{fold}.json" for member, fold in jobs]
    finished = on_first_rank(lambda: [path.is_file() for path in files])
    done = finished.index(False) if False in finished else len(files)
    on_first_rank(lambda: context.metrics.cut(context.name, done))
    if done:
        context.say(f"   {done} of {len(jobs)} models have voted before")
    for number, ((member, fold), path) in enumerate(zip(jobs, files, strict=True), start=1):
        unseen = np.flatnonzero(folds[member] == fold)
        if number <= done:
            votes[member, unseen] = on_first_rank(partial(_read, path))
            continue
        gaps = _train_and_vote(encoded, folds[member], fold, stage, context, tokenizer, number)
        votes[member, unseen] = gaps
        on_first_rank(partial(write_json, path, gaps.tolist()))
        if context.rank == 0:
            agreement = {"accuracy": float((gaps > 0).mean()), "gap": float(gaps.mean())}
            context.log_step(number, len(jobs), agreement)
    return votes.T


def _read(path: Path) -> list[float]:
    votes: list[float] = json.loads(path.read_text())
    return votes


def _train_and_vote(
    encoded: Sequence[EncodedPair],
    folds: NDArray[np.int64],
    fold: int,
    stage: AnnotatePreferencesStage,
    context: StageContext,
    tokenizer: Any,
    number: int,
) -> NDArray[np.float64]:
    """r(chosen) - r(rejected) of the pairs of a fold, by a model trained on the others, if there are any."""
    seen = [pair for pair, other in zip(encoded, folds, strict=True) if other != fold or stage.folds == 1]
    unseen = [pair for pair, other in zip(encoded, folds, strict=True) if other == fold]
    seed = derive_seed("member", context.recipe.seed, number) % 2**31
    start = start_model(stage, context)
    set_seed(seed)
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = train_reward_model(
            load_scalar_model(start, stage.lora),
            tokenizer,
            seen,
            stage,
            output_dir=output_dir,
            seed=seed,
            dtype=compute_dtype(start),
        )
    rewards = trainer.rewards(unseen)
    return rewards[:, 0] - rewards[:, 1]


def _against_truth(
    pairs: Sequence[PreferencePair], mean: NDArray[np.float64], suspect: NDArray[np.bool_]
) -> dict[str, float]:
    """Where rows say which labels are wrong (`flipped`): how well the votes find them."""
    wrong = [pair.columns.get("flipped") for pair in pairs]
    if any(value is None for value in wrong):
        return {}
    flipped = np.array(wrong, dtype=bool)
    hits = int((flipped & suspect).sum())
    found = {"flipped": int(flipped.sum()), "auc": ranking_auc(mean, flipped)}
    if suspect.any():
        found["precision"] = hits / int(suspect.sum())
    if flipped.any():
        found["recall"] = hits / int(flipped.sum())
    return found


def _write_rows(path: Path, pairs: Sequence[PreferencePair], annotations: dict[str, Any]) -> None:
    names = dict.fromkeys(name for pair in pairs for name in pair.columns)
    columns: dict[str, Any] = {"prompt": [pair.prompt for pair in pairs]}
    columns |= {name: [pair.columns.get(name) for pair in pairs] for name in names}
    columns |= {name: values.tolist() for name, values in annotations.items()}
    with replacing(path) as file:
        pq.write_table(pa.table(columns), file)


def _write_audit(
    path: Path,
    pairs: Sequence[PreferencePair],
    mean: NDArray[np.float64],
    deviation: NDArray[np.float64],
    suspect: NDArray[np.bool_],
    size: int,
) -> None:
    """Suspect pairs drawn at random, for somebody to read before the treatment is trusted."""
    found = np.flatnonzero(suspect)
    drawn = np.random.default_rng(derive_seed("audit")).permutation(found)[:size]
    with replacing(path) as file:
        for index in sorted(drawn.tolist()):
            pair = pairs[index]
            row = {
                "where": pair.where,
                "prompt": pair.prompt,
                "chosen": pair.chosen,
                "rejected": pair.rejected,
            }
            row |= {"pref_mean": round(mean[index], 4), "pref_std": round(deviation[index], 4)}
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
