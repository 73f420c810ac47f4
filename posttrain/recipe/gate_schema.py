"""Stage gates: what `advance_if` of an evaluate stage says, and where it cannot be decided."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.recipe.spelling import did_you_mean

if TYPE_CHECKING:
    from posttrain.recipe.schema import EvaluateStage, Recipe

BASELINE = "baseline"
"""In a gate: the first evaluate stage of the recipe, unless one has this name."""
_FORM = re.compile(r"(\S+)\s*([<>])\s*([^\s=<>]\S*)(?:\s+([+-])\s+(\d+(?:\.\d*)?|\.\d+))?")


@dataclass(frozen=True)
class StageGate:
    """`METRIC > STAGE`, `METRIC < STAGE`, and either with `+ NUMBER` or `- NUMBER` behind.

    The difference of the metric to that of an earlier evaluate stage, problem by problem, has to be above
    (`>`) or below (`<`) `margin` with its whole confidence interval.
    """

    metric: str
    sign: str
    stage: str
    margin: float

    @classmethod
    def parse(cls, text: str) -> StageGate:
        """Read a gate.

        Raises:
            ValueError: it has another form, or its metric has no value for every problem.
        """
        found = _FORM.fullmatch(text.strip())
        if found is None:
            raise ValueError(
                f"should be METRIC > STAGE (or <, and + NUMBER behind), "
                f"as pass@1 > {BASELINE}; found {text!r}"
            )
        metric, sign, stage, direction, number = found.groups()
        if not (metric in ("greedy", "mean_length") or re.fullmatch(r"(pass|maj)@[1-9]\d*", metric)):
            known = "pass@K, maj@K, greedy, mean_length"
            raise ValueError(f"a gate needs a metric with a value for every problem ({known}), not {metric}")
        margin = float(number) if number else 0.0
        return cls(metric, sign, stage, -margin if direction == "-" else margin)

    def __str__(self) -> str:
        behind = f" {'+' if self.margin > 0 else '-'} {abs(self.margin):g}" if self.margin else ""
        return f"{self.metric} {self.sign} {self.stage}{behind}"

    @property
    def demand(self) -> str:
        """What the interval of the difference has to be: `above 0`."""
        return f"{'above' if self.sign == '>' else 'below'} {self.margin:g}"


def gate_of(stage: EvaluateStage) -> StageGate | None:
    """The gate of a stage, if it has one."""
    return None if stage.advance_if is None else StageGate.parse(stage.advance_if)


def baseline_of(recipe: Recipe, index: int, gate: StageGate) -> int | None:
    """Number of the evaluate stage that stage number `index` is compared with; None: there is none."""
    earlier = [number for number in range(index) if recipe.stages[number].kind == "evaluate"]
    named = [number for number in earlier if recipe.stages[number].config.name == gate.stage]
    if named or gate.stage != BASELINE:
        return named[-1] if named else None
    return earlier[0] if earlier else None


def gate_line(stage: EvaluateStage) -> str:
    """For the plan: when the run goes on; nothing without a gate."""
    gate = gate_of(stage)
    if gate is None:
        return ""
    share = f"{stage.confidence:.0%} interval"
    return f"; the run stops here unless {gate} (the {share} of the paired difference is {gate.demand})"


def gate_problems(recipe: Recipe, index: int, stage: EvaluateStage, key: str) -> Iterator[tuple[str, str]]:
    """Keys and sentences about a gate that could not be decided."""
    gate = gate_of(stage)
    if gate is None:
        return
    where, number = f"{key}.advance_if", baseline_of(recipe, index, gate)
    if number is None:
        names = [spec.config.name for spec in recipe.stages[:index] if spec.kind == "evaluate"]
        if gate.stage == BASELINE or not names:
            yield where, "there is no evaluate stage before this one to compare with."
        else:
            text = f"no earlier evaluate stage is called {gate.stage}; there are {', '.join(names)}."
            yield where, text + did_you_mean(gate.stage, names)
        return
    other: EvaluateStage = recipe.stages[number].config
    for compared, place in ((stage, "its own metrics"), (other, f"the metrics of stage {other.name}")):
        if gate.metric not in compared.metrics:
            yield where, f"{gate.metric} is not among {place}."
    if (stage.data or recipe.data.eval) != (other.data or recipe.data.eval):
        yield where, f"stage {other.name} has other problems, and the difference is taken problem by problem."
    if (recipe.rewards_of(stage), stage.correct) != (recipe.rewards_of(other), other.correct):
        yield where, f"stage {other.name} counts other answers as correct."
