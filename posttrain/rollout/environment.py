"""What a policy acts on while it writes a completion.

A completion is a conversation: the policy writes a turn; if the turn has a call of a tool, the tool's output
follows, else the environment answers or ends it. Tools alone are an environment, `ToolBox`, that ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from posttrain.rollout.types import Example

Tool = Callable[..., Any]


class Environment(Protocol):
    """One conversation's side that is not the policy's.

    An environment of your own is a class with these three; an object of it serves one conversation, in a
    process that may be killed at a time-out. The conversation then goes on with a new object, for which
    everything that was done before is done again: the same actions should have the same effects.
    """

    tools: Sequence[Tool]
    """Functions or bound methods offered to the policy, with type hints and a docstring that describes each
    argument (Google's format)."""

    def reset(self, example: Example) -> None:
        """Begin the conversation about an example, whose prompt the policy has read."""
        ...

    def step(self, text: str) -> str | None:
        """Answer a turn that calls no tool; None ends the conversation."""
        ...


class ToolBox:
    """The built-in environment: tools without a memory, and the first turn without a call is the last."""

    def __init__(self, tools: Sequence[Tool]):
        self.tools = tools

    def reset(self, example: Example) -> None:
        """See `Environment`."""

    def step(self, text: str) -> str | None:
        """See `Environment`."""
        return None
