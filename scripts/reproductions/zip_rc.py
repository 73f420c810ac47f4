"""ZIP-RC on recipes/tiny/zip_rc.yaml: are its forecasts calibrated, is the policy what it was, what is saved?

Every seed trains a base of its own from nothing, with less width than the tiny reasoner, and then, from it,
the full variant, the lite one, and a head on plain outcomes instead of values. Held-out problems are answered
before and after; forecasts are compared with 64 fresh rollouts of each of a hundred problems. A seed whose
throw-away head cannot tell right from wrong ends the reproduction with a sentence, before the long part. What
adaptive sampling makes of exact forecasts is in `zip_rc_pareto`.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from reproductions import common
from reproductions.common import ROOT, claim, model_of, run, summary
from reproductions.tiny_models import save_blank
from reproductions.zip_rc_pareto import BY_PROBLEM, pareto_arms, pareto_claims

from posttrain.evaluation.metrics import bootstrap_interval
from posttrain.evaluation.samples import GREEDY_ROLE
from posttrain.recipe.schema import ModelConfig
from posttrain.rollout.build import load_model
from posttrain.rollout.tokens import reserved_ids

SEEDS = (0, 1, 2)
PROCESSES = 2
"""Runs at a time; each computes in one thread."""
RECIPE = ROOT / "recipes" / "tiny" / "zip_rc.yaml"
WARM_START, TRAINING = slice(0, 3), slice(3, None)
"""Stages of the recipe: up to the evaluation before, and from there on."""
FAST = (
    # Short exams alone, of which a few dozen steps make completions that end.
    "stages[0].sft.max_steps=1",
    "stages[0].sft.batch_size=4",
    "stages[0].sft.data.size=16",
    "stages[1].sft.max_steps=60",
    "stages[1].sft.batch_size=16",
    "stages[1].sft.data.size=960",
    "data.train.size=24",
    "data.eval.size=6",
    "rollout.max_tokens=40",
)
FAST_TRAINING = (
    "stages[3].zip_rc.correct.threshold=0",
    "stages[3].zip_rc.critic.separation=null",
    "stages[3].zip_rc.max_steps=2",
    "stages[3].zip_rc.batch_size=8",
    "stages[4].evaluate.samples=3",
    "stages[4].evaluate.metrics=[pass@1,greedy,mean_length,pareto]",
    "stages[4].evaluate.pareto.betas=[0.03]",
    "stages[5].evaluate.data.size=4",
    "stages[5].evaluate.samples=8",
)
COSTS = ("tokens_sampled", "seconds")
UNREPORTED = ("pareto", "differences", *COSTS)
"""What is measured by problem, or stands elsewhere in the results."""
TV_MARGIN, ECE_LIMIT, KL_LIMIT = 0.05, 0.05, 0.01
SEPARATION, AUC_LEAST, AUC_GAIN, SKILL_LEAST = 0.3, 0.8, 0.1, 0.2
"""What a predictor that knows nothing, or learns nothing on the way, does not reach."""

Measured = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """What is trained: the options that differ from the recipe's stage."""

    name: str
    options: tuple[str, ...] = ()


FULL = Arm("full")
LITE = Arm("lite", ("variant=lite", "optimizer.learning_rate=1e-2"))
OUTCOME = Arm("full, outcomes", ("label=outcome",))
ARMS = (FULL, LITE, OUTCOME)


@dataclass(frozen=True)
class Job:
    """One run: an arm and its seed; without an arm the seed's warm start."""

    seed: int
    fast: bool
    arm: Arm | None = None
    runs: Path = Path("runs")

    @property
    def name(self) -> str:
        """Of the run's folder."""
        arm = "warm-start" if self.arm is None else self.arm.name.replace(", ", "-")
        return f"reproduce-zip-rc-{arm}{'-fast' if self.fast else ''}-{self.seed}"


def measure(seeds: Sequence[int], fast: bool) -> dict[str, Any]:
    """All arms on all seeds, `PROCESSES` at a time. With `fast` the full variant alone, here."""
    if fast:
        return measure_arms(seeds, (FULL,), True, lambda jobs: [do(job) for job in jobs])
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        return measure_arms(seeds, ARMS, False, lambda jobs: list(pool.map(do, jobs)))


def measure_arms(
    seeds: Sequence[int], arms: Sequence[Arm], fast: bool, do_all: Callable[[Sequence[Job]], list[Measured]]
) -> dict[str, Any]:
    """The warm starts, then the arms, then the claims."""
    do_all([Job(seed, fast, runs=common.RUNS) for seed in seeds])
    jobs = [Job(seed, fast, arm, common.RUNS) for arm in arms for seed in seeds]
    table: dict[str, list[Measured]] = {}
    for job, measured in zip(jobs, do_all(jobs), strict=True):
        assert job.arm is not None
        table.setdefault(job.arm.name, []).append(measured)
    return report(table)


def do(job: Job) -> Measured:
    """Run a job if that has not been done, and measure its model."""
    common.RUNS = job.runs
    job.runs.mkdir(parents=True, exist_ok=True)
    with (job.runs / f"{job.name}.log").open("a") as log, contextlib.redirect_stdout(log):
        torch.set_num_threads(1)
        overrides = [f"seed={job.seed}", *(FAST if job.fast else ())]
        if job.arm is None:
            blank = save_blank(job.runs / f"{job.name}-untrained", job.seed)
            run(RECIPE, job.name, [*overrides, f"model.path={blank}"], WARM_START)
            return {}
        start = job.runs / Job(job.seed, job.fast).name
        overrides += [f"model.path={model_of(start)}", *(FAST_TRAINING if job.fast else ())]
        overrides += [f"stages[3].zip_rc.{option}" for option in job.arm.options]
        return measure_run(start, run(RECIPE, job.name, overrides, TRAINING))


def measure_run(start: Path, folder: Path) -> Measured:
    """What the evaluations before and after a training say, and how far the policy has moved."""
    path = folder / "measured.json"
    if path.is_file():
        kept: Measured = json.loads(path.read_text())
        return kept
    found = summary(folder)
    (before,) = summary(start)["evaluations"]
    evaluations = {evaluation["stage"].partition("-")[2]: evaluation for evaluation in found["evaluations"]}
    after, forecasts = evaluations["after"], evaluations["forecasts"]["forecasts"]
    (labels,) = [stage["zip_rc"] for stage in found["stages"] if stage["kind"] == "zip_rc"]
    measured: Measured = {
        "accuracy_before": before["metrics"]["pass@1"]["value"],
        "accuracy": after["metrics"]["pass@1"]["value"],
        "differences": differences(samples_of(start, before["stage"]), samples_of(folder, after["stage"])),
        "greedy_before": before["metrics"]["greedy"]["value"],
        "greedy": after["metrics"]["greedy"]["value"],
        "length": after["metrics"]["mean_length"]["value"],
        "kl": policy_kl(start, Path(model_of(folder)), before["stage"]),
        "labels": {name: labels.get(name) for name in ("value_if_right", "value_if_wrong")},
        "forecasts": forecasts,
        "tokens_sampled": found["tokens_sampled"],
        "seconds": found["seconds"],
    }
    table = folder / "evaluations" / after["stage"] / "pareto.json"
    measured["pareto"] = json.loads(table.read_text())
    path.write_text(json.dumps(measured, indent=2) + "\n")
    return measured


def samples_of(folder: Path, stage: str) -> list[dict[str, Any]]:
    """Rows of an evaluation's rollouts."""
    return pq.read_table(folder / "rollouts" / stage / "samples.parquet").to_pylist()


def differences(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[float]:
    """Share of right samples after minus before, of every problem; greedy answers do not count."""
    shares = []
    for rows in (before, after):
        problems: dict[str, list[bool]] = {}
        for row in rows:
            if row["role"] != GREEDY_ROLE:
                problems.setdefault(row["example_id"], []).append(bool(row["correct"]))
        shares.append({name: statistics.mean(right) for name, right in problems.items()})
    return [shares[1][name] - share for name, share in shares[0].items()]


def policy_kl(start: Path, model: Path, stage: str, rollouts: int = 256) -> float:
    """KL(policy before || after) per token, over the first so many rollouts of the evaluation before.

    Over the tokens that are not reserved, in one plain forward pass for each rollout.
    """
    rows = samples_of(start, stage)
    before, after = (load_model(ModelConfig(path=str(path))).eval() for path in (model_of(start), model))
    reserved = list(reserved_ids(after.config))
    total, tokens = 0.0, 0
    for row in rows[:rollouts]:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        first = len(row["prompt_ids"]) - 1
        with torch.no_grad():
            logits = [policy(ids).logits[0, first:-1] for policy in (before, after)]
        for tensor in logits:
            tensor[:, reserved] = -1e4  # exactly 0 as a probability
        log_q, log_p = (tensor.log_softmax(-1) for tensor in logits)
        total += float((log_q.exp() * (log_q - log_p)).sum())
        tokens += len(log_q)
    return total / tokens


def mean_over_positions(forecasts: Mapping[str, Any], key: str) -> float:
    """The mean of a measure over positions, by how many rollouts are at each."""
    positions = forecasts["positions"]
    total = sum(position["rollouts"] for position in positions)
    return sum(position["rollouts"] * position[key] for position in positions) / total


def share_of_constant(forecasts: Mapping[str, Any], key: str) -> float:
    """An error over positions as a share of that of the best constant at each; NaN if that has none."""
    constant = mean_over_positions(forecasts, f"{key}_of_constant")
    return mean_over_positions(forecasts, key) / constant if constant else math.nan


def calibration_claims(table: Mapping[str, Sequence[Measured]]) -> list[dict[str, Any]]:
    """Claims about forecasts and policy; those on arms that were not trained are left out."""
    full = table[FULL.name]
    forecasts = [row["forecasts"] for row in full]
    mean = statistics.mean
    apart = [_separation(row["labels"]) for row in full]
    gaps = [found["joint"]["tv"] - found["joint"]["tv_floor"] for found in forecasts]
    divergences = [row["kl"] for row in full]
    claims = [
        claim("values of right answers minus wrong ones", f">= {SEPARATION}", apart,
              min(apart) >= SEPARATION),
        claim("total variation at the start above its sampling floor", f"<= {TV_MARGIN}", gaps,
              mean(gaps) <= TV_MARGIN),
        *reward_claims(forecasts),
        claim("KL of the policy, nats per token", f"<= {KL_LIMIT}", divergences,
              mean(divergences) <= KL_LIMIT),
        unchanged("pass@1 after minus before, full", full),
    ]  # fmt: skip
    shares = [share_of_constant(found, "length_mae") for found in forecasts]
    claims.append(
        claim("error of remaining length, share of the best constant's", "< 1", shares, max(shares) < 1)
    )
    return claims + (lite_claims(full, table[LITE.name]) if LITE.name in table else [])


def reward_claims(forecasts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Claims about the forecast of the reward. A constant is calibrated, too, and knows nothing."""
    errors = [mean_over_positions(found, "ece") for found in forecasts]
    skills = [1 - share_of_constant(found, "brier") for found in forecasts]
    last = [_auc(found["end"]) for found in forecasts]
    gains = [end - _auc(found["positions"][0]) for end, found in zip(last, forecasts, strict=True)]
    knows = min(skills) >= SKILL_LEAST
    calibrated = statistics.mean(errors) <= ECE_LIMIT and knows
    return [
        claim("calibration error of the reward, mean over positions",
              f"<= {ECE_LIMIT}, of forecasts that know more than the base rate", errors, calibrated,
              why=None if knows else "forecasts are hardly better than the base rate"),
        claim("Brier skill of the reward over the base rate, mean over positions", f">= {SKILL_LEAST}",
              skills, knows),
        claim("AUC of the reward at the last position", f">= {AUC_LEAST}", last, min(last) >= AUC_LEAST),
        claim("AUC of the reward, last position minus first", f">= {AUC_GAIN}", gains,
              min(gains) >= AUC_GAIN),
    ]  # fmt: skip


def lite_claims(full: Sequence[Measured], lite: Sequence[Measured]) -> list[dict[str, Any]]:
    """The policy of the lite variant is the same; its forecasts are worse."""
    moved = [row["kl"] for row in lite]
    better = [
        share_of_constant(theirs["forecasts"], "brier") - share_of_constant(ours["forecasts"], "brier")
        for ours, theirs in zip(full, lite, strict=True)
    ]
    return [
        claim("KL of the policy, lite", "0", moved, max(moved) == 0),
        claim("Brier skill of the reward, full minus lite", "> 0", better, min(better) > 0),
    ]


def report(table: Mapping[str, Sequence[Measured]]) -> dict[str, Any]:
    """Arms and claims, those about sampling included."""
    arms: dict[str, Any] = {
        arm: {key: [row[key] for row in rows] for key in rows[0] if key not in UNREPORTED}
        for arm, rows in table.items()
    }
    tables = [row["pareto"] for row in table[FULL.name]]
    arms["sampling"] = pareto_arms(tables)
    costs = {name: {arm: [row[name] for row in rows] for arm, rows in table.items()} for name in COSTS}
    return {
        "budgets": costs["tokens_sampled"],
        "seconds": costs["seconds"],
        "arms": arms,
        "claims": [*calibration_claims(table), *pareto_claims(tables)],
    }


def unchanged(name: str, rows: Sequence[Measured]) -> dict[str, Any]:
    """The claim that accuracy is what it was, within the interval over the problems of all seeds."""
    moved = [np.array(row["differences"]) for row in rows]
    low, high = bootstrap_interval(np.concatenate(moved), 0.95, seed=0)
    means = [float(found.mean()) for found in moved]
    made = claim(name, "interval has 0", means, low <= 0 <= high, interval=(low, high))
    return {**made, "interval_kind": BY_PROBLEM}


def _separation(labels: Mapping[str, float | None]) -> float:
    """NaN where there were not both right and wrong rollouts."""
    right, wrong = labels["value_if_right"], labels["value_if_wrong"]
    return math.nan if right is None or wrong is None else right - wrong


def _auc(quality: Mapping[str, Any]) -> float:
    """NaN where there were not both right and wrong answers."""
    return math.nan if quality["auc"] is None else float(quality["auc"])
