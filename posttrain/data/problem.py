"""What a procedural task makes."""

from __future__ import annotations

from dataclasses import dataclass, field

from posttrain.rollout.types import Prompt


@dataclass(frozen=True)
class Problem:
    """A question, its answer, and how a demonstrator would write it down.

    `given` is the beginning of the demonstration where the prompt has it already. Rows with the same question
    are one row, unless `variant` tells them apart. `prompt` is what is asked where that is not the question,
    which still decides about the split. A demonstration with tool calls is a list of messages.
    `columns` are further columns of the row.
    """

    question: str
    answer: str
    demonstration: Prompt
    given: str = ""
    variant: str = ""
    prompt: str = ""
    columns: dict[str, str] = field(default_factory=dict)
