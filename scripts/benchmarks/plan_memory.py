"""What `posttrain plan` says about memory, against what stages of the tiny recipes take.

OMP_NUM_THREADS=1 .venv/bin/python scripts/benchmarks/plan_memory.py     # writes results/plan_memory.json

A stage is run for two steps in a process of its own, which has been forked from one that has run other stages
already: whatever is loaded late is loaded. Measured is by how much the stage raises the peak of its anonymous
memory; the allocator is told to give back at once what is freed, so that this is the memory in use.

The plan is about the worst case, so policies are made to write to their cap, and no two the same: at a
temperature of 4, and without an end of sequence. `natural_mib` is the same stage as it is: completions end,
and what they have in common is computed once. Stages before it are left out, so a policy is the base.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import ROOT, Comparison, Settings, machine, show, write

from posttrain.methods.base import Method

MIB = 2**20
TOLERANCE = 0.15
STAGES = (
    ("quickstart", "grpo"),
    ("reward_model", "raw"),
    ("mel", "mel"),
    ("reward_model", "grpo"),
    ("quickstart", "warm-start"),
    ("hdpo", "cold-start"),
    ("hdpo", "hdpo"),
    ("masa", "masa"),
    ("mrt", "searches"),
    ("mrt", "mrt"),
    ("amft", "amft"),
)
"""Recipes and stages."""
FITTED = (
    ("quickstart", "grpo"),
    ("quickstart", "warm-start"),
    ("masa", "masa"),
    ("mrt", "searches"),
    ("mrt", "mrt"),
)
"""What the formulas were fitted to; the others are held out."""
NATURAL = (("quickstart", "grpo"), ("masa", "masa"), ("mel", "mel"))
"""Measured as they are, too."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # glibc's mallopt


class ToTheCap(Method):
    """Completions do not end by themselves."""

    name = "to_the_cap"

    def plan(self, plan: Any, context: Any) -> Any:
        """Bans the end of sequence."""
        end = (context.tokenizer.eos_token_id,)
        plan.requests = [
            replace(r, sampling=replace(r.sampling, banned_ids=(*r.sampling.banned_ids, *end)))
            for r in plan.requests
        ]
        return plan


METHOD = ToTheCap


def compare(settings: Settings) -> Iterator[list[Comparison]]:
    """The comparisons so far, after each."""
    os.chdir(ROOT)
    libc = ctypes.CDLL("libc.so.6")
    for option, value in ((M_MMAP_THRESHOLD, 2**17), (M_TRIM_THRESHOLD, 2**17), (M_ARENA_MAX, 1)):
        libc.mallopt(option, value)
    # Imports what stages import.
    one_stage("quickstart", "warm-start", max_steps=1, batch_size=2)
    one_stage("quickstart", "grpo", steps=1, prompts_per_step=2, group_size=2)
    done: list[Comparison] = []
    for recipe, stage in STAGES:
        done.append(_compare(recipe, stage, settings))
        yield done
    for index, (recipe, stage) in enumerate(STAGES):
        if (recipe, stage) in NATURAL:
            natural = {"natural_mib": round(_forked(recipe, stage, False), 1)}
            done[index] = replace(done[index], details=done[index].details | natural)
            yield done


def _compare(recipe: str, stage: str, settings: Settings) -> Comparison:
    planned = max(phase.total for phase in estimate(recipe, stage)) / MIB
    runs = settings.pairs(1)
    return Comparison(
        name=f"{recipe}: {stage}",
        theirs_is="peak of anonymous memory over that before the stage",
        unit="MiB",
        limit=1 + TOLERANCE,
        at_least=1 - TOLERANCE,
        ours=[planned] * runs,
        theirs=[_forked(recipe, stage, True) for _ in range(runs)],
        shapes={"recipe": f"recipes/tiny/{recipe}.yaml", "stage": stage, "steps": 2},
        details={"fitted": (recipe, stage) in FITTED},
    )


def estimate(recipe: str, stage: str) -> list[Any]:
    """The plan's phases of a stage."""
    from posttrain.recipe.lengths import SourceLengths
    from posttrain.recipe.memory import memory_of
    from posttrain.recipe.model_info import find_model_info

    loaded, config = _stage(recipe, stage)
    found = find_model_info(loaded.recipe.model.path)
    assert found is not None
    return memory_of(config, loaded.recipe, found[0], SourceLengths(loaded.recipe.model.path))


def _stage(recipe: str, stage: str) -> tuple[Any, Any]:
    from posttrain.recipe.load import load_recipe

    loaded = load_recipe(ROOT / "recipes" / "tiny" / f"{recipe}.yaml")
    return loaded, next(spec.config for spec in loaded.recipe.stages if spec.config.name == stage)


def _forked(recipe: str, stage: str, worst: bool) -> float:
    """MiB by which a stage raises the peak of the memory of a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(measure(recipe, stage, worst)))
    child.start()
    sender.close()
    try:
        return float(receiver.recv())
    finally:
        child.join()


def measure(recipe: str, stage: str, worst: bool) -> float:
    """See `_forked`; in this process."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM
    before = _status("RssAnon")
    one_stage(recipe, stage, worst=worst)
    # Pages of files stay once they are touched, so those of the end were not more at the peak.
    return (_status("VmHWM") - _status("RssFile") - before) / MIB


def one_stage(recipe: str, stage: str, *, worst: bool = False, **options: Any) -> None:
    """Run two steps of one stage of a tiny recipe, on the base model, with options of the stage."""
    from posttrain.recipe.run import run_recipe

    loaded, config = _stage(recipe, stage)
    changes: dict[str, Any] = {"steps": 2} if hasattr(config, "steps") else {"max_steps": 2}
    if hasattr(config, "rewards"):
        changes["rewards"] = None  # a stage's own may be a model that a stage before it has trained
    changes |= options
    rollout = loaded.recipe.rollout
    if worst and hasattr(config, "methods"):
        here = f"{Path(__file__).relative_to(ROOT)}:ToTheCap"
        changes |= {"methods": [*config.methods, here], "verify_tolerance": 100.0}
        rollout = rollout.model_copy(update={"temperature": 4.0})
    if recipe == "amft":  # past the steps of imitation alone
        changes["steps"] = 12
    spec = next(spec for spec in loaded.recipe.stages if spec.config.name == stage)
    spec = spec.model_copy(update={spec.kind: config.model_copy(update=changes)})
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
        update = {"stages": [spec], "output_dir": folder, "rollout": rollout}
        with redirect_stdout(nowhere):
            run_recipe(replace(loaded, recipe=loaded.recipe.model_copy(update=update)))


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    start, settings = machine("cpu"), Settings()
    for comparisons in compare(settings):
        write("plan_memory", str(__doc__), comparisons, settings, start, ROOT / "results")
    show("plan-memory", str(__doc__), comparisons)
