"""The part of the recipe's schema about stages: one class for each kind."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from posttrain.recipe.data_schema import DataSource, Section
from posttrain.recipe.gate_schema import StageGate
from posttrain.recipe.meta_schema import MetaEvaluation
from posttrain.recipe.mrt_schema import THINKING_METRICS, ThinkingConfig
from posttrain.recipe.pareto_schema import FORECAST_METRICS, ParetoConfig
from posttrain.recipe.rewards_schema import RewardSpec, reward_specs

LossKind = Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "gspo", "rloo", "reinforce_pp"]


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
    dual_clip: float | None = Field(default=None, gt=1.0)
    """Bounds the loss of a token with a negative advantage at this ratio (Ye et al. 2020, equation 5, where
    it is 3), so that one token that became much likelier cannot dominate. None does not."""
    scale: Literal["group", "batch", "none"] | None = None
    """Divide advantages by the standard deviation of the group, of the batch, or not at all. None is what
    the loss's paper does: `none` for dr_grpo and rloo, `batch` for reinforce_pp, `group` for the others."""
    kl: float = Field(default=0.0, ge=0.0)
    """Weight of the k3 estimate of KL(policy ‖ reference). 0 keeps no reference in memory."""
    entropy: float = 0.0
    """Weight of the entropy bonus."""
    importance: ImportanceConfig = ImportanceConfig.model_construct()


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
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    sort_batches: bool = False
    """Sort the rows of every batch by length, so that its micro-batches have little padding. The batches stay
    random ones; batches of rows of like length would not be, and learn worse."""
    optimizer: OptimizerConfig = OptimizerConfig.model_construct(**SFT_OPTIMIZER)
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
    rewards: list[RewardSpec] | None = None
    """None is the recipe's `rewards`."""
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
    loss: LossConfig = LossConfig.model_construct()
    optimizer: OptimizerConfig = OptimizerConfig.model_construct()
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

    @field_validator("rewards", mode="before")
    @classmethod
    def _names(cls, rewards: Any) -> Any:
        return reward_specs(rewards)

    @field_validator("methods")
    @classmethod
    def _one_name_each(cls, methods: list[Any]) -> list[Any]:
        for method in methods:
            if isinstance(method, dict) and len(method) != 1:
                raise ValueError("an entry is a method's name, or {name: {option: value}} with one name")
        return methods

    @property
    def method_names(self) -> list[str]:
        """Names of the methods, in their order."""
        return [method if isinstance(method, str) else next(iter(method)) for method in self.methods]

    def method_options(self, name: str) -> tuple[str, dict[str, Any]] | None:
        """Key below the stage and options of a method, as they were written; None where it is not used."""
        if name not in self.method_names:
            return None
        index = self.method_names.index(name)
        method = self.methods[index]
        return f"methods[{index}].{name}", {} if isinstance(method, str) else method[name]


class CorrectConfig(Section):
    """What counts as correct in an evaluation."""

    reward: str | None = None
    """Name of the reward that decides; None is the first."""
    threshold: float = 1.0
    """Correct when the reward is at least this."""


class EvaluateStage(Section):
    """Sample answers to held-out problems and report metrics with confidence intervals."""

    name: str = "evaluate"
    """Name of the stage in the run folder; different for every stage of a recipe."""
    data: DataSource | None = None
    """None is `data.eval`."""
    rewards: list[RewardSpec] | None = None
    """None is the recipe's `rewards`."""
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
    """`pass@K` (unbiased), `maj@K`, `greedy` (accuracy at temperature 0), `mean_length`; `meta`, how well the
    model predicts its own pass rate and length before solving; `forecasts`, how well a model of stage
    `zip_rc` foresees them at every token, and `pareto`, what decoding gains by that; of thinking cut short,
    `regret`, `budget_curve` (accuracy against tokens) and `episode_votes` (majority votes after each
    episode)."""
    thinking: ThinkingConfig = ThinkingConfig.model_construct()
    """How thinking is cut short for the last three."""
    meta: MetaEvaluation = MetaEvaluation.model_construct()
    """How metric `meta` is measured."""
    pareto: ParetoConfig = ParetoConfig.model_construct()
    """What metric `pareto` compares."""
    correct: CorrectConfig = CorrectConfig.model_construct()
    confidence: float = Field(default=0.95, gt=0.0, lt=1.0)
    """Coverage of the intervals."""
    advance_if: str | None = None
    """Gate: the run goes on only if this holds, as `pass@1 > baseline`. A metric with a value for every
    problem (`pass@K`, `maj@K`, `greedy`, `mean_length`), `>` or `<`, and the name of an earlier evaluation
    of the same problems; `baseline` is the first of the recipe. It holds if the whole interval of the paired
    difference, this stage minus that one, is above (below) 0, or with `+ 0.02` or `- 0.02` behind above
    (below) that: `pass@1 > baseline - 0.02` lets through what is no more than two points worse."""

    @field_validator("advance_if")
    @classmethod
    def _can_be_read(cls, gate: str | None) -> str | None:
        return None if gate is None else str(StageGate.parse(gate))

    @field_validator("rewards", mode="before")
    @classmethod
    def _names(cls, rewards: Any) -> Any:
        return reward_specs(rewards)

    @field_validator("metrics")
    @classmethod
    def _known(cls, metrics: list[str]) -> list[str]:
        for metric in metrics:
            base, _, k = metric.partition("@")
            if not (
                metric in ("greedy", "mean_length", "meta", *FORECAST_METRICS, *THINKING_METRICS)
                or (base in ("pass", "maj") and k.isdigit() and int(k) > 0)
            ):
                kinds = ("pass@K", "maj@K", "greedy", "mean_length", "meta")
                known = (*kinds, *FORECAST_METRICS, *THINKING_METRICS)
                raise ValueError(f"unknown metric {metric!r}; known: {', '.join(known)}")
        return metrics

    @model_validator(mode="after")
    def _enough_samples(self) -> EvaluateStage:
        needed = max((int(m.partition("@")[2]) for m in self.metrics if "@" in m), default=1)
        if needed > self.samples:
            raise ValueError(f"metrics ask for {needed} samples of a problem, samples is {self.samples}")
        if "pareto" in self.metrics and self.samples < 2:
            raise ValueError("metric pareto spends several samples of a problem: set samples, 8 for example")
        if "pareto" in self.metrics and self.temperature == 0:
            raise ValueError("metric pareto needs samples that differ: set temperature above 0")
        return self
