"""MRT on recipes/tiny/mrt.yaml against the outcome alone, length penalties and STaR.

Every arm starts from the same cold start and has the same prompts, completions and updates; MRT-online and
the outcome alone are compared at equal sampled tokens, probes included, too. Held-out problems
are searched four times each; every search is cut after each of its episodes, where eight answers are forced.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from reproductions import common
from reproductions.common import ROOT, Saved, at_equal_tokens, claim, model_of, paired_interval, run, summary

from posttrain.data.search import chance_of_success, waste_of
from posttrain.data.sources import load_examples
from posttrain.recipe.load import load_recipe
from posttrain.recipe.mrt_schema import ProbeConfig
from posttrain.recipe.schema import ModelConfig
from posttrain.rewards.scorer import Scorer
from posttrain.rollout.build import load_model, load_tokenizer
from posttrain.rollout.probes import MetaProver, success
from posttrain.rollout.transformers import TransformersEngine
from posttrain.rollout.types import RolloutRequest, Sampling, derive_seed, make_rollouts

SEEDS = (0, 1, 2)
PROCESSES = 2
"""Runs at a time; each computes in one thread."""
RECIPE = ROOT / "recipes" / "tiny" / "mrt.yaml"
STAR_RECIPE = ROOT / "recipes" / "tiny" / "mrt-star.yaml"
COLD_START, TRAINING, EVALUATION, STAR = slice(0, 3), slice(3, 5), slice(4, 5), slice(2, 5)
"""Stages of the recipes: up to the evaluation before, from there on, and the evaluation after alone."""
BUDGETS = (16, 32, 64, 96, 150)
SHOWN = (32, 64)
"""Budgets at which the regret has to be lower."""
FAST = (
    "stages[0].sft.max_steps=1",
    "stages[1].sft.max_steps=1",
    "stages[0].sft.data.size=128",
    "stages[1].sft.data.size=64",
    "data.train.size=16",
    "data.eval.size=4",
    "rollout.max_tokens=24",
)
FAST_TRAINING = (
    "stages[3].policy.steps=1",
    "stages[3].policy.prompts_per_step=2",
    "stages[3].policy.group_size=4",
)

Measured = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """What is trained: a mode of MRT with its options, a length penalty, or a selection of own traces."""

    name: str
    mode: str | None = None
    penalty: float = 0.0
    selection: str | None = None

    def overrides(self, tokens: int) -> list[str]:
        """What this arm has different from its recipe; `tokens` is the cap on a completion."""
        if self.selection is not None:
            return [f"stages[2].star.selection={self.selection}"]
        if self.mode is not None:
            return [f"stages[3].policy.methods[0].mrt.mode={self.mode}"]
        penalty = {
            "name": "length_penalty",
            "weight": self.penalty,
            "args": {"max_tokens": tokens, "buffer": tokens},
        }
        rewards = ["exact_match", *([penalty] if self.penalty else [])]
        return [
            "stages[3].policy.methods=[]",
            f"stages[3].policy.rewards={json.dumps(rewards)}",
        ]


GRPO = Arm("grpo")
ONLINE = Arm("mrt online", mode="online")
EXPLICIT = Arm("mrt explicit", mode="explicit")
PENALTIES = (Arm("length penalty 0.05", penalty=0.05), Arm("length penalty 0.3", penalty=0.3))
BASELINES = (
    Arm("mrt implicit group", mode="implicit_group"),
    Arm("mrt termination baseline", mode="termination_baseline"),
)
STARS = (Arm("star", selection="correct"), Arm("mrt-star", selection="best_prefix"))
COMPARED = (GRPO, ONLINE)
"""Arms that save models on the way."""
ARMS = (GRPO, *PENALTIES, ONLINE, EXPLICIT, *BASELINES, *STARS)


@dataclass(frozen=True)
class Job:
    """One run: an arm and its seed; without an arm the cold start, which all share.

    With `saved` a model is measured that the arm saved on the way.
    """

    seed: int
    fast: bool
    arm: Arm | None = None
    runs: Path = Path("runs")
    saved: Saved | None = None

    @property
    def name(self) -> str:
        """Of the run's folder."""
        arm = "cold-start" if self.arm is None else self.arm.name.replace(" ", "-")
        place = f"-{self.saved.model.name}" if self.saved else ""
        return f"reproduce-mrt-{arm}{'-fast' if self.fast else ''}-{self.seed}{place}"


def measure(seeds: Sequence[int], fast: bool) -> dict[str, Any]:
    """All arms on all seeds, `PROCESSES` at a time. With `fast` three arms, here."""
    if fast:
        return measure_arms(seeds, True, lambda jobs: [do(job) for job in jobs])
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        return measure_arms(seeds, False, lambda jobs: list(pool.map(do, jobs)))


def measure_arms(
    seeds: Sequence[int], fast: bool, do_all: Callable[[Sequence[Job]], list[Measured]]
) -> dict[str, Any]:
    """The cold start, then the arms, then equal tokens."""
    table = {"cold start": do_all([Job(0, fast, runs=common.RUNS)])}
    arms = (GRPO, ONLINE, STARS[0]) if fast else ARMS
    jobs = [Job(seed, fast, arm, common.RUNS) for seed in seeds for arm in arms]
    even: list[Job] = []
    for job, measured in zip(jobs, do_all(jobs), strict=True):
        assert job.arm is not None
        table.setdefault(job.arm.name, []).append(measured)
    for seed in seeds:
        pair = [Job(seed, fast, arm, common.RUNS) for arm in COMPARED]
        found = at_equal_tokens([job.runs / job.name for job in pair])
        even += [replace(job, saved=saved) for job, saved in zip(pair, found, strict=True)]
    for job, measured in zip(even, do_all(even), strict=True):
        table.setdefault(even_name(job.arm), []).append(
            {key: value for key, value in measured.items() if not key.startswith("mrt/")}
        )
    return report(table)


def even_name(arm: Arm | None) -> str:
    """Of an arm at equal sampled tokens."""
    assert arm is not None
    return f"{arm.name}, equal tokens"


def do(job: Job) -> Measured:
    """Run a job if that has not been done, and measure its model."""
    common.RUNS = job.runs
    job.runs.mkdir(parents=True, exist_ok=True)
    with (job.runs / f"{job.name}.log").open("a") as log, contextlib.redirect_stdout(log):
        torch.set_num_threads(1)
        overrides = [f"seed={job.seed}", *(FAST if job.fast else ())]
        if job.arm is None:
            return measure_run(run(RECIPE, job.name, overrides, COLD_START), probes=True)
        recipe, stages = (RECIPE, TRAINING) if job.arm.selection is None else (STAR_RECIPE, STAR)
        if job.fast and job.arm.selection is None:
            overrides += FAST_TRAINING
        if job.fast and job.arm.selection is not None:
            overrides += ["stages[2].star.threshold=0"]  # the model of a fast cold start is never right
        start = Job(0, job.fast, runs=job.runs)
        tokens = load_recipe(recipe, overrides).recipe.rollout.max_tokens
        overrides += job.arm.overrides(tokens)
        if job.saved is not None and job.saved.is_last:
            return measure_run(job.runs / replace(job, saved=None).name, probes=False)
        if job.saved is not None:
            folder = run(recipe, job.name, [*overrides, f"model.path={job.saved.model}"], EVALUATION)
            measured = measure_run(folder, probes=False)
            return measured | {"tokens_sampled": measured["tokens_sampled"] + job.saved.tokens}
        if job.arm in COMPARED:
            overrides += [f"stages[3].policy.{key}" for key in ("save_steps=5", "keep_checkpoints=20")]
        overrides += [f"model.path={model_of(job.runs / start.name)}"]
        return measure_run(run(recipe, job.name, overrides, stages), probes=False)


def measure_run(folder: Path, probes: bool) -> Measured:
    """What the last evaluation of a run says, and what its training logged about probes.

    With `probes`, also how forced answers agree with the known chance of success.
    """
    path = folder / "measured.json"
    if path.is_file():
        kept: Measured = json.loads(path.read_text())
        return kept
    found = summary(folder)
    evaluation = found["evaluations"][-1]
    rows = pq.read_table(folder / "rollouts" / evaluation["stage"] / "samples.parquet").to_pylist()
    waste = [waste_of(row["completion"]) for row in rows]
    episodes = max(sum(one.episodes for one in waste), 1)
    values = {name: entry["value"] for name, entry in evaluation["metrics"].items()}
    measured: Measured = {
        "accuracy": values["pass@1"],
        "length": values["mean_length"],
        **{f"regret@{budget}": values[f"regret@{budget}"] for budget in BUDGETS},
        **{name: value for name, value in values.items() if name.startswith("continued@")},
        "episodes": statistics.mean(one.episodes for one in waste),
        "repeated": sum(one.repeated for one in waste) / episodes,
        "fillers": sum(one.fillers for one in waste) / episodes,
        "curve": {key: evaluation["thinking"][key] for key in ("tokens", "accuracy")},
        "tokens_sampled": found["tokens_sampled"],
        "seconds": found["seconds"],
        **logged(folder),
    }
    if probes:
        measured["agreement"] = agreement(folder)
    path.write_text(json.dumps(measured, indent=2) + "\n")
    return measured


def logged(folder: Path) -> Measured:
    """Means over the training of what MRT logs, the greatest telescoping error among them."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = {key for line in lines for key in line if key.startswith("mrt/")}
    values = {name: [line[name] for line in lines if name in line] for name in names}
    return {
        name: max(found) if name == "mrt/telescoping_error" else statistics.mean(found)
        for name, found in sorted(values.items())
    }


def agreement(folder: Path) -> float:
    """Correlation of forced answers with the chance of success that a beginning has in closed form.

    NaN where either does not vary, as with a model that has not learnt the task.
    """
    recipe = load_recipe(folder / "recipe.yaml").recipe
    assert recipe.data.eval is not None
    config = ModelConfig(path=model_of(folder))
    tokenizer = load_tokenizer(config)
    engine = TransformersEngine(load_model(config), tokenizer, batch_size=512)
    requests = [
        RolloutRequest(
            tuple(tokenizer(str(example.prompt))["input_ids"]),
            example,
            example.id,
            Sampling(recipe.rollout.max_tokens, seed=derive_seed("agreement", example.id)),
        )
        for example in load_examples(recipe.data.eval)
    ]
    batch = make_rollouts(requests, engine.generate(requests), engine.version)
    thinking: ProbeConfig = recipe.stages[-1].config.thinking.probes
    with Scorer(recipe.rewards, recipe.reward_options) as scorer:
        prover = MetaProver(engine, tokenizer, scorer.score, thinking)
        points = [point for points in prover.ask_everywhere(batch.rollouts) for point in points]
    forced = [(cut, answers) for cut, answers in points if cut.forced and answers]
    estimates = [success(answers) for _, answers in forced]
    kept = prover.decode([list(cut.rollout.completion.token_ids[: cut.at]) for cut, _ in forced])
    chances = [
        chance_of_success(str(cut.rollout.request.example.prompt), text)
        for (cut, _), text in zip(forced, kept, strict=True)
    ]
    if len(set(estimates)) < 2 or len(set(chances)) < 2:
        return float("nan")
    return float(np.corrcoef(estimates, chances)[0, 1])


def tokens_needed(curve: Mapping[str, Sequence[float]], accuracy: float) -> float:
    """Tokens at which an accuracy curve first comes to an accuracy; infinite if it never does."""
    places, heights = [0.0, *curve["tokens"]], [0.0, *curve["accuracy"]]
    for index in range(1, len(places)):
        low, high = heights[index - 1], heights[index]
        if high >= accuracy:
            share = 1.0 if high == low else (accuracy - low) / (high - low)
            return places[index - 1] + share * (places[index] - places[index - 1])
    return float("inf")


def report(table: Mapping[str, Sequence[Measured]]) -> dict[str, Any]:
    """Arms and claims; claims on arms that were not trained are left out.

    MRT-online and the outcome alone are compared at equal sampled tokens.
    """

    def of(arm: str, key: str) -> list[float]:
        return [row[key] for row in table[arm]]

    def wasted(arm: str) -> list[float]:
        return [row["repeated"] + row["fillers"] for row in table[arm]]

    grpo, online = (even_name(arm) for arm in COMPARED)
    ratios = [a / max(b, 1e-9) for a, b in zip(wasted(online), wasted(grpo), strict=True)]
    claims = [claim("repeated and filler episodes, online / grpo", "<= 0.5", ratios, max(ratios) <= 0.5)]
    for budget in SHOWN:
        key = f"regret@{budget}"
        pairs = list(zip(of(online, key), of(grpo, key), strict=True))
        gains = [1 - ours / theirs for ours, theirs in pairs]
        interval = paired_interval([1 - ours / theirs for ours, theirs in pairs], [0.0] * len(pairs))
        holds = statistics.mean(gains) >= 0.10 and interval[0] > 0
        name = f"regret up to {budget} tokens, online below grpo by a share of"
        claims.append(claim(name, ">= 0.10, interval above 0", gains, holds, interval=interval))
    gaps = [a - b for a, b in zip(of(online, "accuracy"), of(grpo, "accuracy"), strict=True)]
    claims.append(
        claim("accuracy, online minus grpo", "within 0.01", gaps, abs(statistics.mean(gaps)) <= 0.01)
    )
    goals = [max(row["curve"]["accuracy"][-1] - 0.01, 0.001) for row in table[grpo]]
    speed = [
        tokens_needed(theirs["curve"], goal) / tokens_needed(ours["curve"], goal)
        for ours, theirs, goal in zip(table[online], table[grpo], goals, strict=True)
    ]
    claims.append(
        claim("tokens for grpo's final accuracy, grpo / online", ">= 1.5", speed, min(speed) >= 1.5)
    )
    longer = zip(of(ONLINE.name, "continued@+100%"), of(ONLINE.name, "continued@+0%"), strict=True)
    kept = [after - before for after, before in longer]
    name = "accuracy, online, made to think on by all of its budget, minus where it ended"
    claims.append(claim(name, ">= -0.01", kept, statistics.mean(kept) >= -0.01))
    extra = of(ONLINE.name, "mrt/probe_share")
    claims.append(claim("tokens of probes / of traces, online", "<= 0.35", extra, max(extra) <= 0.35))
    errors = of(ONLINE.name, "mrt/telescoping_error")
    claims.append(claim("greatest telescoping error", "<= 1e-6", errors, max(errors) <= 1e-6))
    for arm in (arm.name for arm in BASELINES if arm.name in table):
        gains = [1 - a / b for a, b in zip(of(arm, "regret@64"), of(GRPO.name, "regret@64"), strict=True)]
        name = f"regret up to 64 tokens, {arm} below grpo by a share of"
        claims.append(
            claim(name, "< 0.10: it only subtracts a baseline", gains, statistics.mean(gains) < 0.1)
        )
    star, mrt_star = (arm.name for arm in STARS)
    if star in table and mrt_star in table:
        gains = [a - b for a, b in zip(of(star, "regret@64"), of(mrt_star, "regret@64"), strict=True)]
        name = "regret up to 64 tokens, star minus mrt-star, equally many demonstrations"
        claims.append(claim(name, "> 0", gains, min(gains) > 0))
    checked = of("cold start", "agreement")
    claims.append(
        claim("correlation of forced answers with the known chance", ">= 0.9", checked, min(checked) >= 0.9)
    )
    return {
        "budgets": {arm: of(arm, "tokens_sampled") for arm in table},
        "seconds": {arm: of(arm, "seconds") for arm in table},
        "arms": {
            arm: {key: of(arm, key) for key in rows[0] if key not in ("tokens_sampled", "seconds")}
            for arm, rows in table.items()
        },
        "claims": claims,
    }
