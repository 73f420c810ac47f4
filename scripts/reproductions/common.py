"""What the reproductions share: runs that are not repeated, claims, differences over seeds.

A reproduction is a module beside this one with

    SEEDS                      the seeds it takes unless told otherwise
    measure(seeds, fast)       a dictionary for results/NAME.json with at least `arms` and `claims`

`fast` asks for the smallest run that goes through all the code: its numbers mean nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.recipe.load import dump_recipe, load_recipe
from posttrain.recipe.run import resume_run, run_recipe
from posttrain.recipe.run_state import RunState

ROOT = Path(__file__).resolve().parents[2]
RUNS = Path("runs")
"""Where the runs are kept; those that are there are not repeated."""

ALL = slice(None)

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""0.975 quantiles of Student's t with 1, 2, … degrees of freedom."""


def run(recipe: Path, name: str, overrides: Sequence[str] = (), stages: slice = ALL) -> Path:
    """The folder of a finished run of a recipe, or of a part of its stages.

    A run of this name with the same values that is finished is kept, one that is not is gone on with, and any
    other is replaced. Values are equal only if the weights are in the folders that they name: their hashes
    are added to the description of the recipe.
    """
    loaded = load_recipe(recipe, [*overrides, f"name={name}", f"output_dir={RUNS}"])
    part = loaded.recipe.model_copy(update={"stages": loaded.recipe.stages[stages]})
    about = " ".join([part.description, *weights_named(part.model_dump(mode="json"))])
    loaded = replace(loaded, recipe=part.model_copy(update={"description": about.strip()}))
    folder = RUNS / name
    written = folder / "recipe.yaml"
    if not written.is_file() or written.read_text() != dump_recipe(loaded.recipe):
        return run_recipe(loaded, overwrite=True)
    if not RunState.read(folder).finished:
        return resume_run(loaded, folder)
    return folder


def weights_named(values: Any) -> list[str]:
    """What is in the folders with weights among a recipe's values: `Weights of data/model: sha256:0123….`"""
    found = {text: _weight_files(text) for text in _texts(values)}
    return [f"Weights of {name}: sha256:{_hash(found[name])}." for name in sorted(found) if found[name]]


def _weight_files(text: str) -> list[Path]:
    try:
        return sorted(Path(text).glob("*.safetensors"))
    except (OSError, ValueError):  # a text that cannot be a path
        return []


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _hash(paths: Sequence[Path]) -> str:
    """Of files one after the other, cut to 16 digits."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def summary(folder: Path) -> dict[str, Any]:
    """`summary.json` of a finished run."""
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return content


def model_of(folder: Path) -> str:
    """The model that a finished run has trained."""
    return RunState.read(folder).stages[-1].model.path


def metric(folder: Path, stage: int, name: str) -> float:
    """The value of a metric in a run's evaluation number `stage`, which may be negative."""
    return float(summary(folder)["evaluations"][stage]["metrics"][name]["value"])


def tokens_by_step(folder: Path) -> dict[int, float]:
    """What a run's training had sampled after each of its steps, the methods' follow-ups included."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "tokens/sampled" in line]
    return dict(
        zip(
            [line["step"] for line in trained],
            itertools.accumulate(line["tokens/sampled"] for line in trained),
            strict=True,
        )
    )


@dataclass(frozen=True)
class Saved:
    """A model that a run saved: while it trained, when it had sampled so many tokens, or at its end."""

    model: Path
    tokens: float
    is_last: bool


def saved_at(folder: Path, tokens: float) -> Saved:
    """The model of a run that was saved nearest to when it had sampled so many tokens."""
    spent = tokens_by_step(folder)
    last = max(spent)
    found = {int(path.name.removeprefix("step-")): path for path in (folder / "checkpoints").glob("*/step-*")}
    found[last] = Path(model_of(folder))
    step = min(found, key=lambda step: (abs(spent[step] - tokens), -step))
    return Saved(found[step], spent[step], step == last)


def at_equal_tokens(folders: Sequence[Path]) -> list[Saved]:
    """A model of each of several runs, when it had sampled as much as the run that sampled the least."""
    least = min(max(tokens_by_step(folder).values()) for folder in folders)
    return [saved_at(folder, least) for folder in folders]


def claim(
    name: str,
    goal: str,
    values: Sequence[float],
    holds: bool,
    *,
    interval: Sequence[float] | None = None,
    why: str | None = None,
) -> dict[str, Any]:
    """A claim over seeds: the mean, and an interval that is the range over seeds unless it is given.

    `why` is for a claim that does not hold.
    """
    low, high = interval or (min(values), max(values))
    made = {
        "name": name,
        "goal": goal,
        "measured": round(statistics.mean(values), 4),
        "interval": [round(low, 4), round(high, 4)],
        "interval_kind": "range over seeds" if interval is None else "95 %, Student's t over seeds",
        "holds": holds,
    }
    return made if holds or why is None else {**made, "why": why}


def paired_interval(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean difference ours - theirs over seeds (Student's t); unbounded for one seed."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, count = statistics.mean(differences), len(differences)
    if count < 2:
        return float("-inf"), float("inf")
    quantile = T_975[count - 2] if count - 2 < len(T_975) else 1.96
    half = quantile * statistics.stdev(differences) / count**0.5
    return mean - half, mean + half
