"""A tiny model that proposes questions which can be read, and the SOAR recipes that tests run it with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from helpers import make_tiny_model

from posttrain.recipe.schema import ModelConfig
from posttrain.rollout.build import load_model, load_tokenizer

LETTERS, DIGITS = "xyz", "0123456789"
FORMAT = {"question": ["{", "}"], "answer": ["(", ")"], "boxed": False}


def make_talker(folder: Path) -> Path:
    """A model that answers `x3:` with some digit, and `T:` with proposals such as `{x3:}(3)`."""
    make_tiny_model(folder)
    tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
    model, rng = load_model(ModelConfig(path=str(folder))), np.random.default_rng(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(50):
        pairs = []
        for _ in range(24):
            letter, digit, other = (
                rng.choice(list(LETTERS)),
                rng.choice(list(DIGITS)),
                rng.choice(list(DIGITS)),
            )
            question = f"{letter}{digit}:"
            pairs.append(("T:", f"{{{question}}}({digit})") if step % 2 else (question, str(other)))
        prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in pairs]
        completions = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for _, text in pairs]
        ids = torch.tensor([a + b for a, b in zip(prompts, completions, strict=True)])
        start = len(prompts[0])
        logits = model(input_ids=ids).logits[:, start - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, start:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def write_recipe(folder: Path, talker: Path, name: str = "run", model=None, before=(), **soar) -> Path:
    """A recipe of one SOAR stage, after the stages `before`; `soar` changes its section."""
    rows = [{"prompt": f"{letter}{digit}:", "answer": digit} for letter in LETTERS for digit in DIGITS[:6]]
    (folder / "hard.jsonl").write_text("\n".join(map(json.dumps, rows)))
    section = {
        "steps": 3,
        "datasets": 2,
        "questions": 3,
        "students": 2,
        "reward_questions": 6,
        "reward_samples": 2,
        "promotion": {"threshold": -2.0, "window": 2},
        "teacher": {
            "prompt": "T:",
            "max_tokens": 14,
            "format": FORMAT,
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
        },
        "student": {
            "steps": 2,
            "extra_steps": 1,
            "max_steps": 3,
            "prompts_per_step": 2,
            "group_size": 4,
            "optimizer": {"learning_rate": 1e-3},
        },
    }
    content = {
        "name": name,
        "output_dir": str(folder / "runs"),
        "model": {"path": str(talker), **(model or {})},
        "data": {"train": {"jsonl": str(folder / "hard.jsonl"), "format": "text"}},
        "rollout": {"max_tokens": 3},
        "rewards": ["exact_match"],
        "stages": [*before, {"soar": {**section, **soar}}],
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(content))
    return path
