"""SOAR on recipes/tiny/soar.yaml: gates on the base model, then a grounded and an intrinsic teacher and
direct RL.

The base model is trained from nothing, with less width than the tiny reasoner, and shared by all seeds.
Before anything else it has to pass six gates: the mechanism in miniature. Then, for each seed: SOAR, the
intrinsic teacher, RL on the hard problems alone with as many completions as SOAR's students had, and fresh
students of the base model trained on what the teachers wrote. All are measured on hard problems that nobody
was trained or rewarded on.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from reproductions import common
from reproductions.common import ROOT, claim, model_of, run, summary
from reproductions.pages.soar import page
from reproductions.tiny_models import save_blank

from posttrain.data.sources import load_examples
from posttrain.data.string_machine import Item, is_right, read_question
from posttrain.data.tasks import make_task
from posttrain.evaluation.metrics import estimate, pass_at_k_values
from posttrain.recipe.load import load_recipe
from posttrain.recipe.schema import DataSource, ModelConfig, SoarStage
from posttrain.rewards.scorer import Scorer
from posttrain.rollout.build import load_model, load_tokenizer
from posttrain.rollout.transformers import TransformersEngine
from posttrain.rollout.types import Example, derive_seed
from posttrain.soar.learner import Forward, optimizer_settings
from posttrain.soar.proposals import Question, Unreadable, parse_proposal
from posttrain.soar.snapshots import SharedModel
from posttrain.soar.student import Asked, Students, Workbench

SEEDS = (0, 1, 2)
PROCESSES = 2
"""Jobs at a time; each computes in one thread."""
RECIPE = ROOT / "recipes" / "tiny" / "soar.yaml"
BASE, TRAINING = slice(0, 4), slice(4, 5)
"""Stages of the recipe: base model, hard subset and its evaluation; then SOAR."""
KS = (1, 4, 8, 32)
FRESH_QUESTIONS, FRESH_STEPS = 64, 20
LAST = 5
"""Outer steps at the end whose proposals are what a teacher has come to."""
ORACLE = (2, 3)
"""Operations of the questions that ought to help."""
FAST = (
    # Proposals alone, of which a few dozen steps make some readable.
    "stages[0].sft.data.size=16",
    "stages[0].sft.batch_size=4",
    "stages[0].sft.max_steps=1",
    "stages[1].sft.data.args.mode=teacher",
    "stages[1].sft.max_steps=80",
    "stages[1].sft.batch_size=16",
    "stages[1].sft.data.size=1280",
    "stages[1].sft.optimizer.warmup_steps=5",
    "data.train.size=8",
    "stages[2].hard_subset.samples=2",
    "stages[2].hard_subset.first=2",
    "stages[3].evaluate.samples=2",
    "stages[3].evaluate.metrics=[pass@1]",
    "stages[4].soar.steps=1",
    "stages[4].soar.promotion.threshold=-2",
    "stages[4].soar.promotion.window=1",
    "stages[4].soar.datasets=2",
    "stages[4].soar.questions=2",
    "stages[4].soar.students=1",
    "stages[4].soar.reward_questions=2",
    "stages[4].soar.reward_samples=1",
    "stages[4].soar.student.steps=1",
    "stages[4].soar.student.max_steps=1",
    "stages[4].soar.student.prompts_per_step=2",
    "stages[4].soar.student.group_size=2",
    "stages[4].soar.teacher.max_draws=100",
)

Measured = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A run: the base model without a seed, else a teacher or a comparison of it."""

    arm: str
    fast: bool
    seed: int | None = None
    runs: Path = Path("runs")

    @property
    def name(self) -> str:
        """Of the run's folder."""
        seed = "" if self.seed is None else f"-{self.seed}"
        return f"reproduce-soar-{self.arm.replace(' ', '-')}{'-fast' if self.fast else ''}{seed}"

    @property
    def folder(self) -> Path:
        """Of the run, and of what is measured of it."""
        return self.runs / self.name

    def other(self, arm: str, shared: bool = False) -> Job:
        """The job of another arm of this seed, or of all seeds."""
        return Job(arm, self.fast, None if shared else self.seed, self.runs)


def measure(seeds: Sequence[int], fast: bool) -> dict[str, Any]:
    """All arms on all seeds, `PROCESSES` at a time, and the page; with `fast` everything here."""
    base = Job("base", fast, runs=common.RUNS)
    rounds = [["soar", "intrinsic"], ["hard only", "fresh"]]
    if fast:
        found = [do(base)]
        table = {
            arm: [do(Job(arm, fast, seed, common.RUNS)) for seed in seeds] for arms in rounds for arm in arms
        }
    else:
        with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(do, [base]))
            table = {}
            for arms in rounds:
                jobs = [Job(arm, fast, seed, common.RUNS) for arm in arms for seed in seeds]
                for job, measured in zip(jobs, pool.map(do, jobs), strict=True):
                    table.setdefault(job.arm, []).append(measured)
    result = report(found[0], table)
    (common.RUNS / "soar-fast.html" if fast else ROOT / "results" / "soar.html").write_text(page(result))
    return result


def do(job: Job) -> Measured:
    """Run a job if that has not been done, and measure it."""
    common.RUNS = job.runs
    job.runs.mkdir(parents=True, exist_ok=True)
    path = job.folder / "measured.json"
    if path.is_file():
        kept: Measured = json.loads(path.read_text())
        return kept
    work = {
        "base": base_model,
        "soar": teacher_run,
        "intrinsic": teacher_run,
        "hard only": hard_only,
        "fresh": fresh,
    }
    with (job.runs / f"{job.name}.log").open("a") as log, contextlib.redirect_stdout(log):
        torch.set_num_threads(1)
        measured = work[job.arm](job)
    job.folder.mkdir(exist_ok=True)
    path.write_text(json.dumps(measured, indent=2) + "\n")
    return measured


# --- runs -------------------------------------------------------------------------------------------------


def base_model(job: Job) -> Measured:
    """Train the base model, find its hard subset, check the gates."""
    blank = save_blank(job.runs / f"{job.name}-untrained")
    overrides = [f"model.path={blank}", *(FAST if job.fast else ())]
    if job.fast:  # whatever the model happens to know
        overrides += ["stages[2].hard_subset.correct.threshold=2"]
    folder = run(RECIPE, job.name, overrides, BASE)
    return {**gates(Lab(job)), "seconds": summary(folder)["seconds"]}


def teacher_run(job: Job) -> Measured:
    """SOAR, or the same outer loop with the intrinsic reward; what the student can do, what the teacher
    writes."""
    rows = json.dumps({"parquet": str(hard_rows(job, "train")), "format": "text"})
    overrides = [
        f"seed={job.seed}",
        f"model.path={model_of(job.other('base', shared=True).folder)}",
        *(FAST if job.fast else ()),
        f"stages[4].soar.data={rows}",
    ]
    if job.arm == "intrinsic":
        overrides += ["stages[4].soar.reward=learnability", "stages[4].soar.promotion.enabled=false"]
    folder = run(RECIPE, job.name, overrides, TRAINING)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = json.loads((folder / "state.json").read_text())["stages"][-1]["summary"]["soar"]
    measured = {**found, "seconds": summary(folder)["seconds"], **written(folder, job)}
    keys = (
        "reward",
        "reward/moving_average",
        "promotion",
        "baseline/accuracy",
        "teacher/readable",
        "teacher/unique",
    )
    measured["curves"] = {key: [line.get(key) for line in lines] for key in keys}
    if job.arm == "soar":
        measured |= Lab(job, model_of(folder)).hard_metrics()
    return measured


def hard_only(job: Job) -> Measured:
    """RL on the hard problems alone, with as many completions as SOAR's students had."""
    theirs = do(job.other("soar"))
    lab = Lab(job)
    inner = lab.stage.student
    updates = max(round(theirs["student_completions"] / (inner.prompts_per_step * inner.group_size)), 1)
    spent = lab.students.train(lab.start, lab.hard("train"), updates, derive_seed(job.seed, "hard only"))
    return {
        "updates": spent.updates,
        "completions": spent.completions,
        "tokens": spent.sampled,
    } | lab.hard_metrics()


def fresh(job: Job) -> Measured:
    """Students of the base model trained on what the teachers wrote, equally many steps each."""
    lab = Lab(job)
    rng = np.random.default_rng(derive_seed(job.seed, "fresh"))
    kept = pq.read_table(job.other("soar").folder / "data/01-soar/rows.parquet").to_pylist()
    promoted = [Question(row["prompt"], row["answer"]) for row in kept]
    right = [
        question for question in promoted if (item := item_of(question)) and is_right(item, question.answer)
    ]
    sets = {
        "promotion questions": promoted,
        "promotion questions, right answers": right,
        "grounded teacher": proposals(job.other("soar").folder, lab.stage, LAST),
        "intrinsic teacher": proposals(job.other("intrinsic").folder, lab.stage, LAST),
        "base teacher": proposals(job.other("soar").folder, lab.stage, None),
        "oracle": oracle(FRESH_QUESTIONS, int(rng.integers(2**31))),
    }
    measured: Measured = {"questions": {name: len(questions) for name, questions in sets.items()}}
    for name, questions in sets.items():
        if not questions:
            continue
        order = rng.permutation(len(questions))[:FRESH_QUESTIONS]
        asked = [lab.ask(f"{name} {index}", questions[index]) for index in order]
        lab.students.train(lab.start, asked, 1 if job.fast else FRESH_STEPS, derive_seed(job.seed, name))
        measured[name] = lab.hard_metrics()
    return measured


# --- what is measured -------------------------------------------------------------------------------------


class Lab:
    """A model with everything that trains and measures it; `start` are its weights."""

    def __init__(self, job: Job, path: str | None = None):
        self.job = job
        base = job.other("base", shared=True).folder
        recipe = load_recipe(RECIPE, [f"name={job.name}", *(FAST if job.fast else ())]).recipe
        self.stage: SoarStage = recipe.stages[TRAINING.start].config
        config = ModelConfig(path=path or model_of(base))
        self.tokenizer = load_tokenizer(config)
        model = load_model(config)
        rollout = recipe.rollout
        forward = Forward(
            model,
            torch.float32,
            temperature=rollout.temperature,
            micro_batch_tokens=self.stage.micro_batch_tokens,
        )
        shared = SharedModel(model)
        self.start = shared.capture()
        engine = TransformersEngine(model, self.tokenizer, batch_size=rollout.batch_size)
        self.students = Students(
            Workbench(shared, engine, forward),
            stage=self.stage.inner(),
            arguments=optimizer_settings(self.stage.student.optimizer, str(job.runs)),
            rollout=rollout,
            rewards=recipe.reward_options,
            scorer=Scorer(recipe.rewards, recipe.reward_options),
            correct=self.stage.correct,
            references=None,
            tokenizer=self.tokenizer,
        )

    def ask(self, name: str, question: Question) -> Asked:
        """A question as students see it."""
        example = Example(name, question.question, question.answer)
        return example, tuple(self.tokenizer(question.question)["input_ids"])

    def hard(self, split: str) -> list[Asked]:
        """Hard problems that students may train on (`train`), or that nobody has seen."""
        source = DataSource(parquet=str(hard_rows(self.job, split)), shuffle=False)
        questions = [Question(str(example.prompt), str(example.answer)) for example in load_examples(source)]
        return [self.ask(f"hard {split} {index}", question) for index, question in enumerate(questions)]

    def hard_metrics(self) -> Measured:
        """pass@k on the unseen hard problems."""
        problems, samples = self.hard("test"), 2 if self.job.fast else max(KS)
        rollouts, _ = self.students.answers(problems, samples, derive_seed("hard metrics"))
        correct = [[self.students.is_correct(r) for r in rollouts[i : i + samples]]
                   for i in range(0, len(rollouts), samples)]  # fmt: skip
        found = {k: estimate(pass_at_k_values(correct, k)) for k in KS if k <= samples}
        return {f"pass@{k}": value.value for k, value in found.items()} | {
            "pass@1 interval": [found[1].low, found[1].high]
        }

    def accuracy(self, problems: Sequence[Asked], samples: int) -> float:
        """Share of right answers."""
        return self.students.accuracy(problems, samples, derive_seed("gates"))[0]


def gates(lab: Lab) -> Measured:
    """What has to hold of the base model for the demonstration to mean anything (G1 to G6)."""
    count, samples = (4, 2) if lab.job.fast else (128, 32)
    rows = make_task("string_machine", size=count, seed=9, split="test", mode="worked", min_operations=6)
    worked = [lab.ask(f"W{i}", Question(str(row.prompt), str(row.answer))) for i, row in enumerate(rows)]
    measured: Measured = {"G1 worked, 6 operations": lab.accuracy(worked, 0)}
    for k in (1, 2, 3):
        measured[f"G2 exam, {k} operations"] = lab.accuracy(exam(lab, k, count), samples)
    measured |= {f"base {name}": value for name, value in lab.hard_metrics().items()}
    example = Example("teacher", lab.stage.teacher.prompt)
    texts = sample_text(lab, (example, tuple(lab.tokenizer(example.prompt)["input_ids"])), 4 * count)
    questions = [question for text in texts if (question := readable(text, lab.stage)) is not None]
    useful = [q for q in questions if (item := item_of(q)) and len(item.operations) in (2, 3, 4)
              and item.header == "Q" and is_right(item, q.answer)]  # fmt: skip
    measured["G4 readable"] = len(questions) / len(texts)
    measured["G4 useful"] = len(useful) / max(len(questions), 1)
    good = [lab.ask(f"oracle {i}", question) for i, question in enumerate(oracle(FRESH_QUESTIONS, 7))]
    hard = lab.hard("train")
    for name, asked, steps in (("G5 oracle lift", good, 20), ("G6 hard only", hard, 100)):
        lab.students.train(lab.start, asked, 1 if lab.job.fast else steps, derive_seed(name))
        measured[name] = lab.accuracy(lab.hard("test"), samples)
    return measured


def exam(lab: Lab, operations: int, count: int) -> list[Asked]:
    """Held-out exam questions of one length."""
    arguments = {"min_operations": operations, "max_operations": operations}
    rows = make_task("string_machine", size=count, seed=9, split="test", **arguments)
    return [lab.ask(f"{operations}.{i}", Question(str(r.prompt), str(r.answer))) for i, r in enumerate(rows)]


def oracle(count: int, seed: int) -> list[Question]:
    """Questions of two and three operations with right answers."""
    arguments = {"min_operations": ORACLE[0], "max_operations": ORACLE[1]}
    rows = make_task("string_machine", size=count, seed=seed, split="train", **arguments)
    return [Question(str(row.prompt), str(row.answer)) for row in rows]


def sample_text(lab: Lab, prompt: Asked, count: int) -> list[str]:
    """Completions of a prompt under the weights of now."""
    rollouts, _ = lab.students.answers([prompt], count, derive_seed("texts"))
    return [rollout.completion.text for rollout in rollouts]


def readable(text: str, stage: SoarStage) -> Question | None:
    """The question in a proposal, if there is one."""
    try:
        return parse_proposal(text, stage.teacher.format)
    except Unreadable:
        return None


def item_of(question: Question) -> Item | None:
    """The machine's item that a question is, if it is one."""
    return read_question(question.question)


def hard_rows(job: Job, split: str) -> Path:
    """The file of a half of the hard subset."""
    folder = job.other("base", shared=True).folder / "data" / "03-hard_subset"
    return folder / ("rows.parquet" if split == "train" else f"rows-{split}.parquet")


def accepted(folder: Path) -> Iterator[tuple[int, list[str]]]:
    """The proposals that a run has used, by outer step."""
    for path in sorted((folder / "rollouts" / "01-soar").glob("step-*.parquet")):
        rows = pq.read_table(path, columns=["step", "completion", "status"]).to_pylist()
        yield rows[0]["step"], [row["completion"] for row in rows if not row["status"].startswith("refused")]


def proposals(folder: Path, stage: SoarStage, last: int | None) -> list[Question]:
    """What a teacher wrote in its last outer steps, or, with None, in its first: the untrained one."""
    steps = [texts for _, texts in accepted(folder)]
    chosen = steps[:1] if last is None else steps[-last:]
    return [question for texts in chosen for text in texts if (question := readable(text, stage)) is not None]


def cell(question: Question) -> str:
    """What kind of question it is: header and length, or `other`."""
    item = item_of(question)
    return "other" if item is None else f"{item.header}{len(item.operations)}"


def entropy(cells: Sequence[str]) -> float:
    """Of the kinds of questions, in nats."""
    counts = np.array(list(Counter(cells).values()), dtype=np.float64)
    shares = counts / max(counts.sum(), 1)
    return float(-(shares * np.log(shares)).sum()) if len(counts) else 0.0


def written(folder: Path, job: Job) -> Measured:
    """Kinds of questions in every outer step, their entropy at the end, and what the promotion questions
    are."""
    stage = load_recipe(RECIPE, [f"name={job.name}"]).recipe.stages[TRAINING.start].config
    kinds = [[cell(q) for text in texts if (q := readable(text, stage))] for _, texts in accepted(folder)]
    kept = pq.read_table(folder / "data/01-soar/rows.parquet").to_pylist()
    questions = [Question(row["prompt"], row["answer"]) for row in kept]
    useful = [(i, q) for q in questions if (i := item_of(q)) and i.header == "Q" and i.operations]
    wrong = [not is_right(item, question.answer) for item, question in useful]
    return {
        "kinds": [dict(sorted(Counter(cells).items())) for cells in kinds],
        "entropy": entropy([kind for cells in kinds[-LAST:] for kind in cells]),
        "useful promotion questions": len(useful),
        "wrong among useful": statistics.mean(wrong) if wrong else math.nan,
    }


# --- claims -----------------------------------------------------------------------------------------------

GATES: dict[str, tuple[str, str, Callable[[float], bool]]] = {
    "G1 worked, 6 operations": (
        "worked problems of 6 operations solved, greedy",
        ">= 0.9",
        lambda x: x >= 0.9,
    ),
    "G2 exam, 1 operations": ("exams of 1 operation solved", "0.1 to 0.4", lambda x: 0.1 <= x <= 0.4),
    "G2 exam, 2 operations": ("exams of 2 operations solved", "0.02 to 0.08", lambda x: 0.02 <= x <= 0.08),
    "G2 exam, 3 operations": (
        "exams of 3 operations solved",
        "0.004 to 0.016",
        lambda x: 0.004 <= x <= 0.016,
    ),
    "base pass@1": ("G3 hard problems solved by the base model", "< 0.002", lambda x: x < 0.002),
    "G4 readable": ("proposals that can be read", ">= 0.8", lambda x: x >= 0.8),
    "G4 useful": ("of these of 2 to 4 operations with a right answer", ">= 0.1", lambda x: x >= 0.1),
    "G5 oracle lift": (
        "hard problems solved after 20 steps on right questions",
        "> 0.02",
        lambda x: x > 0.02,
    ),
    "G6 hard only": ("hard problems solved after 100 steps on hard ones", "< 0.01", lambda x: x < 0.01),
}


def report(base: Measured, table: Mapping[str, Sequence[Measured]]) -> dict[str, Any]:
    """Arms and claims. What cannot be measured, as without a promotion, is a claim that does not hold."""
    claims = []
    for key, (what, goal, holds) in GATES.items():
        name = what if what.startswith("G") else f"{key[:2]} {what}"
        claims.append(claim(name, goal, [base[key]], holds(base[key])))

    def of(arm: str, key: str) -> list[float]:
        return [row[key] for row in table[arm]]

    direct, promoted = of("hard only", "pass@1"), of("soar", "pass@1")
    claims.append(
        claim("hard pass@1, hard-only RL with as many completions", "<= 0.01", direct, max(direct) <= 0.01)
    )
    claims.append(claim("hard pass@1, promoted student", ">= 0.05", promoted, min(promoted) >= 0.05))
    ratios = [ours / max(theirs, 1e-4) for ours, theirs in zip(promoted, direct, strict=True)]
    claims.append(claim("hard pass@1, promoted student / hard-only RL", ">= 5", ratios, min(ratios) >= 5))
    none = {"pass@1": 0.0}
    gains = [
        row.get("promotion questions", none)["pass@1"] - row.get("base teacher", none)["pass@1"]
        for row in table["fresh"]
    ]
    name = "hard pass@1 of a fresh student, promotion questions minus the base teacher's"
    claims.append(claim(name, "> 0", gains, min(gains) > 0))
    gaps = [a - b for a, b in zip(of("soar", "entropy"), of("intrinsic", "entropy"), strict=True)]
    claims.append(
        claim(
            "entropy of the teacher's kinds of questions, grounded minus intrinsic",
            "> 0",
            gaps,
            min(gaps) > 0,
        )
    )
    wrong = [value for value in of("soar", "wrong among useful") if not math.isnan(value)] or [0.0]
    holds = statistics.mean(wrong) >= 0.1
    claims.append(claim("share of wrong answers among useful promotion questions", ">= 0.1", wrong, holds))
    return {
        "budgets": {
            "soar": of("soar", "student_completions"),
            "intrinsic": of("intrinsic", "student_completions"),
            "hard only": of("hard only", "completions"),
        },
        "seconds": {arm: of(arm, "seconds") for arm in ("soar", "intrinsic")} | {"base": base["seconds"]},
        "arms": {"base": base, **table},
        "claims": claims,
    }
