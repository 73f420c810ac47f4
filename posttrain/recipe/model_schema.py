"""The part of the recipe's schema about models."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain.recipe.data_schema import Section


class LoraConfig(Section):
    """Low-rank adapters through peft; the base weights stay frozen."""

    r: int = Field(default=16, ge=1)
    """Rank. 16 is enough for RL updates, which are low-rank (Schulman et al., "LoRA without regret")."""
    alpha: int = Field(default=32, ge=1)
    """Scale is alpha / r; the usual 2r."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """0: dropout would make the trainer's log-probs differ from the engine's."""
    target_modules: str | list[str] = "all-linear"
    """Adapting every linear layer matches full fine-tuning; attention alone does not."""


class ModelConfig(Section):
    """The policy to start from."""

    path: str
    """Hub name or local folder in the Hugging Face format."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; None is its default branch."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """`auto` keeps the checkpoint's type."""
    attn_implementation: str | None = None
    """Passed to transformers; None lets it choose."""
    trust_remote_code: bool = False
    """Off: code that comes with a checkpoint is not run unless the recipe says so."""
    lora: LoraConfig | None = None
    """None trains every weight."""
    adapter: str | None = None
    """Folder of a trained peft adapter to continue from; `path` is its base."""
