"""MASA against GRPO on column addition, from a base model that this script trains.

Problems are sums of two numbers with 1, 3, 4, 6 or 7 digits. The base solves one digit always, three and four
now and then, and has never seen more, so that about half of the problems teach nothing. Its self-predictions
have the right form and random content. All arms start from it and have the same prompts and the same number
of updates; checkpoints are measured on problems no arm has trained on.

    grpo          solutions alone; asked the meta question at the checkpoints, never trained on it
    masa          self-predictions beside the solutions
    shuffled      the same, judged by another problem's solutions: nothing to learn about single problems
    gated         from step 80 problems are gated, with the guard rails
    gated, cut    the same with the cap on lengths, once it is ready
    paper         from step 80 gated and capped by the papers' rule, without guard rails
    oracle        from step 80 gated by the true pass rate, measured with solutions that are not counted

The arms from `gated` on are `masa` until step 80, sample by sample.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import statistics
import string
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reproductions import common
from reproductions.common import ROOT, claim, paired_interval, run
from reproductions.tiny_models import blank_model, character_tokenizer
from transformers import Qwen2Tokenizer

from posttrain.data.self_predictions import Prediction, write_prediction
from posttrain.evaluation.self_predictions import questions, self_assessment
from posttrain.methods.base import StepContext
from posttrain.methods.masa import Masa
from posttrain.recipe.meta_schema import MetaEvaluation, MetaFormat
from posttrain.recipe.schema import ModelConfig, OptimizerConfig, SftStage
from posttrain.rollout.build import load_model, load_tokenizer
from posttrain.rollout.transformers import TransformersEngine
from posttrain.rollout.types import (
    Example,
    Rollout,
    RolloutBatch,
    RolloutRequest,
    Sampling,
    derive_seed,
    make_rollouts,
)
from posttrain.stages.sft import finetune
from posttrain.training.self_alignment import Forecast, Solutions

SEEDS = (1, 2, 3)
"""Settings were chosen on seed 0."""
PROCESSES = 2
"""Runs at a time; each computes in one thread."""
RECIPE = Path(__file__).with_suffix(".yaml")
HERE = Path(__file__).relative_to(ROOT)
START = 80
STEPS = 160
DIGITS = (1, 1, 1, 3, 3, 4, 4, 4, 6, 6, 7, 7)
"""Digits of a step's problems on average."""
BASE_STEPS = 2600
HELD_OUT, ELSEWHERE = 60, 40
"""Problems of the evaluations: with the digits of the training, and with two and five digits."""
SAMPLES = 16
NOTIONS = ("carry", "column", "guess", "direct", "modulus", "parity")
QUESTION = MetaFormat(system=None, template="assess {problem}", min_length=4)
JSON_PIECES = ('{"math_notion": ["', '", "', '"], "pass_rate": ', ', "solution_length": ')
ANSWER, CHECK = "####", "check;"
FAST = (
    "stages[0].policy.steps=2",
    "stages[0].policy.prompts_per_step=4",
    "stages[0].policy.save_steps=1",
    "rollout.max_tokens=12",
)

Measured = dict[str, Any]


# --- the world -------------------------------------------------------------------------------------------


def draw_problem(digits: int, rng: np.random.Generator) -> tuple[int, int]:
    """Two numbers with so many digits."""
    low = 0 if digits == 1 else 10 ** (digits - 1)
    a, b = rng.integers(low, 10**digits, 2)
    return int(a), int(b)


def careful(a: int, b: int, rng: np.random.Generator) -> str:
    """Column by column with the carry written down, now and then checked, which makes lengths differ."""
    text, carry = "columncarry", 0
    for column in range(len(str(max(a, b)))):
        left, right = a // 10**column % 10, b // 10**column % 10
        total = left + right + carry
        text += f"{left}+{right}+{carry}={total};" + (CHECK if rng.random() < 0.35 else "")
        carry = total // 10
    return f"{text}{ANSWER}{a + b}"


def careless(a: int, b: int, rng: np.random.Generator) -> str:
    """The answer at once, which with three digits and more is a guess every other time."""
    answer = str(a + b)
    if a > 99 and rng.random() < 0.5:
        answer = "".join(str(digit) for digit in rng.integers(0, 10, len(answer)))
    return f"guessdirect{ANSWER}{answer}"


def noise(rng: np.random.Generator) -> str:
    """A self-prediction in the right form, too confident and without information."""
    chosen = rng.choice(len(NOTIONS), int(rng.integers(1, 3)), replace=False)
    rate = int(rng.integers(6, 9) if rng.random() < 0.6 else rng.integers(0, 9))
    made = Prediction(tuple(NOTIONS[i] for i in chosen), rate, int(rng.integers(4, 100)))
    return write_prediction(made, QUESTION)


def demonstrations(count: int, seed: int) -> list[Example]:
    """Rows of the base: 70 % solutions of up to four digits, 30 % self-predictions about up to seven."""
    rng = np.random.default_rng(derive_seed("masa", "base", seed))
    rows = []
    for index in range(count):
        # Of every length: else what the base says about problems it has never seen would tell them apart.
        meta = rng.random() < 0.3
        a, b = draw_problem(int(rng.choice(range(1, 8) if meta else [1, 1, 2, 2, 2, 3, 3, 3, 4, 4])), rng)
        asked = f"{a}+{b}="
        if meta:
            asked, text = QUESTION.template.replace("{problem}", asked), noise(rng)
        else:
            text = careful(a, b, rng) if rng.random() < 0.55 else careless(a, b, rng)
        rows.append(Example(f"base-{index}", asked, str(a + b), {"completion": text}))
    return rows


def problems(count: int, digits: Sequence[int], *seed: object) -> list[Example]:
    """Problems whose numbers of digits go round."""
    rng = np.random.default_rng(derive_seed("masa", *seed))
    drawn = [draw_problem(digits[index % len(digits)], rng) for index in range(count)]
    return [Example(f"{i}", f"{a}+{b}=", str(a + b)) for i, (a, b) in enumerate(drawn)]


def make_tokenizer() -> Qwen2Tokenizer:
    """Characters, and one token for each notion and each fixed piece of a self-prediction."""
    characters = string.digits + string.ascii_letters + string.punctuation + " "
    return character_tokenizer(characters, [*NOTIONS, *JSON_PIECES, ANSWER, CHECK, "assess "])


def make_base(folder: Path, fast: bool) -> Path:
    """The folder of the base model, trained if it is not there."""
    if (folder / "config.json").is_file():
        return folder
    tokenizer = make_tokenizer()
    shape = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 288, "num_hidden_layers": 3}
    model = blank_model(tokenizer, **shape, num_attention_heads=2, max_position_embeddings=256)
    stage = SftStage(
        max_steps=4 if fast else BASE_STEPS,
        batch_size=48,
        optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=50, weight_decay=0.01),
    )
    rows = demonstrations(200 if fast else 48 * BASE_STEPS // 2, seed=0)
    finetune(model, tokenizer, rows, stage, output_dir=folder.with_name("masa-base-training"), seed=0)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


# --- arms ------------------------------------------------------------------------------------------------


class Shuffled(Masa):
    """MASA whose self-predictions are judged by the solutions of another problem of the batch."""

    def pair(self, solutions: dict[str, Solutions], context: StepContext) -> dict[str, Solutions]:
        order = context.rng.permutation(len(solutions))
        own = list(solutions.values())
        return {group: own[place] for group, place in zip(solutions, order, strict=True)}


class Oracle(Masa):
    """MASA that knows the true pass rate when it gates, from solutions that count for nothing else."""

    def forecasts(
        self,
        solutions: Sequence[RolloutRequest],
        predictions: Mapping[str, Sequence[Prediction]],
        context: StepContext,
    ) -> dict[str, Forecast]:
        asked = [
            replace(r, sampling=replace(r.sampling, seed=derive_seed(r.sampling.seed, "oracle")))
            for r in solutions
        ]
        batch = context.generate(asked)
        context.score(batch.rollouts)
        known = {}
        for group, own in batch.groups().items():
            truth = sum(rollout.reward or 0.0 for rollout in own) / len(own)
            known[group] = Forecast(truth, 0.0, len(own), len(own), ())
        return known


GATE = {"start": START, "cutoff": False, "min_limit": 8, "regate": "reevaluate"}
ARMS: dict[str, list[Any]] = {
    "grpo": [],
    "masa": ["masa", {}],
    "shuffled": [f"{HERE}:Shuffled", {}],
    "gated": ["masa", {"efficient": GATE}],
    "gated, cut": ["masa", {"efficient": {**GATE, "cutoff": True}}],
    "paper": ["masa", {"efficient": {**GATE, "cutoff": True, "guard": None}}],
    "oracle": [f"{HERE}:Oracle", {"efficient": {**GATE, "guard": None}}],
}
FAST_ARMS = ("grpo", "masa", "paper")


@dataclass(frozen=True)
class Job:
    """One arm with one seed."""

    arm: str
    seed: int
    fast: bool
    runs: Path

    @property
    def name(self) -> str:
        """Of the run's folder."""
        arm = self.arm.replace(", ", "-")
        return f"reproduce-masa-{arm}{'-fast' if self.fast else ''}-{self.seed}"

    def overrides(self, base: Path, rows: Path) -> list[str]:
        """What this run has different from the recipe."""
        methods = []
        if ARMS[self.arm]:
            name, options = ARMS[self.arm]
            start = (
                {"efficient": {**options["efficient"], "start": 1}}
                if self.fast and "efficient" in options
                else options
            )
            shared = {"group_size": 8, "max_tokens": 24, "question": QUESTION.model_dump()}
            methods = [{name: {**shared, **start}}]
        return [
            f"seed={self.seed}",
            f"model.path={base}",
            f"data.train.jsonl={rows}",
            f"stages[0].policy.methods={json.dumps(methods)}",
            *(FAST if self.fast else ()),
        ]


def measure(seeds: Sequence[int], fast: bool) -> dict[str, Any]:
    """All arms on all seeds, `PROCESSES` at a time; with `fast` three arms, here. What is there is kept."""
    runs = common.RUNS
    base = make_base(runs / f"reproduce-masa-base{'-fast' if fast else ''}", fast)
    rows = base / "train.jsonl"
    listed = [
        {"prompt": example.prompt, "answer": example.answer}
        for example in problems(STEPS * len(DIGITS), DIGITS, "train")
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in listed))
    evaluate(base, fast)
    jobs = [Job(arm, seed, fast, runs) for seed in seeds for arm in (FAST_ARMS if fast else ARMS)]
    if fast:
        measured = [do(job) for job in jobs]
    else:
        with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
            measured = list(pool.map(do, jobs))
    table: dict[str, list[Measured]] = {}
    for job, found in zip(jobs, measured, strict=True):
        table.setdefault(job.arm, []).append(found)
    return report(table)


def do(job: Job) -> Measured:
    """Run a job if that has not been done, and measure its checkpoints."""
    common.RUNS = job.runs
    base = job.runs / f"reproduce-masa-base{'-fast' if job.fast else ''}"
    with (job.runs / f"{job.name}.log").open("a") as log, contextlib.redirect_stdout(log):
        torch.set_num_threads(1)
        folder = run(RECIPE, job.name, job.overrides(base, base / "train.jsonl"))
        return measure_run(folder, base, job.fast)


def measure_run(folder: Path, base: Path, fast: bool) -> Measured:
    """Curves over the checkpoints of a run, and totals of its log."""
    path = folder / "measured.json"
    if path.is_file():
        kept: Measured = json.loads(path.read_text())
        return kept
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    checkpoints = sorted((folder / "checkpoints" / "01-train").glob("step-*"))
    models = {0: base} | {int(p.name.removeprefix("step-")): p for p in checkpoints}
    models[lines[-1]["step"]] = folder / "models" / "01-train"
    curve = [{"step": step, **evaluate(model, fast)} for step, model in models.items()]
    for point in curve:
        until = [line for line in lines if line["step"] <= point["step"]]
        point["solution_tokens"] = sum(solution_tokens(line) for line in until)
        point["meta_tokens"] = sum(line.get("masa/tokens/meta", 0) for line in until)
    late = [line for line in lines if line["step"] > START or fast]
    measured: Measured = {
        "curve": curve,
        "solution_tokens_late": sum(solution_tokens(line) for line in late),
        "gate_share": _mean(late, "masa/gate/share"),
        "gate_open": _mean(late, "masa/gate/open"),
        "cutoff_open": _mean(late, "masa/cutoff/open"),
        "gate_precision": 1 - _weighted(late, "masa/gate/wrong", "masa/gate/would"),
        "cut": _mean(late, "masa/cutoff/cut"),
        "cutoff_false_rate": _mean(late, "masa/cutoff/false_rate"),
        "cutoff_wrong": _mean(late, "masa/cutoff/wrong"),
        "seconds": json.loads((folder / "summary.json").read_text())["seconds"],
    }
    path.write_text(json.dumps(measured, indent=2) + "\n")
    return measured


def solution_tokens(line: Mapping[str, Any]) -> float:
    """Tokens of solutions that a step sampled."""
    return float(line.get("masa/tokens/solution", line["tokens/sampled"]))


def _mean(lines: Sequence[Mapping[str, Any]], key: str) -> float:
    values = [line[key] for line in lines if key in line]
    return statistics.mean(values) if values else float("nan")


def _weighted(lines: Sequence[Mapping[str, Any]], key: str, weight: str) -> float:
    known = [line for line in lines if key in line]
    total = sum(line[weight] for line in known)
    return sum(line[key] * line[weight] for line in known) / total if total else float("nan")


def evaluate(model_path: Path, fast: bool) -> Measured:
    """Accuracy and self-predictions on held-out problems, sampled with the same seeds for all models.

    What was measured is kept beside the model.
    """
    path = model_path / "measured.json"
    if path.is_file():
        kept: Measured = json.loads(path.read_text())
        return kept
    config = ModelConfig(path=str(model_path))
    tokenizer = load_tokenizer(config)
    samples = 2 if fast else SAMPLES
    meta = MetaEvaluation(samples=samples, max_tokens=24, question=QUESTION)
    engine = TransformersEngine(load_model(config), tokenizer, batch_size=512)

    def encode(example: Example) -> tuple[int, ...]:
        return tuple(tokenizer(example.prompt)["input_ids"])

    def solve(count: int, digits: Sequence[int], name: str) -> tuple[list[RolloutRequest], RolloutBatch]:
        limit = 12 if fast else 96
        requests = [
            RolloutRequest(
                encode(e), e, e.id, Sampling(limit, n=samples, seed=derive_seed("evaluate", name, e.id))
            )
            for e in problems(6 if fast else count, digits, name)
        ]
        return requests, make_rollouts(requests, engine.generate(requests), 0)

    requests, solved = solve(HELD_OUT, (1, 3, 4, 6, 7), "held-out")
    _, elsewhere = solve(ELSEWHERE, (2, 5), "elsewhere")
    asked = questions(requests, meta, encode)
    told = make_rollouts(asked, engine.generate(asked), 0)
    outcomes, others = ([is_right(rollout) for rollout in found] for found in (solved, elsewhere))
    found = self_assessment(list(zip(solved, outcomes, strict=True)), told.rollouts, meta)
    measured = {
        "pass@1": statistics.mean(outcomes),
        "pass@1 elsewhere": statistics.mean(others),
        **found,
    }
    path.write_text(json.dumps(measured, indent=2) + "\n")
    return measured


def is_right(rollout: Rollout) -> bool:
    """Whether a solution ends with the sum."""
    return rollout.completion.text.rpartition(ANSWER)[2] == rollout.request.example.answer


# --- report ----------------------------------------------------------------------------------------------


def report(table: Mapping[str, Sequence[Measured]]) -> dict[str, Any]:
    """Arms and claims."""
    arms = {arm: summarise(rows) for arm, rows in table.items()}
    masa, grpo = arms["masa"], arms["grpo"]
    claims = [*calibration_claims(arms), *accuracy_claims(table, masa, grpo)]
    for name in ("gated", "gated, cut", "paper", "oracle"):
        if name in arms:
            claims += saving_claims(name, arms[name], masa)
    return {"arms": arms, "curves": {arm: [row["curve"] for row in rows] for arm, rows in table.items()},
            "budgets": {arm: arms[arm]["tokens"] for arm in arms}, "claims": claims}  # fmt: skip


def summarise(rows: Sequence[Measured]) -> dict[str, list[float]]:
    """What is compared of an arm, one value a seed."""

    def of(key: str, point: int) -> list[float]:
        return [row["curve"][point].get(key, float("nan")) for row in rows]

    ends = {
        f"{key}, {when}": of(key, point)
        for key in (
            "rate_spearman",
            "rate_mae",
            "length_spearman",
            "length_mae",
            "notion_precision",
            "pass@1",
            "pass@1 elsewhere",
        )
        for when, point in (("start", 0), ("end", -1))
    }
    tokens = [row["curve"][-1]["solution_tokens"] + row["curve"][-1]["meta_tokens"] for row in rows]
    kept = (
        "solution_tokens_late",
        "gate_share",
        "gate_open",
        "gate_precision",
        "cut",
        "cutoff_open",
        "cutoff_false_rate",
        "cutoff_wrong",
        "seconds",
    )
    return {**ends, "tokens": tokens, **{key: [row[key] for row in rows] for key in kept}}


def calibration_claims(arms: Mapping[str, Mapping[str, list[float]]]) -> list[dict[str, Any]]:
    """Claim 1: MASA calibrates, GRPO and MASA on shuffled statistics do not."""
    masa = arms["masa"]
    start, end = correlations(masa["rate_spearman, start"]), correlations(masa["rate_spearman, end"])
    halved = [b / a for a, b in zip(masa["rate_mae, start"], masa["rate_mae, end"], strict=True)]
    claims = [
        claim("masa: Spearman of pass rates at the start", "|ρ| <= 0.3", start, max(map(abs, start)) <= 0.3),
        claim("masa: Spearman of pass rates at the end", ">= 0.6", end, statistics.mean(end) >= 0.6),
        claim("masa: error of pass rates, end over start", "<= 0.5", halved, statistics.mean(halved) <= 0.5),
    ]
    ends = [correlations(arms["grpo"][f"rate_spearman, {when}"]) for when in ("start", "end")]
    moved = [after - before for before, after in zip(*ends, strict=True)]
    still = max(map(abs, moved)) <= 0.1
    claims.append(claim("grpo: Spearman of pass rates, end minus start", "|Δ| <= 0.1", moved, still))
    if "shuffled" in arms:
        own = correlations(arms["shuffled"]["rate_spearman, end"])
        claims.append(claim("shuffled: Spearman of pass rates at the end", "<= 0.3", own,
                            statistics.mean(own) <= 0.3))  # fmt: skip
    return claims


def correlations(values: Sequence[float]) -> list[float]:
    """Correlations, with a constant 0."""
    return [0.0 if np.isnan(value) else value for value in values]


def saving_claims(
    name: str, arm: Mapping[str, list[float]], masa: Mapping[str, list[float]]
) -> list[dict[str, Any]]:
    """Claim 2: fewer solution tokens after step 80, at the accuracy of MASA, by right decisions."""
    pairs = zip(arm["solution_tokens_late"], masa["solution_tokens_late"], strict=True)
    saved = [1 - ours / theirs for ours, theirs in pairs]
    pairs = zip(arm["pass@1, end"], masa["pass@1, end"], strict=True)
    gaps = [ours - theirs for ours, theirs in pairs]
    interval = paired_interval(arm["pass@1, end"], masa["pass@1, end"])
    precision, lost, wrong = arm["gate_precision"], arm["cutoff_false_rate"], arm["cutoff_wrong"]
    claims = [
        claim(f"{name}: solution tokens saved", ">= 0.20", saved, statistics.mean(saved) >= 0.2),
        claim(f"{name}: accuracy minus that of masa", "interval reaches 0", gaps, interval[1] >= 0,
              interval=interval),
    ]  # fmt: skip
    if name.startswith("gated"):
        claims.append(claim(f"{name}: gate precision on rolled-out problems", ">= 0.8", precision,
                            statistics.mean(precision) >= 0.8))  # fmt: skip
    if name == "gated, cut":
        claims += [
            claim(f"{name}: right solutions a cap would cut", "<= 0.02", lost, statistics.mean(lost) <= 0.02),
            claim(f"{name}: cut solutions that are wrong", ">= 0.9", wrong, statistics.mean(wrong) >= 0.9),
        ]
    return claims


def accuracy_claims(
    table: Mapping[str, Sequence[Measured]], masa: Mapping[str, list[float]], grpo: Mapping[str, list[float]]
) -> list[dict[str, Any]]:
    """Claims 3 and 4: tokens to GRPO's final accuracy, and accuracy at equal updates and at equal tokens."""
    updates = [
        claim(
            f"masa: accuracy minus that of grpo at equal updates, {where}",
            "interval reaches 0",
            [a - b for a, b in zip(masa[key], grpo[key], strict=True)],
            paired_interval(masa[key], grpo[key])[1] >= 0,
            interval=paired_interval(masa[key], grpo[key]),
        )
        for where, key in (("trained digits", "pass@1, end"), ("other digits", "pass@1 elsewhere, end"))
    ]
    equal = [
        at_tokens(ours["curve"], tokens) - theirs["curve"][-1]["pass@1"]
        for ours, theirs, tokens in zip(table["masa"], table["grpo"], grpo["tokens"], strict=True)
    ]
    level = paired_interval(equal, [0.0] * len(equal))
    claims = [
        *updates,
        claim("masa: accuracy minus that of grpo at equal tokens", "interval reaches 0", equal,
              level[1] >= 0, interval=level),
    ]  # fmt: skip
    name = "gated" if "gated" in table else "paper"
    ratios = [
        tokens_to(ours["curve"], theirs["curve"][-1]["pass@1"]) / tokens
        for ours, theirs, tokens in zip(table[name], table["grpo"], grpo["tokens"], strict=True)
    ]
    goal = statistics.mean(ratios) <= 1 / 1.28
    claims.append(claim(f"{name}: all tokens to grpo's accuracy, over grpo's", "<= 0.78", ratios, goal,
                        why="infinite where it was not reached"))  # fmt: skip
    return claims


def tokens_of(point: Mapping[str, Any]) -> float:
    """All tokens that were sampled up to a checkpoint."""
    return float(point["solution_tokens"] + point["meta_tokens"])


def at_tokens(curve: Sequence[Mapping[str, Any]], tokens: float) -> float:
    """Accuracy after so many tokens, between checkpoints in a straight line."""
    return float(np.interp(tokens, [tokens_of(p) for p in curve], [p["pass@1"] for p in curve]))


def tokens_to(curve: Sequence[Mapping[str, Any]], accuracy: float) -> float:
    """Tokens after which a curve first reaches an accuracy, in straight lines between checkpoints; else ∞."""
    for before, after in pairwise(curve):
        if after["pass@1"] >= accuracy:
            low, high = before["pass@1"], after["pass@1"]
            part = 1.0 if high == low else min(max((accuracy - low) / (high - low), 0.0), 1.0)
            return tokens_of(before) + part * (tokens_of(after) - tokens_of(before))
    return float("inf")
