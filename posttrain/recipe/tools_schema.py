"""The part of the recipe's schema about tools and environments."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from posttrain.recipe.data_schema import Section


class ToolSpec(Section):
    """One tool."""

    name: str
    """calculator, python, search, or one of your own: `file.py:function`, `package.module:function`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Options of a built-in tool. A function of your own is called with them and returns the tool."""


class ToolsConfig(Section):
    """What the policy can act on while it writes a completion. All stages that sample use it."""

    use: list[ToolSpec] = Field(default=[])
    """The tools: names, or `{name: …, args: {…}}`."""
    environment: str | None = None
    """In place of `use`, an environment of your own: `file.py:Class` (see posttrain.rollout.environment)."""
    environment_args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of that class."""
    protocol: Literal["auto", "chat", "text"] = "auto"
    """`chat` offers the tools through the chat template and returns results as messages, for models that were
    trained for it; `text` describes them in the prompt and writes results into the running text. `auto` is
    chat where the chat template knows tools."""
    calls: Literal["json", "bare"] = "json"
    """What is written between `open` and `close`: `{"name": …, "arguments": {…}}`, or the bare argument of
    the only tool, which has one argument, a text."""
    open: str = "<tool_call>"
    """What a call begins with."""
    close: str = "</tool_call>"
    """What a call ends with. It ends the turn: a turn has one call."""
    result: tuple[str, str] = ("<tool_response>", "</tool_response>")
    """What surrounds a result, protocol text."""
    describe: bool = True
    """Protocol text: say in the prompt which tools there are. Off for models that know from training."""
    max_turns: int = Field(default=10, ge=1)
    """Calls and answers of the environment in one completion. Asking for more ends it, as the token cap
    does."""
    timeout: float = Field(default=20.0, gt=0.0)
    """Seconds for one call, after which its process is killed."""
    output_cap: int = Field(default=2048, ge=16)
    """Tokens of one result; of a longer one the middle is left out. They count towards `max_tokens`."""
    workers: int = Field(default=2, ge=1)
    """Processes that run the tools: calls that are under way at once."""
    memory_gib: float | None = Field(default=4.0, gt=0.0)
    """What each of these processes may allocate; null sets no limit."""

    @field_validator("use", mode="before")
    @classmethod
    def _names(cls, use: Any) -> Any:
        return [{"name": tool} if isinstance(tool, str) else tool for tool in use] if use else use

    @field_validator("result", mode="before")
    @classmethod
    def _pair(cls, result: Any) -> Any:
        return tuple(result) if isinstance(result, list) else result  # YAML has no tuples

    @model_validator(mode="after")
    def _one_kind(self) -> ToolsConfig:
        if bool(self.use) == (self.environment is not None):
            raise ValueError("give either use, a list of tools, or environment, a class")
        if self.environment is None and self.environment_args:
            raise ValueError("environment_args goes with environment")
        if not self.open or not self.close:
            raise ValueError("open and close must not be empty")
        if self.calls == "bare" and self.environment is None and len(self.use) != 1:
            raise ValueError(f"calls bare needs one tool, and use has {len(self.use)}")
        return self
