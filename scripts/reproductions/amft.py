"""AMFT on addition with demonstrators that err, against every mixture that could have been chosen beforehand.

All arms train the same model of 0.1M parameters from its random weights on the same demonstrations and
prompts for as many steps; all but the policy gradient alone begin with a warm-up of imitation. An arm's
accuracy is the mean of its last five evaluations, on problems nothing was trained or fitted on.

    amft 0.1, 0.5, 0.9                         the controller from three starts
    turned around                              the controller with the other sign
    fixed 0.1 to 0.9                           what a sweep would try
    imitation, policy gradient, switch at ...  one loss at a time

Whenever the controller measures, the meta-gradient is found by brute force as well: the step is taken with
more and with less imitation, and the probability of every held-out answer computed after both.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reproductions import common
from reproductions.amft_world import (
    Pairs,
    accuracy,
    answer_logprobs,
    chances,
    make_base,
    make_pairs,
    write_rows,
)
from reproductions.common import claim, paired_interval, run, summary

from posttrain.methods.amft import Amft
from posttrain.methods.base import Channel, Compared, LossTerm, StepContext
from posttrain.rollout.types import RolloutBatch

SEEDS = (0, 1, 2)
PROCESSES = 2
"""Runs at a time; each computes in one thread."""
RECIPE = Path(__file__).with_suffix(".yaml")
WARMUP = 150
EVERY = 25
"""Steps between two evaluations."""
LAST = 5
"""Evaluations that an arm's accuracy is the mean of."""
STARTS, FIXED, SWITCHES = (0.1, 0.5, 0.9), (0.1, 0.3, 0.5, 0.7, 0.9), (150, 300, 500)
CONTROLLER = {"rate": 0.4, "interval": 10}
MAIN, TURNED = "amft 0.5", "turned around"
ARMS: dict[str, dict[str, Any]] = {
    **{f"amft {mu:g}": {"mu": mu, **CONTROLLER} for mu in STARTS},
    TURNED: {"mu": 0.5, **CONTROLLER, "rate": -CONTROLLER["rate"]},
    **{f"fixed {mu:g}": {"schedule": {0: mu}} for mu in FIXED},
    "imitation": {"schedule": {0: 1.0}},
    "policy gradient": {"schedule": {0: 0.0}, "warmup_steps": 0},
    **{f"switch at {step}": {"schedule": {0: 1.0, step: 0.0}} for step in SWITCHES},
}
FAST_ARMS = (MAIN, "fixed 0.1", TURNED, "switch at 150")
FAST = ("stages[0].policy.steps=4", "stages[0].policy.prompts_per_step=4", "stages[0].policy.group_size=2")

Measured = dict[str, Any]


class Watched(Amft):
    """AMFT that evaluates the policy, and checks its meta-gradient by brute force."""

    every = EVERY

    def channels(self, batch: RolloutBatch, context: StepContext) -> list[Channel]:
        if context.step % self.every == 0:
            for name, value in accuracy(context.model, make_pairs()["test"]).items():
                context.log(f"test/{name}", value)
        return super().channels(batch, context)

    def auxiliary(self, context: StepContext) -> list[LossTerm]:
        terms = super().auxiliary(context)
        self.shown = [(*prompt, *completion) for term in terms for prompt, completion in term.rows]
        return terms

    def compared(self, result: Compared, context: StepContext) -> None:
        mu = self.weight(context.step)
        difference, error = by_brute_force(
            context.model, torch.tensor(self.shown), mu, make_pairs()["held_out"], result.learning_rate
        )
        context.log("brute_force", difference)
        context.log("brute_force_error", error)
        super().compared(result, context)


class Often(Watched):
    """The same in every step, for runs of a few."""

    every = 1


def by_brute_force(
    model: Any, shown: torch.Tensor, mu: float, held_out: Pairs, rate: float, delta: float = 0.5
) -> tuple[float, float]:
    """(U(mu + delta) - U(mu - delta)) / (2 delta) after one step of gradient descent, and its standard error
    over the held-out problems.

    The gradient of the step, mu g_S + (1 - mu) g_R, is in the parameters; g_S is computed again, so that both
    are known. The step is linear in mu, so delta may be large.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    loss = -answer_logprobs(model, shown).mean()
    imitation = torch.autograd.grad(loss, weights)
    before = [weight.detach().clone() for weight in weights]
    ends = []
    with torch.no_grad():
        for other in (mu + delta, mu - delta):
            share = (1 - other) / (1 - mu)
            for weight, start, own in zip(weights, before, imitation, strict=True):
                mixed = share * (weight.grad - mu * own) + other * own
                weight.copy_(start - rate * mixed)
            ends.append(chances(model, held_out))
        for weight, start in zip(weights, before, strict=True):
            weight.copy_(start)
    slopes = (ends[0] - ends[1]) / (2 * delta)
    return float(slopes.mean()), float(slopes.std(ddof=1) / len(slopes) ** 0.5)


@dataclass(frozen=True)
class Job:
    """One arm with one seed."""

    arm: str
    seed: int
    fast: bool
    runs: Path
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the run's folder."""
        return f"reproduce-amft-{self.arm.replace(' ', '-')}{'-fast' if self.fast else ''}-{self.seed}"

    @property
    def world(self) -> Path:
        """The folder of the files and the base."""
        return self.runs / "reproduce-amft-world"

    def overrides(self) -> list[str]:
        """What this run has different from the recipe."""
        options = {
            "demonstrations": {
                "jsonl": str(self.world / "demonstrations.jsonl"),
                "columns": {"completion": "completion"},
            },
            "held_out": {
                "data": {"jsonl": str(self.world / "held_out.jsonl")},
                "prompts": 4 if self.fast else 64,
                "group_size": 8,
            },
            "batch_size": 8 if self.fast else 64,
            "warmup_steps": 1 if self.fast else WARMUP,
            **({"first": 0} if self.fast else {}),
            **ARMS[self.arm],
        }
        if self.fast and "schedule" in options:
            options["schedule"] = {min(step, 2): mu for step, mu in options["schedule"].items()}
        method = f"reproductions.amft:{'Often' if self.fast else 'Watched'}"
        return [
            f"seed={self.seed}",
            f"model.path={self.world / f'base-{self.seed}'}",
            f"data.train.jsonl={self.world / 'train.jsonl'}",
            f"stages[0].policy.methods={json.dumps([{method: options}])}",
            *(FAST if self.fast else ()),
            *self.options,
        ]


def measure(seeds: Sequence[int], fast: bool) -> dict[str, Any]:
    """All arms on all seeds, `PROCESSES` at a time; with `fast` four arms, here. What is there is kept."""
    jobs = [Job(arm, seed, fast, common.RUNS) for seed in seeds for arm in (FAST_ARMS if fast else ARMS)]
    jobs[0].world.mkdir(parents=True, exist_ok=True)
    write_rows(jobs[0].world)
    for seed in seeds:
        make_base(jobs[0].world / f"base-{seed}", seed)
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
    """Run a job if that has not been done, and read its log."""
    common.RUNS = job.runs
    with (job.runs / f"{job.name}.log").open("a") as log, contextlib.redirect_stdout(log):
        torch.set_num_threads(1)
        folder = run(RECIPE, job.name, job.overrides())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {**read(lines), "seconds": summary(folder)["seconds"], "tokens": summary(folder)["tokens_sampled"]}


def read(lines: Sequence[Mapping[str, Any]]) -> Measured:
    """Curves, the accuracy at the end, and what brute force says, from the lines of a run's log."""
    found: Measured = {}
    for name in ("accuracy", "blind", "elsewhere"):
        key = f"amft/test/{name}"
        found[f"{name}, curve"] = [line[key] for line in lines if key in line]
        found[name] = statistics.mean(found[f"{name}, curve"][-LAST:])
    found["mu, curve"] = [line["amft/mu"] for line in lines][::EVERY]
    found["mu"] = lines[-1]["amft/mu"]
    checked = [line for line in lines if "amft/brute_force" in line and "amft/meta_gradient" in line]
    sure = [line for line in checked if abs(line["amft/brute_force"]) > 2 * line["amft/brute_force_error"]]
    agree = [(line["amft/brute_force"] > 0) == (line["amft/meta_gradient"] > 0) for line in sure]
    found["checked"], found["sure"] = len(checked), len(sure)
    found["agreement"] = statistics.mean(agree) if agree else float("nan")
    return found


def report(table: Mapping[str, Sequence[Measured]]) -> dict[str, Any]:
    """Arms and claims; a claim on arms that were not trained is left out."""

    def of(arm: str, key: str) -> list[float]:
        return [row[key] for row in table[arm]]

    def gap(one: str, other: str) -> list[float]:
        return [a - b for a, b in zip(of(one, "accuracy"), of(other, "accuracy"), strict=True)]

    def best(kind: str) -> str:
        return max(
            (arm for arm in table if arm.startswith(kind)),
            key=lambda arm: statistics.mean(of(arm, "accuracy")),
        )

    learned = [arm for arm in table if arm.startswith("amft ")]
    fixed, switch = best("fixed"), best("switch")
    agreement = [row["agreement"] for arm in learned for row in table[arm]]
    spread = [max(ends) - min(ends) for ends in zip(*(of(arm, "mu") for arm in learned), strict=True)]
    to_fixed, to_turned, to_switch = gap(MAIN, fixed), gap(MAIN, TURNED), gap(MAIN, switch)
    blind = of(MAIN, "blind")
    claims = [
        claim(
            "sign of the meta-gradient agrees with brute force beyond two standard errors",
            ">= 0.90",
            agreement,
            statistics.mean(agreement) >= 0.9,
        ),
        claim(f"mu at the end, range over {', '.join(learned)}", "<= 0.15", spread, max(spread) <= 0.15),
        claim(
            f"accuracy, {MAIN} minus {fixed}, the best fixed weight",
            ">= -0.03",
            to_fixed,
            statistics.mean(to_fixed) >= -0.03,
            interval=paired_interval(of(MAIN, "accuracy"), of(fixed, "accuracy")),
        ),
        claim(
            f"accuracy, {MAIN} minus {TURNED}",
            ">= 0.05",
            to_turned,
            statistics.mean(to_turned) >= 0.05,
            interval=paired_interval(of(MAIN, "accuracy"), of(TURNED, "accuracy")),
        ),
        claim(f"accuracy of {MAIN} in the blind spot", "> 0.5", blind, statistics.mean(blind) > 0.5),
    ]
    if "imitation" in table:
        own = of("imitation", "blind")
        claims.append(
            claim("accuracy of imitation in the blind spot", "<= 0.3", own, statistics.mean(own) <= 0.3)
        )
    return {
        "budgets": {arm: of(arm, "tokens") for arm in table},
        "seconds": {arm: of(arm, "seconds") for arm in table},
        "arms": {
            arm: {key: of(arm, key) for key in rows[0] if key not in ("tokens", "seconds")}
            for arm, rows in table.items()
        },
        "regret": {
            f"of {MAIN} to {fixed}": [-value for value in to_fixed],
            f"of {MAIN} to {switch}": [-value for value in to_switch],
        },
        "claims": claims,
    }
