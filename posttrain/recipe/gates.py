"""Stage gates in a run: decided when their stage is finished, and kept in the run's state with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from posttrain.errors import GateFailed
from posttrain.evaluation.gates import Outcome, decide, gate_lines
from posttrain.evaluation.samples import is_of_samples
from posttrain.recipe.gate_schema import baseline_of, gate_of
from posttrain.recipe.run_state import FinishedStage
from posttrain.recipe.schema import Recipe
from posttrain.report.rollouts import read_problems

GATE = "gate"
"""In a finished stage's summary: how its gate was decided."""


def decide_gate(recipe: Recipe, index: int, run_dir: Path) -> dict[str, Outcome]:
    """How the gate of a stage is decided, for its summary; nothing where it has none.

    The table has every metric that both stages have a value of for every problem.
    """
    stage = recipe.stages[index].evaluate
    gate = None if stage is None else gate_of(stage)
    if stage is None or gate is None:
        return {}
    number = baseline_of(recipe, index, gate)
    assert number is not None  # the recipe's checks ask for it
    before, after = (
        read_problems(run_dir / "rollouts" / recipe.stage_folder(place) / "samples.parquet")
        for place in (number, index)
    )
    theirs = recipe.stages[number].config.metrics
    shared = [metric for metric in stage.metrics if metric in theirs and is_of_samples(metric)]
    baseline = recipe.stage_folder(number)
    return {GATE: decide(gate, baseline, before, after, shared, stage.confidence)}


def require_passed(finished: FinishedStage, say: Callable[[str], None]) -> None:
    """Say how the gate of a finished stage was decided, if it has one.

    Raises:
        GateFailed: it was not passed.
    """
    outcome: Outcome | None = finished.summary.get(GATE)
    if outcome is None:
        return
    for line in gate_lines(finished.stage, outcome):
        say(f"   {line}")
    if not outcome["passed"]:
        raise GateFailed(
            f"{finished.stage} stops the run: its gate {outcome['gate']} was not passed, since "
            f"{outcome['reason']}."
        )
