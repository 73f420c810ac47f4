"""Generate, score and update: steps of the quickstart's policy stage, against TRL's GRPOTrainer.

Both trainers live in processes of their own and take steps in turns, one waiting while the other works. Each
samples its own completions, so the bench asserts that their number is the same and their mean length alike.
On a GPU the model has the shape of Qwen2.5-0.5B, computes in bfloat16, and generates to the cap.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.harness import Comparison, Sample, Settings, alternate, require
from benchmarks.quickstart import MODEL, policy_stage, trl_trainer, warm_start, write_recipe

from posttrain.recipe.load import load_recipe

LIMIT = 0.5
PAIRS, WARM_UP = 8, 2
LENGTH_TOLERANCE = 0.15
GPU_TOKENS = 256


@dataclass(frozen=True)
class Step:
    """One step: seconds, CPU seconds of the process and its children, completions, their mean length."""

    wall: float
    cpu: float
    completions: int
    mean_length: float


def compare(settings: Settings) -> list[Comparison]:
    pairs = settings.pairs(PAIRS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options: dict[str, Any] = {"steps": pairs + WARM_UP}
        if settings.device == "cuda":
            model = _half_billion(folder / "model", settings.seed)
            options |= {"model": model, "dtype": "bfloat16", "max_tokens": GPU_TOKENS}
        else:
            options |= {"model": warm_start(folder, settings.seed)}
        recipe = write_recipe(folder, "policy", settings.seed, **options)
        sides = [Trainer(function, recipe, folder / function.__name__) for function in (ours, theirs)]
        try:
            steps = _take_turns(sides, pairs)
        finally:
            for side in sides:
                side.close()
        loaded = load_recipe(recipe).recipe
    stage = policy_stage(loaded)
    lengths = [statistics.mean(step.mean_length for step in side) for side in steps]
    require(
        abs(lengths[0] - lengths[1]) <= LENGTH_TOLERANCE * lengths[1],
        f"completions of {lengths[0]:.1f} and {lengths[1]:.1f} tokens on average",
    )
    shared = {
        "theirs_is": "GRPOTrainer with transformers generation",
        "limit": LIMIT,
        "shapes": {
            "model": "Qwen2.5-0.5B, random" if settings.device == "cuda" else "warm-started tiny-reasoner",
            "prompts": stage.prompts_per_step,
            "group": stage.group_size,
            "max_tokens": loaded.rollout.max_tokens,
        },
        "details": {"mean_completion_length": dict(zip(("ours", "theirs"), lengths, strict=True))},
    }
    walls, cpus = ([[getattr(step, key) for step in side] for side in steps] for key in ("wall", "cpu"))
    comparisons = [Comparison(name="time", unit="seconds", ours=walls[0], theirs=walls[1], **shared)]
    if settings.device == "cpu":
        comparisons.append(
            Comparison(name="CPU time", unit="CPU seconds", ours=cpus[0], theirs=cpus[1], **shared)
        )
    return comparisons


def _take_turns(sides: list[Trainer], pairs: int) -> list[list[Step]]:
    steps: list[list[Step]] = [[], []]

    def turn(index: int) -> Callable[[], Sample[Step]]:
        def take() -> Sample[Step]:
            step = sides[index].step()
            steps[index].append(step)
            return Sample(step.wall, step)

        return take

    def check(a: Step, b: Step) -> None:
        require(a.completions == b.completions, f"{a.completions} and {b.completions} completions")

    alternate(turn(0), turn(1), pairs + WARM_UP, check, warm_up=False)
    return [side[WARM_UP:] for side in steps]


class Trainer:
    """A trainer in a process of its own that takes one step whenever it is told to."""

    def __init__(self, function: Callable[[Turns, Path, Path], None], recipe: Path, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(function, theirs, recipe, folder))
        self._process.start()
        theirs.close()  # or a process that died would leave `step` waiting

    def step(self) -> Step:
        """Let it take a step; the first includes all that comes before."""
        try:
            self._connection.send("step")
            return self._connection.recv()
        except (EOFError, BrokenPipeError):
            raise RuntimeError("a trainer's process ended early; it printed why") from None

    def close(self) -> None:
        """End the process: it stops where it waits for its turn."""
        self._connection.close()
        self._process.join(60)
        self._process.kill()


class Turns:
    """The other end: stops a trainer between its steps."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._wait()

    def finished(self, completions: int, mean_length: float) -> None:
        """Call after each step; returns when it is time for the next."""
        now = time.perf_counter(), _tree_seconds()
        wall, cpu = (end - start for end, start in zip(now, self._began, strict=True))
        self._connection.send(Step(wall, cpu, completions, mean_length))
        self._wait()

    def _wait(self) -> None:
        try:
            self._connection.recv()
        except EOFError:
            sys.exit(0)
        self._began = time.perf_counter(), _tree_seconds()


def _serve(
    function: Callable[[Turns, Path, Path], None], connection: Connection, recipe: Path, folder: Path
) -> None:
    folder.mkdir()
    function(Turns(connection), recipe, folder)


def _tree_seconds() -> float:
    """CPU seconds of this process and all that run below it."""
    import psutil

    process = psutil.Process()
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def ours(turns: Turns, path: Path, folder: Path) -> None:
    """The policy stage as `posttrain train` runs it."""
    from posttrain.stages import policy
    from posttrain.stages.context import StageContext
    from posttrain.training.record import MetricsFile
    from posttrain.training.stop import StopSignals

    recipe = load_recipe(path).recipe
    stage = policy_stage(recipe)
    completions = stage.prompts_per_step * stage.group_size

    def show(step: int, steps: int, metrics: dict[str, Any]) -> None:
        turns.finished(completions, metrics["tokens/sampled"] / completions)

    context = StageContext(
        recipe=recipe,
        run_dir=folder,
        name="01-grpo",
        kind="policy",
        model=recipe.model,
        metrics=MetricsFile(folder / "metrics.jsonl"),
        show=show,
        say=lambda line: None,
        stop=StopSignals(),
    )
    policy.run(stage, context)


def theirs(turns: Turns, path: Path, folder: Path) -> None:
    """The same stage with TRL."""
    from transformers import TrainerCallback

    stage = policy_stage(load_recipe(path).recipe)

    class AfterStep(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **options: Any) -> None:
            if "completions/mean_length" in logs:
                turns.finished(stage.prompts_per_step * stage.group_size, logs["completions/mean_length"])

    trl_trainer(path, folder, [AfterStep()]).train()


def _half_billion(folder: Path, seed: int) -> Path:
    """A random model of the shape of Qwen2.5-0.5B with the tiny reasoner's tokenizer."""
    from benchmarks.models import QWEN_HALF_BILLION
    from transformers import AutoTokenizer

    QWEN_HALF_BILLION.build(seed).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder
