"""The process in which tools and environments run, and which may be killed at any time.

It is given a socket: first it gets the recipe's `tools` section and says `Ready` or why not, then it gets one
`Task` after the other and answers each with an `Outcome`.
"""

from __future__ import annotations

import faulthandler
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

from posttrain.errors import PosttrainError, RolloutError
from posttrain.killable import confine
from posttrain.recipe.tools_schema import ToolsConfig
from posttrain.redaction import redact
from posttrain.rollout.environment import Environment
from posttrain.rollout.tools import (
    MAX_MESSAGE,
    Outcome,
    call_tool,
    describe,
    environment_factory,
    shorten,
)
from posttrain.rollout.types import Example

MAX_CONVERSATIONS = 256
"""Environments that a process keeps; older ones are made again when they are needed."""
CHARACTERS_PER_TOKEN = 16
"""An output is cut here to so many characters per token of its cap, before it travels."""
ORPHAN_GRACE = 3.0
"""Seconds after its time-out at which a call ends the process by itself, if no parent did so before."""


@dataclass(frozen=True)
class Action:
    """What the policy did in a turn: call a tool with arguments, or (`tool` None) say a text."""

    tool: str | None
    arguments: dict[str, Any] = field(default_factory=dict)
    text: str = ""


@dataclass(frozen=True)
class Task:
    """An action in a conversation, with all that was done in it before."""

    conversation: int
    example: Example
    history: tuple[Action, ...]
    action: Action


class Ready:
    """The tools are loaded."""


Reply = Ready | PosttrainError | Outcome


def main(socket: int, memory_limit: int) -> None:
    """Serve tasks over an inherited descriptor until the parent closes the socket or ends.

    `memory_limit` is in bytes; 0 is none.
    """
    connection = Connection(socket)
    confine(memory_limit)
    try:
        config: ToolsConfig = connection.recv()
        try:
            conversations = Conversations(environment_factory(config), keep=config.environment is not None)
            conversations.try_one()
        except PosttrainError as error:
            connection.send(error)
            os._exit(0)
        except Exception as error:
            connection.send(RolloutError(f"the tools cannot be loaded: {describe(error)}"))
            os._exit(0)
        connection.send(Ready())
        while True:
            task: Task = connection.recv()
            # Works without the interpreter lock, so also while a regular expression backtracks for ever.
            faulthandler.dump_traceback_later(config.timeout + ORPHAN_GRACE, exit=True, file=2)
            outcome = conversations.run(task)
            faulthandler.cancel_dump_traceback_later()
            if outcome.output is not None:
                length = CHARACTERS_PER_TOKEN * config.output_cap
                outcome = replace(outcome, output=shorten(outcome.output, length))
            connection.send(outcome)
    except (EOFError, OSError):
        pass
    os._exit(0)  # whatever threads a tool has started must not keep the process alive


class Conversations:
    """The environments of the conversations that this process has served."""

    def __init__(self, make: Callable[[], Environment], keep: bool):
        """`keep` is off for environments without a memory."""
        self._make = make
        self._keep = keep
        self._known: OrderedDict[int, tuple[Environment, int]] = OrderedDict()

    def try_one(self) -> None:
        """Make an environment, to see whether that works."""
        self._make()

    def run(self, task: Task) -> Outcome:
        """Take an action, in the environment in which the earlier ones were taken."""
        started = time.perf_counter()
        try:
            environment = self._environment(task)
            outcome = _take(environment, task.action)
        except Exception as error:
            outcome = Outcome(f"Error: {shorten(describe(error), MAX_MESSAGE)}", "exception")
        output = None if outcome.output is None else redact(outcome.output)
        return replace(outcome, output=output, seconds=time.perf_counter() - started)

    def _environment(self, task: Task) -> Environment:
        if not self._keep:
            return self._make()
        environment, done = self._known.pop(task.conversation, (None, -1))
        if environment is None or done != len(task.history):  # another process served it, or it is old
            environment = self._make()
            environment.reset(task.example)
            for action in task.history:
                _take(environment, action)
        self._known[task.conversation] = environment, len(task.history) + 1
        if len(self._known) > MAX_CONVERSATIONS:
            self._known.popitem(last=False)
        return environment


def _take(environment: Environment, action: Action) -> Outcome:
    if action.tool is None:
        return Outcome(environment.step(action.text))
    return call_tool(environment.tools, action.tool, action.arguments)
