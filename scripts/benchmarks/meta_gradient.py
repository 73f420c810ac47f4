"""AMFT's meta-gradient: steps at the default interval against steps with a fixed mixture, and its memory.

The stage is that of the quickstart with demonstrations beside the prompts. One side measures in every tenth
step, with as many held-out answers as the default asks for; the other never does. Mu is held where it is, so
that both train the same. A pair is ten steps of each, one of them measured.

Memory is by how much one update raises the peak of a fresh process, its gradients included: the buffers of a
measurement are two more of their size.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from benchmarks.harness import Comparison, Sample, Settings, alternate, in_fresh_process, one_thread, require
from benchmarks.models import Group, ModelShape
from benchmarks.quickstart import policy_stage, warm_start, write_recipe
from benchmarks.steps import our_step
from benchmarks.train_memory import MIB, Outcome, peak, start
from benchmarks.train_step import RAGGED
from benchmarks.whole_step import Trainer, ours

from posttrain.recipe.amft_schema import AmftConfig, HeldOut
from posttrain.recipe.load import load_recipe

PAIRS = 3
INTERVAL = AmftConfig.model_fields["interval"].default
"""Steps of one block, of which one is measured."""
TASK = {"task": "arithmetic", "args": {"max_term": 6}}
LIMIT, MEMORY_LIMIT = 1.25, 3.0


def compare(settings: Settings) -> list[Comparison]:
    return [_time(settings), _memory(settings)]


def _time(settings: Settings) -> Comparison:
    pairs = settings.pairs(PAIRS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = warm_start(folder, settings.seed)
        recipes = [_recipe(folder / kind, model, settings.seed, pairs, kind) for kind in ("learned", "fixed")]
        sides = [Trainer(ours, recipe, folder / recipe.parent.name / "run") for recipe in recipes]
        try:
            values = alternate(*(partial(_block, side) for side in sides), pairs, _same)
        finally:
            for side in sides:
                side.close()
        stage = policy_stage(load_recipe(recipes[0]).recipe)
    return Comparison(
        name=f"time, a measurement every {INTERVAL} steps",
        theirs_is="the same steps without measurements",
        unit="CPU seconds",
        limit=LIMIT,
        ours=values[0],
        theirs=values[1],
        shapes={
            "model": "warm-started tiny-reasoner",
            "prompts": stage.prompts_per_step,
            "group": stage.group_size,
            "held-out prompts": HeldOut.model_fields["prompts"].default,
            "held-out group": HeldOut.model_fields["group_size"].default,
        },
    )


def _recipe(folder: Path, model: Path, seed: int, pairs: int, kind: str) -> Path:
    """The quickstart's policy stage with AMFT, that does or does not measure."""
    folder.mkdir()
    path = write_recipe(folder, "policy", seed, steps=INTERVAL * (pairs + 1), model=model)
    recipe = yaml.safe_load(path.read_text())
    options: dict[str, Any] = {
        "demonstrations": {**TASK, "size": 2000, "split": "train", "seed": 1},
        "mu": 0.5,
        "first": 0,
        "batch_size": 32,
    }
    if kind == "learned":
        held_out = {"data": {**TASK, "size": 400, "split": "validation"}}
        options |= {"held_out": held_out, "rate": 1e-12}  # measured, and as good as not moved
    else:
        options |= {"schedule": {0: 0.5}}
    recipe["stages"][0]["policy"]["methods"] = [{"amft": options}]
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def _block(side: Trainer) -> Sample[int]:
    """As many steps as there are between two measurements; CPU seconds."""
    steps = [side.step() for _ in range(INTERVAL)]
    return Sample(sum(step.cpu for step in steps), steps[0].completions)


def _same(a: int, b: int) -> None:
    require(a == b, f"{a} and {b} completions a step")


def _memory(settings: Settings) -> Comparison:
    shape = ModelShape()
    group = Group.random(settings.seed, 128, RAGGED, shape.vocab)

    def run(measured: bool) -> Sample[Outcome]:
        return in_fresh_process(measure, measured, shape, group, settings.seed)

    def check(a: Outcome, b: Outcome) -> None:
        require(abs(a.loss - b.loss) <= 1e-5 * abs(b.loss), f"losses {a.loss} and {b.loss}")
        require(abs(a.gradient_norm - b.gradient_norm) <= 1e-5 * b.gradient_norm, "gradients")

    values = alternate(partial(run, True), partial(run, False), settings.pairs(), check, warm_up=False)
    return Comparison(
        name="memory of an update",
        theirs_is="the same update without a measurement",
        unit="MiB",
        limit=MEMORY_LIMIT,
        ours=values[0],
        theirs=values[1],
        shapes={"model": shape.describe(), **group.describe()},
    )


def measure(measured: bool, shape: ModelShape, group: Group, seed: int) -> Sample[Outcome]:
    """The MiB by which an update raises the peak memory of this process."""
    with one_thread():
        model = shape.build(seed)
        our_step(model, Group.random(seed, 4, (2, 1), shape.vocab))()
        step = our_step(model, group)
        update: Callable[[], Any] = partial(_measured, model, step) if measured else step
        model.zero_grad(set_to_none=True)
        gc.collect()
        before = start("cpu")
        loss = update()
        growth = (peak("cpu") - before) / MIB
    return Sample(growth, Outcome(float(loss), _norm(model)))


def _measured(model: Any, step: Callable[[], Any]) -> Any:
    """An update whose gradient is compared, with that of a first pass in the place of the utility's."""
    from accelerate import Accelerator

    from posttrain.methods.base import CHANNELS, Method
    from posttrain.methods.base import Comparison as Asked
    from posttrain.rollout.types import RolloutBatch
    from posttrain.training.gradients import GradientComparison

    accelerator = Accelerator(cpu=True)
    comparison = GradientComparison(Asked({}, {CHANNELS: 1.0}), Method(None), None, RolloutBatch([]))
    comparison.parts = [CHANNELS]
    with comparison.watching(model):
        step()
        comparison.begin(accelerator)
        comparison.step_into(0)
        loss = step()
    comparison.tell(accelerator, 1.0)
    return loss


def _norm(model: Any) -> Any:
    import torch

    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
