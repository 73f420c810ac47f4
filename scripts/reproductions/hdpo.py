"""HDPO on recipes/tiny/hdpo.yaml against accuracy alone and against rewards that include the tool's cost.

Every arm starts from the same cold start of its seed and has the same prompts, completions and updates; HDPO
and accuracy alone are compared at equal sampled tokens, too. The noisy arms are trained with a verifier that
is wrong about 30 % of the completions, and judged with the right one. A coupled reward that fails with the
right verifier is not tried with the noisy one, and variants of HDPO, about which nothing is claimed, have one
seed. An arm passes if, on problems it has not seen, it

    calls on at most 10 % of the easy problems and on at least 90 % of the hard ones,
    is at most 2 points less accurate than accuracy alone with the same verifier,
    repeats a call in at most 2 % of its completions, and
    answers directly where it can: AUROC at least 0.9 against half of 8 forced direct answers being right.
"""

from __future__ import annotations

import contextlib
import itertools
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

from posttrain.data.calculator import FAMILIES
from posttrain.data.sources import load_examples
from posttrain.recipe.hdpo_schema import HdpoConfig
from posttrain.recipe.load import load_recipe
from posttrain.recipe.schema import ModelConfig, Recipe
from posttrain.rollout.build import load_model, load_tokenizer
from posttrain.rollout.tools_engine import prompts_of
from posttrain.rollout.transformers import TransformersEngine
from posttrain.rollout.types import RolloutRequest, Sampling, derive_seed

SEEDS = (0, 1, 2)
PROCESSES = 2
"""Runs at a time; each computes in one thread."""
RECIPE = ROOT / "recipes" / "tiny" / "hdpo.yaml"
COLD_START, TRAINING, EVALUATION = slice(0, 3), slice(3, 5), slice(4, 5)
"""Stages of the recipe: up to the evaluation before, from there on, and the evaluation after alone."""
DIRECT_ANSWERS = 8
FAST = (
    "stages[0].sft.max_steps=2",
    "stages[1].sft.max_steps=2",
    "stages[3].policy.steps=1",
    "stages[3].policy.prompts_per_step=4",
    "stages[3].policy.group_size=4",
    "stages[2].evaluate.samples=1",
    "stages[4].evaluate.samples=1",
    "reward_options.workers=1",
    "stages[0].sft.data.size=128",
    "stages[1].sft.data.size=128",
    "data.train.size=64",
    "data.eval.size=16",
)

Measured = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """What is trained. `rewards` are added to accuracy with their weights; `method` are HDPO's options."""

    name: str
    rewards: Mapping[str, float] | None = None
    method: Mapping[str, Any] | None = None

    def overrides(self, noisy: bool) -> list[str]:
        """What this arm has different from the recipe."""
        verifier = "noisy_match" if noisy else "exact_match"
        listed: list[Any] = ["exact_match"]
        if noisy:
            listed = [
                {"name": verifier, "from": str(ROOT / "recipes" / "tiny" / "noisy_verifier.py")},
                {"name": "exact_match", "weight": 0.0},
            ]
        for name, weight in (self.rewards or {}).items():
            extra = {"name": name, "from": "posttrain.rewards.tool_use", "weight": weight}
            listed.append(extra | ({"only_if": f"{verifier} >= 1"} if name == "tool_economy" else {}))
        methods = [{"hdpo": {"compare_gradients": 5, **self.method}}] if self.method else []
        return [
            f"rewards={json.dumps(listed)}",
            f"stages[3].policy.methods={json.dumps(methods)}",
            "stages[4].evaluate.correct.reward=exact_match",
        ]


GRPO = Arm("grpo")
HDPO = Arm("hdpo 0.15", method={"weight": 0.15})
COMPARED = (GRPO, HDPO)
"""Arms that save models on the way."""
COUPLED = (
    *(Arm(f"coupled {weight:g}", {"tool_economy": weight}) for weight in (0.02, 0.15, 2.0)),
    Arm("penalty 0.5", {"tool_calls": -0.5}),
)
VARIANTS = (
    Arm("unconditional 0.15", method={"weight": 0.15, "conditional": False}),
    Arm("hdpo qualifying 0.15", method={"weight": 0.15, "normalizer": "qualifying"}),
    Arm("hdpo advantage 0.15", method={"weight": 0.15, "combine": "advantage"}),
)


@dataclass(frozen=True)
class Job:
    """One run: an arm, its verifier and its seed; without an arm the cold start.

    With `saved` a model is measured that the arm saved on the way.
    """

    seed: int
    fast: bool
    arm: Arm | None = None
    noisy: bool = False
    runs: Path = Path("runs")
    saved: Saved | None = None

    @property
    def name(self) -> str:
        """Of the run's folder."""
        arm = "cold-start" if self.arm is None else self.arm.name.replace(" ", "-")
        kind = ("-noisy" if self.noisy else "") + ("-fast" if self.fast else "")
        place = f"-{self.saved.model.name}" if self.saved else ""
        return f"reproduce-hdpo-{arm}{kind}-{self.seed}{place}"


def measure(seeds: Sequence[int], fast: bool) -> dict[str, Any]:
    """All arms on all seeds, `PROCESSES` at a time. With `fast` three arms, here."""
    if fast:
        return measure_arms(seeds, True, lambda jobs: [do(job) for job in jobs])
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
        return measure_arms(seeds, False, lambda jobs: list(pool.map(do, jobs)))


def measure_arms(
    seeds: Sequence[int], fast: bool, do_all: Callable[[Sequence[Job]], list[Measured]]
) -> dict[str, Any]:
    """One round after another: cold starts, arms, the coupled rewards that are left, equal tokens."""
    table: dict[tuple[str, bool], list[Measured]] = {}

    def fill(arms: Sequence[tuple[Arm, bool]], seeds: Sequence[int]) -> None:
        jobs = [Job(seed, fast, arm, noisy, common.RUNS) for arm, noisy in arms for seed in seeds]
        for job, measured in zip(jobs, do_all(jobs), strict=True):
            assert job.arm is not None
            table.setdefault((job.arm.name, job.noisy), []).append(measured)

    before = do_all([Job(seed, fast, runs=common.RUNS) for seed in seeds])
    coupled = COUPLED[:0] if fast else COUPLED
    both = (False,) if fast else (False, True)
    fill([(arm, noisy) for noisy in both for arm in COMPARED] + [(arm, False) for arm in coupled], seeds)
    grpo = table[GRPO.name, False]
    left = [arm for arm in coupled if all(criteria(table[arm.name, False], grpo).values())]
    fill([(arm, True) for arm in (COUPLED[:1] if fast else left)], seeds)
    fill([(arm, False) for arm in (() if fast else VARIANTS)], seeds[:1])
    even: list[Job] = []
    for noisy, seed in itertools.product(both, seeds):
        pair = [Job(seed, fast, arm, noisy, common.RUNS) for arm in COMPARED]
        found = at_equal_tokens([job.runs / job.name for job in pair])
        even += [replace(job, saved=saved) for job, saved in zip(pair, found, strict=True)]
    for job, measured in zip(even, do_all(even), strict=True):
        assert job.arm is not None
        own = {key: value for key, value in measured.items() if key != "log"}
        table.setdefault((f"{job.arm.name}, equal tokens", job.noisy), []).append(own)
    return report(before, table)


def do(job: Job) -> Measured:
    """Run a job if that has not been done, and measure its model."""
    common.RUNS = job.runs
    job.runs.mkdir(parents=True, exist_ok=True)
    log = (job.runs / f"{job.name}.log").open("a")
    with log, contextlib.redirect_stdout(log):
        torch.set_num_threads(1)
        overrides = [f"seed={job.seed}", *(FAST if job.fast else ())]
        if job.arm is None:
            folder = run(RECIPE, job.name, overrides, COLD_START)
            return measure_run(folder, "03-before")
        overrides += job.arm.overrides(job.noisy)
        if job.saved is not None and job.saved.is_last:
            return measure_run(job.runs / replace(job, saved=None).name, "02-after")
        if job.saved is not None:
            folder = run(RECIPE, job.name, [*overrides, f"model.path={job.saved.model}"], EVALUATION)
            measured = measure_run(folder, "01-after")
            return measured | {"tokens_sampled": measured["tokens_sampled"] + job.saved.tokens}
        if job.arm in COMPARED:
            overrides += [f"stages[3].policy.{key}" for key in ("save_steps=5", "keep_checkpoints=20")]
        start = Job(job.seed, job.fast, runs=job.runs)
        overrides += [f"model.path={model_of(job.runs / start.name)}"]
        return measure_run(run(RECIPE, job.name, overrides, TRAINING), "02-after")


def measure_run(folder: Path, stage: str) -> Measured:
    """What the evaluation `stage` of a run says about the use of tools."""
    path = folder / "measured.json"
    if path.is_file():
        kept: Measured = json.loads(path.read_text())
        return kept
    rows = pq.read_table(folder / "rollouts" / stage / "samples.parquet").to_pylist()
    for row in rows:
        row["calls"] = json.loads(row["tool_calls"])
        row["family"] = family_of(row["prompt"])
    found = summary(folder)
    recipe = load_recipe(folder / "recipe.yaml").recipe
    solvable = direct_solvability(recipe, model_of(folder))
    problems = sorted({row["example_id"] for row in rows})
    direct = {p: share(not row["calls"] for row in rows if row["example_id"] == p) for p in problems}
    measured: Measured = {
        "accuracy": share(row["correct"] for row in rows),
        "redundant": share(is_redundant(row["calls"]) for row in rows),
        "calls": statistics.mean(len(row["calls"]) for row in rows),
        "auroc": auroc([direct[p] for p in problems], [solvable[p] >= 0.5 for p in problems]),
        "tokens_sampled": found["tokens_sampled"],
        "seconds": found["seconds"],
        "log": logged(folder),
    }
    for family in FAMILIES:
        own = [row for row in rows if row["family"] == family]
        measured[f"use/{family}"] = share(bool(row["calls"]) for row in own)
        measured[f"accuracy/{family}"] = share(row["correct"] for row in own)
        ids = {row["example_id"] for row in own}
        measured[f"direct/{family}"] = statistics.mean(solvable[p] for p in ids) if ids else float("nan")
    path.write_text(json.dumps(measured, indent=2) + "\n")
    return measured


def logged(folder: Path) -> dict[str, list[float]]:
    """What HDPO logs of its channels: means over each quarter of the training."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "tokens/sampled" in line]
    quarters = [steps[len(steps) * i // 4 : len(steps) * (i + 1) // 4] for i in range(4)]
    names = {key for line in steps for key in line if key.startswith("hdpo/")}
    means = {
        name: [[line[name] for line in quarter if name in line] for quarter in quarters] for name in names
    }
    return {
        name: [statistics.mean(values) for values in found if values] for name, found in sorted(means.items())
    }


def family_of(prompt: str) -> str:
    """The family of a problem, from its rendered prompt."""
    if "*" in prompt:
        return "hard"
    digits = sum(character.isdigit() for character in prompt)
    return "easy" if digits == 2 else "medium"


def is_redundant(calls: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a completion makes the same call twice."""
    written = [call["arguments"] for call in calls]
    return len(set(written)) < len(written)


def direct_solvability(recipe: Recipe, model_path: str) -> dict[str, float]:
    """Share of right answers of each held-out problem where the model is made to answer at once."""
    assert recipe.data.eval is not None
    config = ModelConfig(path=model_path)
    tokenizer = load_tokenizer(config)
    prompts = prompts_of(recipe.tools, tokenizer, recipe.data.eval.format)
    begun = tuple(tokenizer("<answer>", add_special_tokens=False)["input_ids"])
    requests = [
        RolloutRequest(
            prompts.encode(example) + begun,
            example,
            example.id,
            Sampling(12, n=DIRECT_ANSWERS, seed=derive_seed("direct", example.id)),
        )
        for example in load_examples(recipe.data.eval)
    ]
    engine = TransformersEngine(load_model(config), tokenizer, batch_size=512)
    answers = engine.generate(requests)
    return {
        asked.example.id: share(c.text.partition("</answer>")[0] == asked.example.answer for c in row)
        for asked, row in zip(requests, answers, strict=True)
    }


def auroc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Chance that a positive scores higher than a negative, ties counted half; NaN with one kind only."""
    positive = np.array([s for s, label in zip(scores, labels, strict=True) if label])
    negative = np.array([s for s, label in zip(scores, labels, strict=True) if not label])
    if not len(positive) or not len(negative):
        return float("nan")
    difference = positive[:, None] - negative[None, :]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def share(outcomes: Any) -> float:
    """Share that is true; NaN of nothing."""
    listed = [bool(outcome) for outcome in outcomes]
    return sum(listed) / len(listed) if listed else float("nan")


def criteria(arm: Sequence[Measured], grpo: Sequence[Measured]) -> dict[str, bool]:
    """Which of the five criteria an arm meets, on the mean over seeds."""

    def mean(key: str, rows: Sequence[Measured] = arm) -> float:
        return statistics.mean(row[key] for row in rows)

    return {
        "easy": mean("use/easy") <= 0.10,
        "hard": mean("use/hard") >= 0.90,
        "accuracy": mean("accuracy") >= mean("accuracy", grpo) - 0.02,
        "redundant": mean("redundant") <= 0.02,
        "auroc": mean("auroc") >= 0.9,
    }


def report(
    before: Sequence[Measured], table: Mapping[tuple[str, bool], Sequence[Measured]]
) -> dict[str, Any]:
    """Arms, verdicts and claims."""
    clean, grpo = table[HDPO.name, False], table[GRPO.name, False]
    verdicts = {key: criteria(rows, table.get((GRPO.name, key[1]), grpo)) for key, rows in table.items()}
    passes = {key: all(met.values()) for key, met in verdicts.items()}
    rivals = {name: [passes[key] for key in passes if key[0] == name] for name, _ in table}
    survivors = [arm.name for arm in COUPLED if arm.name in rivals and all(rivals[arm.name])]

    def of(key: str, rows: Sequence[Measured]) -> list[float]:
        return [row[key] for row in rows]

    easy, kept, hard = of("use/easy", clean), of("use/easy", grpo), of("use/hard", clean)
    gaps = [a - b for a, b in zip(of("accuracy", clean), of("accuracy", grpo), strict=True)]
    interval = paired_interval(of("accuracy", clean), of("accuracy", grpo))
    even = [of("accuracy", table[f"{arm.name}, equal tokens", False]) for arm in (HDPO, GRPO)]
    level = [a - b for a, b in zip(*even, strict=True)]
    redundant, ranking = of("redundant", clean), of("auroc", clean)
    listed = {"cold start": list(before)}
    listed |= {name + (" (noisy)" if noisy else ""): list(rows) for (name, noisy), rows in table.items()}
    return {
        "budgets": {name: of("tokens_sampled", rows) for name, rows in listed.items()},
        "seconds": {name: of("seconds", rows) for name, rows in listed.items()},
        "arms": {name: {key: of(key, rows) for key in rows[0]} for name, rows in listed.items()},
        "criteria": {name + (" (noisy)" if noisy else ""): met for (name, noisy), met in verdicts.items()},
        "options": HdpoConfig().model_dump(),
        "claims": [
            claim("hdpo calls on easy problems", "<= 0.10", easy, statistics.mean(easy) <= 0.10),
            claim("accuracy alone calls on easy problems", ">= 0.80", kept, statistics.mean(kept) >= 0.80),
            claim("hdpo calls on hard problems", ">= 0.90", hard, statistics.mean(hard) >= 0.90),
            claim(
                "accuracy of hdpo minus that of accuracy alone",
                ">= -0.02",
                gaps,
                statistics.mean(gaps) >= -0.02,
                interval=interval,
            ),
            claim(
                "accuracy of hdpo minus that of accuracy alone, equal sampled tokens",
                ">= -0.02",
                level,
                statistics.mean(level) >= -0.02,
                interval=paired_interval(*even),
            ),
            claim("hdpo repeats a call", "<= 0.02", redundant, statistics.mean(redundant) <= 0.02),
            claim("AUROC of answering directly", ">= 0.90", ranking, statistics.mean(ranking) >= 0.90),
            claim(
                "hdpo 0.15 passes with both verifiers",
                "2 of 2",
                [sum(rivals[HDPO.name])],
                sum(rivals[HDPO.name]) == 2,
            ),
            claim(
                "weights of coupled rewards that pass with both verifiers",
                "0",
                [len(survivors)],
                not survivors,
                why=f"these pass with both: {', '.join(survivors)}",
            ),
        ],
    }
