"""The world of MEL's reproduction, where every part of a meta-experience has a ground truth, and its base.

A problem `Qc123` has a category c and operands mod 5; a solution `xc+3yc*4` picks a rule for c at step x,
computes, and does so again at step y. Which rules are right for a category is what nobody tells. A
meta-experience `PxK-xc+` says that at step x rule - was wrong, and that c takes + there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reproductions.tiny_models import blank_model, character_tokenizer
from torch.nn import functional
from transformers import Qwen2Tokenizer

from posttrain.data.experiences import analysis_example, query_example, replay_example
from posttrain.recipe.mel_schema import ExperienceFormat
from posttrain.rollout.types import Example, Rollout, derive_seed

CATEGORIES, RULES, STEPS, MODULUS = "abcdef", "+-*", "xy", 5
FORMAT = ExperienceFormat(
    analysis="I{problem}W{wrong}C{right}M",
    replay="H{experience}{problem}",
    query="I{problem}M",
    sections=["P", "K"],
)
SOLUTION_TOKENS, EXPERIENCE_TOKENS = 9, 8
"""With the end token."""
BASE_STEPS, BASE_ROWS = 4000, 32
OBEDIENCE, SPOILT = 0.95, 0.3
"""Of the base's rows: hints that are followed, and analyses whose right rule is replaced by any."""


def make_truth() -> dict[str, dict[str, str]]:
    """The right rule of every category at each step."""
    rng = np.random.default_rng(123)
    return {step: {c: RULES[int(rng.integers(3))] for c in CATEGORIES} for step in STEPS}


TRUTH = make_truth()


def compute(rule: str, a: int, b: int) -> int:
    """One step."""
    return {"+": a + b, "-": a - b, "*": a * b}[rule] % MODULUS


def write_solution(problem: str, first: str, second: str) -> str:
    """The solution of a problem by two rules, right or wrong."""
    category, (a, b, e) = problem[1], map(int, problem[2:])
    between = compute(first, a, b)
    return f"x{category}{first}{between}y{category}{second}{compute(second, between, e)}"


def computes(text: str, problem: str) -> bool:
    """Whether a solution does what its own rules say, right or wrong."""
    rules = text[2:3], text[6:7]
    return set(rules) <= set(RULES) and text == write_solution(problem, *rules)


def write_experience(step: str, wrong: str, category: str, right: str) -> str:
    """At `step` the rule `wrong` was wrong; the category takes `right` there."""
    return f"P{step}K{wrong}{step}{category}{right}"


def is_true(text: str, example: Example) -> bool:
    """Whether a meta-experience names the right rule for the problem's category at its step."""
    found = re.fullmatch(r"P([xy])K[-+*]([xy])([a-f])([-+*])", text)
    return found is not None and found[3] == example.prompt[1] and TRUTH[found[2]][found[3]] == found[4]


def all_problems() -> list[Example]:
    """Every problem once, in an order that is the same for all."""
    questions = [f"Q{c}{n // 25}{n // 5 % 5}{n % 5}" for c in CATEGORIES for n in range(MODULUS**3)]
    order = np.random.default_rng(7).permutation(len(questions))
    return [Example(questions[i], questions[i], answer_of(questions[i])) for i in order]


def answer_of(problem: str) -> str:
    """What the right rules give."""
    return write_solution(problem, TRUTH["x"][problem[1]], TRUTH["y"][problem[1]])[-1]


def score(rollouts: Sequence[Rollout]) -> None:
    """Right is a solution of the right length whose last digit is the answer."""
    for rollout in rollouts:
        text, answer = rollout.completion.text, rollout.request.example.answer
        rollout.reward = float(len(text) == SOLUTION_TOKENS - 1 and text[-1] == answer)
        rollout.rewards, rollout.reward_errors = {"right": rollout.reward}, {}


def base_rows(kind: str, count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Rows of one kind, prompts and completions of equal lengths: `solve`, `obey`, `analyse` or `recall`."""
    return [base_row(kind, rng) for _ in range(count)]


def base_row(kind: str, rng: np.random.Generator) -> tuple[str, str]:
    """A prompt and its completion; rules are drawn, so that none of it says which are right."""

    def pick(choices: str) -> str:
        return choices[int(rng.integers(len(choices)))]

    category = pick(CATEGORIES)
    problem = f"Q{category}" + "".join(str(int(n)) for n in rng.integers(0, MODULUS, 3))
    example = Example("", problem)
    rules = {step: pick(RULES) for step in STEPS}
    step, hinted = pick(STEPS), pick(RULES)
    match kind:
        case "solve":
            return problem, write_solution(problem, rules["x"], rules["y"])
        case "obey":
            if rng.random() < OBEDIENCE:
                rules[step] = hinted
            hint = write_experience(step, pick(RULES), category, hinted)
            asked = replay_example(example, hint, FORMAT).prompt
            return str(asked), write_solution(problem, rules["x"], rules["y"])
        case "analyse":
            same = rng.random() < 0.5
            other = {"x": rules["x"] if same else pick(RULES.replace(rules["x"], ""))}
            other["y"] = pick(RULES.replace(rules["y"], "") if same else RULES)
            step = "y" if same else "x"
            right = pick(RULES) if rng.random() < SPOILT else other[step]
            texts = [write_solution(problem, own["x"], own["y"]) for own in (rules, other)]
            asked = analysis_example(example, texts[0], texts[1], FORMAT).prompt
            return str(asked), write_experience(step, rules[step], category, right)
        case _:
            return str(query_example(example, FORMAT).prompt), write_experience(
                step, pick(RULES), category, hinted
            )


def make_tokenizer() -> Qwen2Tokenizer:
    """One token for each character that the world is written in."""
    return character_tokenizer("01234" + CATEGORIES + RULES + STEPS + "QIWCMPKH")


def make_base(folder: Path, fast: bool) -> None:
    """Train the base from scratch on four kinds of rows, and save it."""
    tokenizer, rng = make_tokenizer(), np.random.default_rng(derive_seed("mel", "base"))
    shape = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
    model = blank_model(tokenizer, **shape, num_attention_heads=2, max_position_embeddings=64)
    steps = 3 if fast else BASE_STEPS
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / 60) * (0.05 + 0.95 * (1 - step / steps))
    )
    for _ in range(steps):
        for kind in ("solve", "obey", "analyse", "recall"):
            rows = base_rows(kind, 4 if fast else BASE_ROWS, rng)
            ids = [tokenizer([text for text, _ in rows])["input_ids"], answers_of(rows, tokenizer)]
            prompts, answers = map(torch.tensor, ids)
            logits = model(torch.cat([prompts, answers], 1)[:, :-1]).logits[:, prompts.shape[1] - 1 :]
            (functional.cross_entropy(logits.flatten(0, 1), answers.flatten()) / 4).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def answers_of(rows: Sequence[tuple[str, str]], tokenizer: Any) -> list[list[int]]:
    """Token ids of the completions, ended."""
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer([text for _, text in rows])["input_ids"]]
