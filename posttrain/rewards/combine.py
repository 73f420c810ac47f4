"""From the values of several rewards to one: weights, schedules, clipping and gates.

    total = Σ weightₖ(step) · clipₖ(valueₖ)   over the rewards that apply

A reward applies where its function gave a number and its gate, if it has one, is met. A gate looks at what
another reward said, before weight and clipping; one that gave no number meets no gate. Pure functions and
no imports of other libraries: the recipe's checks are made of the same.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.errors import RecipeError

if TYPE_CHECKING:
    from posttrain.recipe.schema import RewardSpec

Values = Mapping[str, float | None]
"""What each reward said about one sample; None where it does not apply or failed."""

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_GATE = re.compile(
    r"\s*(?P<reward>[^\s<>=!](?:[^<>=!]*[^\s<>=!])?)\s*(?P<sign>>=|<=|==|!=|>|<)\s*(?P<bound>[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)\s*"
)


@dataclass(frozen=True)
class Gate:
    """`reward sign bound`, e.g. `math_answer > 0`."""

    reward: str
    sign: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Read a condition.

        Raises:
            RecipeError: it is not a reward's name, a comparison and a number.
        """
        match = _GATE.fullmatch(text)
        if match is None:
            raise RecipeError(f"a condition is NAME > NUMBER (or >=, <, <=, ==, !=), not {text!r}")
        return cls(match["reward"], match["sign"], float(match["bound"]))

    def is_met(self, values: Values) -> bool:
        """Whether the condition is true of a sample."""
        value = values.get(self.reward)
        return value is not None and _OPERATORS[self.sign](value, self.bound)


def weight_at(weight: float | Mapping[int, float], step: int | None) -> float:
    """A weight at a step of the stage, counted from 0.

    A schedule is linear between its steps and constant before the first and after the last:
    {0: 1.0, 200: 0.1} is 1.0 at step 0, 0.55 at 100 and 0.1 from 200 on. Outside of training, `step` None,
    it is what it ends with.
    """
    if not isinstance(weight, Mapping):
        return weight
    steps = sorted(weight)
    if step is None or step >= steps[-1]:
        return weight[steps[-1]]
    if step <= steps[0]:
        return weight[steps[0]]
    after = next(index for index, at in enumerate(steps) if at > step)
    low, high = steps[after - 1], steps[after]
    return weight[low] + (weight[high] - weight[low]) * (step - low) / (high - low)


@dataclass(frozen=True)
class Combination:
    """How the rewards of a recipe become one number."""

    specs: Sequence[RewardSpec]

    def weights(self, step: int | None) -> dict[str, float]:
        """Weight of every reward at a step. Those with weight 0 are recorded and have no say."""
        return {spec.name: weight_at(spec.weight, step) for spec in self.specs}

    def terms(self, values: Values, step: int | None) -> dict[str, float]:
        """The values of the rewards that apply and have a weight: gated and clipped, not yet weighted."""
        weights = self.weights(step)
        terms = {}
        for spec in self.specs:
            value = values.get(spec.name)
            if value is None or weights[spec.name] == 0:
                continue
            if spec.only_if is not None and not Gate.parse(spec.only_if).is_met(values):
                continue
            low, high = spec.clip or (value, value)
            terms[spec.name] = min(max(value, low), high)
        return terms

    def total(self, values: Values, failed: Mapping[str, object], step: int | None) -> float | None:
        """The weighted sum; None, the sample is unscored, if nothing applies or a reward it needs failed.

        Needed are the rewards with a weight whose gate is not known to be closed, and those that gates of
        theirs look at. `failed` has the names of those that failed on the sample.
        """
        weights = self.weights(step)
        for spec in self.specs:
            if weights[spec.name] == 0:
                continue
            gate = None if spec.only_if is None else Gate.parse(spec.only_if)
            if gate is not None and gate.reward in failed:
                return None
            if spec.name in failed and (gate is None or gate.is_met(values)):
                return None
        terms = self.terms(values, step)
        return sum(weights[name] * value for name, value in terms.items()) if terms else None
