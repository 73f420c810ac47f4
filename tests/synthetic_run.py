"""A run folder as a run writes it, made up but deterministic."""

import json
import math
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE

from posttrain.evaluation.metrics import estimate
from posttrain.evaluation.samples import group_by_problem, problem_values
from posttrain.training.record import write_rollouts

METRICS = ["pass@1", "pass@4", "maj@4", "greedy", "mean_length"]
RECIPE = """name: arithmetic
description: Warm-start on worked solutions, then GRPO on the answers.
seed: 7
model:
  path: data/tiny-reasoner
rewards:
- name: math_answer
- name: format
  weight: 0.1
stages:
- evaluate: {metrics: [pass@1, pass@4, maj@4, greedy, mean_length], samples: 4}
- policy: {steps: 60}
"""


def solve(rng, problem, skill, cap=90):
    """A question, a worked solution, its answer, and whether the solution reaches it."""
    a, b, c = np.random.default_rng(problem).integers(2, 90, size=3)
    right = rng.random() < skill
    total = int(a + b - c) + (0 if right else int(rng.integers(1, 9)))
    text = f"First {a} + {b} = {a + b}.\nThen {a + b} - {c} = {total}.\n#### {total}"
    if rng.random() < 0.4 * (1 - skill):
        text += "\nLet me check that again." * int(rng.integers(1, 4))
    return (
        f"What is {a} + {b} - {c}? Think step by step.\n",
        text[:cap],
        str(a + b - c),
        right,
        len(text) > cap,
    )


def rollout(rng, *, step, problem, index, skill, role="solution"):
    prompt, completion, answer, right, cut = solve(rng, problem, skill)
    tokens = len(completion)
    return {
        "step": step,
        "policy_version": step,
        "rollout_id": f"{problem}/{role}/{index}",
        "example_id": f"arithmetic-{problem}",
        "group": f"{problem}",
        "role": role,
        "index": index,
        "seed": 2**62 + problem * 100 + index,
        "prompt": prompt,
        "completion": completion,
        "answer": answer,
        "prompt_ids": [ord(c) % 128 for c in prompt],
        "completion_ids": [ord(c) % 128 for c in completion],
        "logprobs": (-rng.exponential(0.25, size=tokens) * (rng.random(tokens) < 0.3)).tolist(),
        "finish_reason": "length" if cut else "stop",
        "loss_mask": None,
        "reward": 1.1 * right if not cut else 0.1 * right,
        "reward/math_answer": float(right),
        "reward/format": float(not cut),
        "reward_errors": "{}",
        "correct": bool(right),
    }


def write_evaluation(run, stage, skill, problems, samples):
    rng = np.random.default_rng(len(stage) + int(100 * skill))
    rows = []
    for problem in range(problems):
        easy = np.random.default_rng(problem).beta(2, 2)
        chance = min(max(skill + easy - 0.5, 0.02), 0.98)
        rows += [rollout(rng, step=0, problem=problem, index=index, skill=chance) for index in range(samples)]
        rows.append(rollout(rng, step=0, problem=problem, index=0, skill=chance > 0.5, role="greedy"))
    write_rollouts(run / "rollouts" / stage / "samples.parquet", rows)
    for row in rows:
        row["length"] = len(row["completion_ids"])
    problems_of = list(group_by_problem(rows).values())
    return {
        "stage": stage,
        "problems": problems,
        "samples": samples,
        "unscored": 0,
        "metrics": {name: estimate(problem_values(name, problems_of)).to_dict() for name in METRICS},
    }


def write_step(run, stage, step, skill, prompts, group_size):
    rng = np.random.default_rng(step)
    rows = []
    for p in range(prompts):
        problem = 10_000 + step * prompts + p
        chance = 1.0 if p == 0 else skill
        group = [rollout(rng, step=step, problem=problem, index=i, skill=chance) for i in range(group_size)]
        if p == 1:
            group[-1]["reward"] = group[-1]["reward/math_answer"] = None
            group[-1]["reward_errors"] = json.dumps({"math_answer": "no result within 5 s"})
        scored = np.array([row["reward"] for row in group if row["reward"] is not None])
        for row in group:
            del row["correct"]
            if row["reward"] is None or scored.std() == 0:
                row["status"] = "dropped: unscored" if row["reward"] is None else "dropped: equal rewards"
                row["advantage/outcome"] = None
            else:
                row["status"] = "trained"
                gain = (row["reward"] - scored.mean()) / scored.std()
                row["advantage/outcome"] = [gain] * len(row["completion_ids"])
        rows += group
    write_rollouts(run / "rollouts" / stage / f"step-{step:06d}.parquet", rows)


def policy_line(rng, stage, step, steps):
    done = 1 - math.exp(-3 * step / steps)
    wobble = rng.normal(size=8)
    return {
        "stage": stage,
        "kind": "policy",
        "step": step,
        "time": 1790000000 + 4 * step,
        "loss": 0.01 * wobble[0],
        "grad_norm": "NaN" if step == 3 else abs(0.4 + 0.1 * wobble[1] - 0.2 * done),
        "learning_rate": 1e-4,
        "reward": 0.42 + 0.45 * done + 0.03 * wobble[2],
        "reward_std": 0.5 - 0.25 * done + 0.02 * wobble[3],
        "rewards/math_answer/mean": 0.38 + 0.42 * done + 0.03 * wobble[2],
        "rewards/format/mean": min(1.0, 0.8 + 0.18 * done + 0.01 * wobble[3]),
        "completions/mean_length": 84 - 20 * done + 2 * wobble[4],
        "completions/max_length": 90,
        "completions/truncated": max(0, 0.2 - 0.18 * done + 0.02 * wobble[5]),
        "groups/zero_variance": min(1, max(0, 0.1 + 0.35 * done + 0.05 * wobble[6])),
        "rewards/unscored": 0.004 if step % 9 == 0 else 0.0,
        "entropy": 0.6 - 0.35 * done + 0.02 * wobble[7],
        "kl": None,
        "ratio/clipped": 0.0,
        "sampling/logprob_difference": 2e-6 * abs(1 + 0.2 * wobble[0]),
        "sampling/importance_ratio": 1 + 1e-6 * wobble[1],
        "seconds/generate": 1.2,
        "tokens/sampled": 9000,
    }


def sft_line(rng, stage, step, steps):
    return {
        "stage": stage,
        "kind": "sft",
        "step": step,
        "time": 1789999000 + step,
        "loss": 0.35 + 2 * math.exp(-4 * step / steps) + 0.03 * rng.normal(),
        "learning_rate": 1e-3 * (1 - step / steps),
        "grad_norm": 0.5 + 0.1 * rng.random(),
        "mean_token_accuracy": 0.9 - 0.5 * math.exp(-4 * step / steps),
    }


def write_lines(run, lines):
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(run: Path, steps=6, problems=40, samples=4, prompts=4, group_size=4):
    """A whole run: supervised, evaluate, policy, evaluate."""
    run.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    (run / "recipe.yaml").write_text(RECIPE)
    lines = [sft_line(rng, "01-sft", step, 40) for step in range(10, 41, 10)]
    write_lines(run, lines + [policy_line(rng, "03-policy", step, steps) for step in range(1, steps + 1)])
    for step in range(1, steps + 1):
        write_step(
            run, "03-policy", step, 0.4 + 0.45 * (1 - math.exp(-3 * step / steps)), prompts, group_size
        )
    before = write_evaluation(run, "02-evaluate", 0.42, problems, samples)
    after = write_evaluation(run, "04-evaluate", 0.8, problems, samples)
    phases = {"generate": 70.0, "score": 12.5, "update": 90.0, "sync": 4.0}
    summary = {
        "name": "arithmetic",
        "seed": 7,
        "seconds": 263.4,
        "machine": "2 × CPU, 8 GiB",
        "versions": {"posttrain": "0.1.0", "torch": "2.13.0", "transformers": "5.19.0"},
        "accuracy_before": {"metric": "greedy", **before["metrics"]["greedy"]},
        "accuracy_after": {"metric": "greedy", **after["metrics"]["greedy"]},
        "evaluations": [before, after],
        "stages": [
            {"stage": "01-sft", "kind": "sft", "seconds": 41.0, "phases": {}},
            {
                "stage": "02-evaluate",
                "kind": "evaluate",
                "seconds": 18.2,
                "phases": {"generate": 15.0, "score": 3.0},
            },
            {"stage": "03-policy", "kind": "policy", "seconds": 185.0, "phases": phases},
            {
                "stage": "04-evaluate",
                "kind": "evaluate",
                "seconds": 19.2,
                "phases": {"generate": 16.0, "score": 3.0},
            },
        ],
        "tokens_sampled": 1_234_567,
        "tokens_trained": 987_654,
    }
    (run / "summary.json").write_text(json.dumps(summary))
    return run


FORKED = "05-policy"


def write_forks(run):
    """A further stage of one step: a group with forks and two channels, a sample drawn again, a learned text,
    and the run's tokenizer, in which a token is a character."""
    rng = np.random.default_rng(3)
    rows = [rollout(rng, step=1, problem=7, index=index, skill=index % 2) for index in range(3)]
    for row in rows:
        size = len(row["completion_ids"])
        row |= {"parent": None, "forked_at": None, "temperature": 1.0, "max_tokens": 96, "status": "trained"}
        row["advantage/outcome"] = [row["reward"] - 0.5] * size
        row["advantage/progress"] = [0.25 * (place > size // 2) for place in range(size)]
        row["channel_weights"] = json.dumps({"outcome": 1.0, "progress": 0.5})
        row["reward_versions"] = json.dumps({"math_answer": "1@0c5d", "format": "2@77aa"})
        del row["correct"]
    first = rows[0]
    for index, cut in enumerate((8, 8, 20)):
        forced = {
            "rollout_id": f"{first['rollout_id']}@{cut}/probe/{index % 2}",
            "role": "probe",
            "index": index % 2,
        }
        forced |= {"parent": first["rollout_id"], "forked_at": cut, "max_tokens": 8, "channel_weights": "{}"}
        forced |= {"prompt_ids": first["prompt_ids"] + first["completion_ids"][:cut], "reward": float(index)}
        forced |= {"prompt": first["prompt"] + first["completion"][:cut], "completion": f"#### {index}"}
        forced |= {"completion_ids": [ord(c) for c in f"#### {index}"], "logprobs": [-0.1] * 6}
        forced |= {"status": "unused: in no channel of the loss", "group": f"{first['rollout_id']}@{cut}"}
        rows.append({**first, **forced, "advantage/outcome": None, "advantage/progress": None})
    again = {
        "rollout_id": rows[1]["rollout_id"] + "/drawn-1",
        "status": "dropped: unscored: math_answer: timeout",
    }
    again |= {"reward": None, "advantage/outcome": None, "advantage/progress": None, "channel_weights": "{}"}
    rows.append({**rows[1], **again, "reward_errors": json.dumps({"math_answer": "timeout"})})
    write_rollouts(run / "rollouts" / FORKED / "step-000001.parquet", rows)
    learned = {key: rows[1][key] for key in ("prompt", "completion", "prompt_ids", "completion_ids")}
    learned |= {"step": 1, "rollout_id": "experience/1.0.0", "term": "experience", "weight": 0.5}
    learned |= {"token_weight": 0.125, "source": rows[1]["rollout_id"]}
    write_rollouts(run / "rollouts" / FORKED / "supervised-000001.parquet", [learned])
    model = Tokenizer(BPE({chr(i): i for i in range(128)}, []))
    model.decoder = Fuse()
    folder = run / "models" / FORKED
    folder.mkdir(parents=True)
    model.save(str(folder / "tokenizer.json"))
    return rows
