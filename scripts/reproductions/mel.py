"""MEL where every part of a meta-experience has a ground truth: reproductions/mel_world.py, which see.

The base model can compute, follow hints, compare solutions and write meta-experiences, and guesses the rules
(one in three is right).

    1  in context   fresh replays with a meta-experience, raw, kept or rejected by one replay, shuffled; on
                    this world, and on the arithmetic of the tiny reasoner
    2  transfer     the loss term alone, no policy gradient: what becomes of the bare problem, per target
    3  training     GRPO against GRPO with MEL, per target and weight, after as many updates and as many
                    sampled tokens

Both kinds of training go on with some of the base's own rows (hints and analyses), without which so small a
model forgets how to read them; every arm does.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reproductions import common
from reproductions.common import ROOT, claim, paired_interval
from reproductions.mel_world import (
    EXPERIENCE_TOKENS,
    FORMAT,
    SOLUTION_TOKENS,
    TRUTH,
    all_problems,
    answers_of,
    base_rows,
    computes,
    is_true,
    make_base,
    score,
)
from transformers import TrainingArguments

from posttrain.data.answers import extract_answer
from posttrain.data.error_analysis import SHORT
from posttrain.data.experiences import query_example, replay_example
from posttrain.data.prompts import encode_prompt
from posttrain.data.tasks import make_task
from posttrain.methods.base import Channel, LossTerm, Method, StepContext
from posttrain.methods.mel import Candidate, Mel
from posttrain.recipe.mel_schema import ExperienceFormat, MelConfig
from posttrain.recipe.schema import (
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyStage,
    RewardOptions,
    RolloutConfig,
)
from posttrain.rewards.scorer import ScoreReport
from posttrain.rollout.build import load_model, load_tokenizer
from posttrain.rollout.transformers import TransformersEngine
from posttrain.rollout.types import Example, Rollout, RolloutRequest, Sampling, derive_seed, make_rollouts
from posttrain.training.arguments import optimizer_arguments
from posttrain.training.collect import Collector
from posttrain.training.policy import PolicyTrainer
from posttrain.training.prompts import PromptOrder

SEEDS = (0, 1, 2, 3, 4)
PROCESSES = 2
"""Runs at a time; each computes in one thread."""
HELD_OUT = 150
"""Of the 750 problems; the others are trained on."""
PROMPTS, GROUP, EVERY = 64, 8, 20
RATE, ANCHOR_ROWS = 5e-4, 16
TRANSFER_STEPS, TRAINING_STEPS, GRPO_STEPS = 200, 120, 160
"""GRPO goes on, so that it can be compared after as many sampled tokens."""
IN_CONTEXT, REPLAYS = 750, 6
TINY_PROBLEMS = 300
TINY_ARGS = {"min_terms": 3, "max_terms": 3, "min_first": -30, "max_first": 40}

TARGETS = ("retro", "query", "distill")
WEIGHTS = (0.03, 0.1, 0.3, 1.0)
TRANSFERS: dict[str, dict[str, Any]] = {
    **{target: {"target": target} for target in TARGETS},
    "unverified": {"target": "retro", "validation": "none"},
    "solution": {"target": "solution"},
}
TRAININGS: dict[str, dict[str, Any] | None] = {
    "grpo": None,
    **{f"{t} {w:g}": {"target": t, "weight": w} for t in TARGETS for w in WEIGHTS},
}
PAPER = "retro 1"
"""The paper's own setting."""

Measured = dict[str, Any]


# --- training --------------------------------------------------------------------------------------------


class Truth:
    """Scores in this process."""

    def score(self, rollouts: Sequence[Rollout], step: int | None = None) -> ScoreReport:
        """See `score`."""
        score(rollouts)
        return ScoreReport(len(rollouts), 0, {})


class Anchor(Method):
    """Rows of the base's own training, so that it goes on to read hints and to compare solutions."""

    name = "anchor"

    def auxiliary(self, context: StepContext) -> list[LossTerm]:
        """As many of either kind in every step."""
        texts = [row for kind in ("obey", "analyse") for row in base_rows(kind, ANCHOR_ROWS, context.rng)]
        prompts = context.tokenizer([text for text, _ in texts])["input_ids"]
        return [LossTerm("anchor", list(zip(prompts, answers_of(texts, context.tokenizer), strict=True)))]


class NoPolicyGradient(Method):
    """Takes the outcome channel away: what is left are the supervised terms."""

    name = "no_policy_gradient"

    def channels(self, batch: Any, context: StepContext) -> list[Channel]:
        """The outcome of nothing."""
        return [Channel("outcome", {})]


def train(job: Job) -> Measured:
    """Train an arm from the base; its curve over the steps, on problems that it has not seen."""
    config = ModelConfig(path=str(job.base))
    tokenizer, model = load_tokenizer(config), load_model(config)
    engine = TransformersEngine(model, tokenizer, batch_size=1024)
    options = (TRANSFERS if job.kind == "transfer" else TRAININGS)[job.arm]
    methods: list[Method] = [Anchor(None)]
    if job.kind == "transfer":
        methods.append(NoPolicyGradient(None))
    if options is not None:
        methods.append(Mel(MelConfig(prompts=FORMAT, max_tokens=EXPERIENCE_TOKENS, **options)))
    steps = {"transfer": TRANSFER_STEPS, "training": TRAINING_STEPS if options else GRPO_STEPS}[job.kind]
    stage = PolicyStage(
        steps=2 if job.fast else steps,
        prompts_per_step=4 if job.fast else PROMPTS,
        group_size=GROUP,
        micro_batch_tokens=1 << 16,
        loss=LossConfig(kind="grpo"),
        optimizer=OptimizerConfig(learning_rate=RATE, max_grad_norm=1.0),
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, tokenizer, engine, stage, methods, job.seed, folder)
        curve = [{"step": 0, "tokens": 0.0, **bare(engine, tokenizer, job)}]
        log: list[dict[str, float]] = []

        def watch(step: int, of: int, metrics: dict[str, float]) -> None:
            log.append(metrics)
            if step % EVERY == 0 or step == of:
                tokens = sum(line["tokens/sampled"] for line in log)
                curve.append({"step": step, "tokens": tokens, **bare(engine, tokenizer, job)})

        trainer.on_log = watch
        trainer.train()
    written = in_context(engine, tokenizer, WORLD, job.seed, 6 if job.fast else IN_CONTEXT // 2)
    return {"curve": curve, "written": written, "log": averages(log)}


def make_trainer(
    model: Any,
    tokenizer: Any,
    engine: TransformersEngine,
    stage: PolicyStage,
    methods: Sequence[Method],
    seed: int,
    folder: str,
) -> PolicyTrainer:
    """The trainer of a policy stage, scoring in this process."""
    rollout = RolloutConfig(max_tokens=SOLUTION_TOKENS)
    collector = Collector(
        engine=engine,
        scorer=Truth(),  # type: ignore[arg-type]  # it has what the collector asks for
        order=PromptOrder(all_problems()[HELD_OUT:], seed),
        encode=lambda example: encode_prompt(example, tokenizer),
        stage=stage,
        rollout=rollout,
        rewards=RewardOptions(),
        methods=methods,
        seed=seed,
    )
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=stage.steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=seed,
        **optimizer_arguments(stage.optimizer, dtype=torch.float32),
    )
    return PolicyTrainer(
        model=model,
        tokenizer=tokenizer,
        arguments=arguments,
        collector=collector,
        stage=stage,
        rollout=rollout,
        methods=methods,
        seed=seed,
    )


def bare(engine: TransformersEngine, tokenizer: Any, job: Job) -> Measured:
    """Of the held-out problems alone: pass rate, right rules of either step, and rules that are recalled."""
    examples = all_problems()[: 4 if job.fast else HELD_OUT]
    sampling = Sampling(SOLUTION_TOKENS, n=GROUP)
    requests = [
        RolloutRequest(encode_prompt(e, tokenizer), e, e.id, replace(sampling, seed=derive_seed(e.id)))
        for e in examples
    ]
    solved = make_rollouts(requests, engine.generate(requests), 0).rollouts
    score(solved)
    asked = [
        replace(r, prompt_ids=encode_prompt(query_example(r.example, FORMAT), tokenizer),
                sampling=replace(r.sampling, max_tokens=EXPERIENCE_TOKENS))
        for r in requests
    ]  # fmt: skip
    recalled = make_rollouts(asked, engine.generate(asked), 0)

    def picks(place: int, step: str) -> float:
        return statistics.mean(
            r.completion.text[place : place + 1] == TRUTH[step][r.request.example.prompt[1]] for r in solved
        )

    return {
        "pass": statistics.mean(r.reward or 0.0 for r in solved),
        "computes": statistics.mean(computes(r.completion.text, r.request.example.prompt) for r in solved),
        "rule x": picks(2, "x"),
        "rule y": picks(6, "y"),
        "recall": statistics.mean(is_true(r.completion.text, r.request.example) for r in recalled),
    }


def averages(log: Sequence[Mapping[str, float]]) -> Measured:
    """Means over the steps of what MEL logs."""
    names = sorted({key for line in log for key in line if key.startswith("mel/")})
    return {name: statistics.mean(line[name] for line in log if name in line) for name in names}


# --- meta-experiences in context ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where meta-experiences are tried: problems, formats, scores, and which texts are true."""

    examples: Sequence[Example]
    format: ExperienceFormat
    solution_tokens: int
    experience_tokens: int
    score: Any
    is_true: Any


def arithmetic_is_right(rollouts: Sequence[Rollout]) -> None:
    """Scores of the tiny reasoner's solutions."""
    for rollout in rollouts:
        rollout.reward = float(extract_answer(rollout.completion.text) == rollout.request.example.answer)
        rollout.rewards, rollout.reward_errors = {"right": rollout.reward}, {}


def rule_is_true(text: str, example: Example) -> bool:
    """Whether the rule of an analysis is a fact: `rule 27-18=9`."""
    found = re.search(r";rule (-?\d+)([+-]\d+)=(-?\d+)$", text)
    return found is not None and int(found[1]) + int(found[2]) == int(found[3])


WORLD = Place(all_problems(), FORMAT, SOLUTION_TOKENS, EXPERIENCE_TOKENS, score, is_true)


def in_context(engine: TransformersEngine, tokenizer: Any, place: Place, seed: int, count: int) -> Measured:
    """What fresh replays say about meta-experiences that one replay has kept or rejected.

    Problems with right and wrong solutions among `GROUP` give one meta-experience each, as MEL makes them.
    """
    config = MelConfig(weight=0.0, prompts=place.format, max_tokens=place.experience_tokens)
    method, log = Mel(config), dict[str, float]()
    rng, sampling = np.random.default_rng(0), Sampling(place.solution_tokens)
    context = StepContext(0, engine, tokenizer, None, rng, log.__setitem__, place.score, sampling=sampling)
    requests = [
        RolloutRequest(
            encode_prompt(e, tokenizer), e, f"0.{i}",
            Sampling(place.solution_tokens, n=GROUP, seed=derive_seed("in context", seed, i)),
        )
        for i, e in enumerate(place.examples[:count])
    ]  # fmt: skip
    batch = context.generate(requests)
    place.score(batch.rollouts)
    method.extend(batch, context)
    candidates = method.candidates
    texts = [candidate.text for candidate in candidates]
    others = [texts[index] for index in np.roll(np.arange(len(texts)), 1)]
    own = fresh_replays(candidates, texts, context, place, "own")
    shuffled = fresh_replays(candidates, others, context, place, "shuffled")
    kept = np.array([method.is_verified(candidate) for candidate in candidates], dtype=bool)
    true = np.array([place.is_true(c.text, c.pair.example) for c in candidates], dtype=bool)
    base = np.array([candidate.pair.base_rate for candidate in candidates])
    found = {
        "mixed": log["mixed"],
        "malformed": log.get("malformed", float("nan")) + log.get("cut", float("nan")),
        "pass, none": base.mean() if len(base) else float("nan"),
        "retention": kept.mean() if len(kept) else float("nan"),
    }
    parts = {"raw": own, "kept": own[kept], "rejected": own[~kept], "shuffled": shuffled,
             "true": own[true], "false": own[~true]}  # fmt: skip
    found |= {
        f"pass, {name}": values.mean() if len(values) else float("nan") for name, values in parts.items()
    }
    precisions = {"all": true, "kept": true[kept], "rejected": true[~kept]}
    found |= {
        f"true, {name}": values.mean() if len(values) else float("nan") for name, values in precisions.items()
    }
    return {name: float(value) for name, value in found.items()}


def fresh_replays(
    candidates: Sequence[Candidate], texts: Sequence[str], context: StepContext, place: Place, name: str
) -> np.ndarray:
    """Pass rate of each problem with a text in context."""
    requests = []
    for candidate, text in zip(candidates, texts, strict=True):
        example = replay_example(candidate.pair.example, text, place.format)
        solution = candidate.pair.right.request.sampling
        sampling = replace(solution, n=REPLAYS, seed=derive_seed(solution.seed, name))
        ids = encode_prompt(example, context.tokenizer)
        requests.append(RolloutRequest(ids, example, candidate.pair.group, sampling, name))
    batch = context.generate(requests)
    place.score(batch.rollouts)
    rewards = np.array([rollout.reward for rollout in batch], dtype=float)
    return rewards.reshape(len(candidates), REPLAYS).mean(1)


# --- jobs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One thing to measure: `context`, `tiny`, or an arm of `transfer` or `training`."""

    kind: str
    seed: int
    fast: bool
    runs: Path
    arm: str = ""

    @property
    def base(self) -> Path:
        """The folder of the base model."""
        return self.runs / f"reproduce-mel-base{'-fast' if self.fast else ''}"

    @property
    def path(self) -> Path:
        """Where the result is kept."""
        name = "-".join(part for part in (self.kind, self.arm.replace(" ", "-"), str(self.seed)) if part)
        return self.runs / f"reproduce-mel{'-fast' if self.fast else ''}" / f"{name}.json"


def measure(seeds: Sequence[int], fast: bool) -> dict[str, Any]:
    """Everything on all seeds, `PROCESSES` at a time; with `fast` a part, here. What is there is kept."""
    runs = common.RUNS
    transfers = ("retro", "solution") if fast else tuple(TRANSFERS)
    trainings = ("grpo", PAPER, "distill 0.1") if fast else tuple(TRAININGS)
    jobs = [Job(kind, seed, fast, runs) for kind in ("context", "tiny") for seed in seeds]
    jobs += [Job("transfer", seed, fast, runs, arm) for seed in seeds[:3] for arm in transfers]
    jobs += [Job("training", seed, fast, runs, arm) for seed in seeds for arm in trainings]
    base = jobs[0].base
    if not (base / "config.json").is_file():
        make_base(base, fast)
    if fast:
        measured = [do(job) for job in jobs]
    else:
        with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
            measured = list(pool.map(do, jobs))
    table: dict[tuple[str, str], list[Measured]] = {}
    for job, found in zip(jobs, measured, strict=True):
        table.setdefault((job.kind, job.arm), []).append(found)
    return report(table)


def do(job: Job) -> Measured:
    """Measure one thing if that has not been done."""
    if job.path.is_file():
        kept: Measured = json.loads(job.path.read_text())
        return kept
    torch.set_num_threads(1)
    job.path.parent.mkdir(parents=True, exist_ok=True)
    with job.path.with_suffix(".log").open("a") as log, contextlib.redirect_stdout(log):
        if job.kind in ("transfer", "training"):
            found = train(job)
        else:
            config = ModelConfig(
                path=str(job.base if job.kind == "context" else ROOT / "data" / "tiny-reasoner")
            )
            tokenizer = load_tokenizer(config)
            engine = TransformersEngine(load_model(config), tokenizer, batch_size=1024)
            count = {"context": IN_CONTEXT, "tiny": TINY_PROBLEMS}[job.kind]
            place = WORLD if job.kind == "context" else arithmetic(job)
            found = in_context(engine, tokenizer, place, job.seed, 4 if job.fast else count)
    beside = job.path.with_suffix(".tmp")
    beside.write_text(json.dumps(found, indent=2) + "\n")
    beside.replace(job.path)
    return found


def arithmetic(job: Job) -> Place:
    """The tiny reasoner's: chains that it solves now and then."""
    count = 4 if job.fast else TINY_PROBLEMS
    examples = make_task("arithmetic", size=count, seed=job.seed, split="test", **TINY_ARGS)
    return Place(examples, SHORT, 40, 64, arithmetic_is_right, rule_is_true)


# --- report ----------------------------------------------------------------------------------------------


def report(table: Mapping[tuple[str, str], Sequence[Measured]]) -> dict[str, Any]:
    """Arms and claims; claims on arms that were not trained are left out."""
    contexts = {"world": table["context", ""], "tiny reasoner": table["tiny", ""]}
    transfers = {arm: rows for (kind, arm), rows in table.items() if kind == "transfer"}
    trainings = {arm: rows for (kind, arm), rows in table.items() if kind == "training"}
    arms: dict[str, Any] = {}
    for name, rows in contexts.items():
        arms[f"in context: {name}"] = {key: [row[key] for row in rows] for key in rows[0]}
    for kind, listed in (("transfer", transfers), ("training", trainings)):
        arms |= {f"{kind}: {arm}": summarise(rows) for arm, rows in listed.items()}
    return {
        "arms": arms,
        "budgets": {arm: [row["curve"][-1]["tokens"] for row in rows] for arm, rows in trainings.items()},
        "curves": {
            f"{kind}: {arm}": [row["curve"] for row in rows]
            for kind, listed in (("transfer", transfers), ("training", trainings))
            for arm, rows in listed.items()
        },
        "claims": [
            *(item for name, rows in contexts.items() for item in context_claims(name, rows)),
            *transfer_claims(transfers),
            *training_claims(trainings),
        ],
    }


def summarise(rows: Sequence[Measured]) -> dict[str, list[float]]:
    """What is compared of an arm, one value a seed."""
    ends = {
        f"{key}, {when}": [row["curve"][point][key] for row in rows]
        for key in ("pass", "computes", "rule x", "rule y", "recall")
        for when, point in (("start", 0), ("end", -1))
    }
    written = {f"written: {key}": [row["written"][key] for row in rows] for key in rows[0]["written"]}
    logged = {key: [row["log"].get(key, float("nan")) for row in rows] for key in rows[0]["log"]}
    return {**ends, **written, **logged}


def context_claims(name: str, rows: Sequence[Measured]) -> list[dict[str, Any]]:
    """Claim 1: a meta-experience helps in context, and a replay selects the better ones."""

    def over(better: str, worse: str, goal: float) -> dict[str, Any]:
        ours, theirs = [row[better] for row in rows], [row[worse] for row in rows]
        gains = [a - b for a, b in zip(ours, theirs, strict=True)]
        interval = paired_interval(ours, theirs)
        holds = statistics.mean(gains) > goal and interval[0] > 0
        text = f"> {goal:g}, interval above 0"
        return claim(f"{name}, in context: {better} over {worse}", text, gains, holds, interval=interval)

    return [
        over("pass, raw", "pass, shuffled", 0.05),
        over("pass, kept", "pass, raw", 0.0),
        over("pass, raw", "pass, rejected", 0.0),
        over("true, kept", "true, all", 0.0),
        over("retention", "pass, none", 0.0),
    ]


def transfer_claims(arms: Mapping[str, Sequence[Measured]]) -> list[dict[str, Any]]:
    """Claim 2: what each target does to the bare problem, beside the control of as many texts."""

    def ends(arm: str, key: str) -> list[float]:
        return [row["curve"][-1][key] for row in arms[arm]]

    claims = []
    for target in TARGETS:
        if target not in arms:
            continue
        gains = [a - b for a, b in zip(ends(target, "pass"), ends("solution", "pass"), strict=True)]
        interval = paired_interval(ends(target, "pass"), ends("solution", "pass"))
        name = f"transfer to the bare problem: {target} over right solutions"
        claims.append(claim(name, "interval above 0", gains, interval[0] > 0, interval=interval))
    if "unverified" in arms:
        ours, theirs = ([row["written"]["true, all"] for row in arms[arm]] for arm in ("retro", "unverified"))
        gains = [a - b for a, b in zip(ours, theirs, strict=True)]
        interval = paired_interval(ours, theirs)
        name = "true meta-experiences written after retro, verified over unverified"
        claims.append(claim(name, "interval above 0", gains, interval[0] > 0, interval=interval))
    return claims


def training_claims(arms: Mapping[str, Sequence[Measured]]) -> list[dict[str, Any]]:
    """Claim 3: against GRPO, after as many updates and after as many sampled tokens."""
    grpo, claims = arms["grpo"], []
    gains: dict[str, list[float]] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for arm, rows in arms.items():
        if arm == "grpo":
            continue
        last = [row["curve"][-1] for row in rows]
        ours = [point["pass"] for point in last]
        theirs = [value_at(row["curve"], "step", at["step"]) for row, at in zip(grpo, last, strict=True)]
        gains[arm] = [a - b for a, b in zip(ours, theirs, strict=True)]
        intervals[arm] = paired_interval(ours, theirs)
        equal = [value_at(row["curve"], "tokens", at["tokens"]) for row, at in zip(grpo, last, strict=True)]
        gaps = [a - b for a, b in zip(ours, equal, strict=True)]
        level = paired_interval(ours, equal)
        claims += [
            claim(f"{arm}: accuracy over grpo after as many updates", "interval above 0", gains[arm],
                  intervals[arm][0] > 0, interval=intervals[arm]),
            claim(f"{arm}: accuracy over grpo after as many sampled tokens", "interval above 0", gaps,
                  level[0] > 0, interval=level),
        ]  # fmt: skip
    best = max(gains, key=lambda arm: statistics.mean(gains[arm]))
    holds = statistics.mean(gains[best]) >= 0.039 and intervals[best][0] > 0
    name = f"the best of {len(gains)} settings ({best}): accuracy over grpo after as many updates"
    goal = ">= 0.039 (the paper's gain), interval above 0, not corrected for the choice"
    claims.insert(0, claim(name, goal, gains[best], holds, interval=intervals[best]))
    if len(grpo) > 1:
        chosen = chosen_elsewhere(gains)
        interval = paired_interval(chosen, [0.0] * len(chosen))
        name = "the setting that is best on the other seeds: accuracy over grpo after as many updates"
        holds = statistics.mean(chosen) >= 0.039 and interval[0] > 0
        claims.insert(1, claim(name, ">= 0.039, interval above 0", chosen, holds, interval=interval))
    return claims


def chosen_elsewhere(gains: Mapping[str, Sequence[float]]) -> list[float]:
    """Of every seed the gain of the setting whose mean over the other seeds is the highest.

    The best of many settings is above 0 by chance alone; this is not: no seed takes part in its own choice.
    """

    def others(arm: str, seed: int) -> float:
        return sum(gain for other, gain in enumerate(gains[arm]) if other != seed)

    count = len(next(iter(gains.values())))
    return [gains[max(gains, key=lambda arm: others(arm, seed))][seed] for seed in range(count)]


def value_at(curve: Sequence[Mapping[str, float]], key: str, place: float) -> float:
    """The pass rate at a number of steps or tokens, between the points of a curve and at its ends."""
    return float(np.interp(place, [point[key] for point in curve], [point["pass"] for point in curve]))
