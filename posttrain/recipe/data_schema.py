"""The part of the recipe's schema about datasets, and the base of every part."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SOURCE_KINDS = ("hub", "jsonl", "parquet", "task", "reasoning_gym", "stage")
TaskName = Literal[
    "arithmetic",
    "largest",
    "counting",
    "reversing",
    "addition",
    "search",
    "calculator",
    "string_machine",
    "error_analysis",
    "error_replay",
    "meta_arithmetic",
    "meta_largest",
    "meta_counting",
    "meta_reversing",
    "meta_addition",
]


class Section(BaseModel):
    """Base of every part of a recipe: unknown keys are refused, values do not change after loading.

    Only the recipe's validator is built, which has those of its parts; so a default that is a section is made
    by `model_construct`, which needs none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, defer_build=True)


class Columns(Section):
    """Which dataset columns hold what. A missing one is an error that lists the columns there are."""

    prompt: str = "prompt"
    """Text, or a list of chat messages."""
    answer: str | None = "answer"
    """Reference answer for the rewards; None when there is none."""
    completion: str | None = None
    """Demonstration for supervised stages."""


class DataSource(Section):
    """Where rows come from: exactly one of `hub`, `jsonl`, `parquet`, `task`, `reasoning_gym`, `stage`."""

    hub: str | None = None
    """Dataset name on the hub, or a local folder in the hub's format."""
    jsonl: str | None = None
    """Path of a file with one JSON object a line."""
    parquet: str | None = None
    """Path of a parquet file."""
    task: TaskName | None = None
    """A procedural task of `posttrain.data.tasks`."""
    reasoning_gym: str | None = None
    """A dataset name of the reasoning-gym package, e.g. `chain_sum`."""
    stage: str | None = None
    """Name of an earlier stage of the recipe, one that writes rows."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset or a task. A task's splits never share a problem."""
    revision: str | None = None
    """Commit of a hub dataset."""
    size: int | None = Field(default=None, ge=1)
    """Rows a procedural source makes; required there."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of a procedural source."""
    columns: Columns = Columns.model_construct()
    """Which column holds what."""
    format: Literal["auto", "chat", "text"] = "auto"
    """`chat` renders prompts with the chat template, `text` takes them as they are; `auto` is `chat` when
    the tokenizer has a template."""
    system: str | None = None
    """System message put before every chat prompt."""
    template: str | None = None
    """Text around the prompt, with `{prompt}` where it goes."""
    shuffle: bool = True
    """Rows are shuffled once by `seed`; the policy stage then goes through them epoch by epoch."""
    seed: int = 0
    """Seed of the shuffle and of procedural sources. Not the run's seed: seeds of one recipe train on the
    same problems."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first rows only (after the shuffle)."""

    @model_validator(mode="after")
    def _one_source(self) -> DataSource:
        kinds = [kind for kind in SOURCE_KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            found = ", ".join(kinds) or "none"
            raise ValueError(f"exactly one of {', '.join(SOURCE_KINDS)} is needed; found {found}")
        if kinds[0] in ("task", "reasoning_gym") and self.size is None:
            raise ValueError(f"a {kinds[0]} source needs size")
        if kinds[0] in ("task", "reasoning_gym") and self.split not in ("train", "validation", "test"):
            raise ValueError(f"a {kinds[0]} source has the splits train, validation, test, not {self.split}")
        if self.template is not None and "{prompt}" not in self.template:
            raise ValueError("template has no {prompt}")
        if self.system is not None and self.format == "text":
            raise ValueError("a system message needs chat prompts, but format is text")
        return self


class DataConfig(Section):
    """The recipe's datasets, by purpose."""

    train: DataSource | None = None
    """Prompts of the policy stages, and demonstrations of the supervised ones unless they name their own."""
    eval: DataSource | None = None
    """Problems of the evaluate stages unless they name their own."""
