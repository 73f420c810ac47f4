"""The stages of a recipe: TRL's batches, loss and optimiser."""

from __future__ import annotations

import math
from typing import Any

from posttrain.errors import RecipeError
from posttrain.recipe.commented import Commented, plain
from posttrain.recipe.from_trl.config import Config, Tree

LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo")
SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
STEPS = 100
"""Where TRL counts epochs of a dataset whose rows nobody has counted."""


def stages(config: Config, world: int, rows: int | None) -> list[Tree]:
    """The policy stage, and one for evaluation where TRL would evaluate.

    `world` is the number of processes, `rows` that of the prompts where it is known.
    """
    group, per_update, updates, steps = _batches(config, world, rows)
    micro = config.positive("per_device_train_batch_size") * config.positive("max_completion_length")
    policy: Tree = {
        "steps": steps,
        "prompts_per_step": per_update,
        "group_size": group,
        **({"updates_per_batch": updates} if updates > 1 else {}),
        "micro_batch_tokens": Commented(
            max(micro, 1024), "per_device_train_batch_size × max_completion_length; sets memory alone"
        ),
        "gradient_checkpointing": config.flag("gradient_checkpointing"),
        **({"mask_truncated": True} if config.flag("mask_truncated_completions") else {}),
        "loss": _loss(config),
        "optimizer": _optimizer(config, plain(steps) * updates),
        **_saving(config, updates, plain(steps)),
    }
    stages: list[Tree] = [{"policy": policy}]
    if config.text("eval_strategy") != "no":
        samples = config.positive(
            "num_generations_eval" if config.given("num_generations_eval") else "num_generations"
        )
        stages.append({"evaluate": {"samples": samples, "metrics": ["pass@1", "mean_length"]}})
        config.changed["eval_strategy"] = "evaluated once, after training, by the first reward"
    return stages


def _batches(config: Config, world: int, rows: int | None) -> tuple[int, Any, int, Any]:
    """Completions of a prompt, prompts of a step, updates on them, and steps.

    TRL counts completions: an optimiser step is on `per_device_train_batch_size` × processes ×
    `gradient_accumulation_steps` of them.
    """
    group = config.positive("num_generations")
    device = config.positive("per_device_train_batch_size")
    accumulation = config.positive("gradient_accumulation_steps")
    batch = generated = device * world * accumulation
    if config.given("generation_batch_size"):
        generated = config.positive("generation_batch_size")
    elif config.given("steps_per_generation"):
        generated = device * world * config.positive("steps_per_generation")
    if generated % group:
        raise RecipeError(
            f"{config.name}: {generated} completions, generated at once by {world} processes, are no "
            f"multiple of num_generations {group}; --processes N says how many processes there are."
        )
    parts = max(generated // batch, 1)
    updates = config.positive("num_iterations")
    if batch % group:  # less than a group: whole generation batches then
        batch, updates = generated, updates * parts
    key = "generation_batch_size" if config.given("generation_batch_size") else "steps_per_generation"
    if parts > 1:
        config.changed[key] = (
            f"TRL takes {parts} steps, each on a part of what was generated at once; here "
            + (
                "they are all on the whole of it"
                if batch == generated
                else "every step has rollouts of its own"
            )
        )
    how = (
        f"per_device_train_batch_size {device} × gradient_accumulation_steps {accumulation} × {world} "
        f"process{'es' if world > 1 else ''}"
    )
    if batch == generated and parts > 1:
        how = f"generation batch {generated}"
    prompts = Commented(batch // group, f"{how} ÷ num_generations {group}")
    return group, prompts, updates, _steps(config, batch // group, updates, rows)


def _steps(config: Config, prompts: int, updates: int, rows: int | None) -> Any:
    limit = config.count("max_steps")
    if limit > 0:
        return math.ceil(limit / updates)
    epochs = config.number("num_train_epochs")
    if rows is not None:
        return Commented(
            max(math.ceil(epochs * rows / prompts), 1), f"{epochs:g} × {rows:,} rows ÷ {prompts}"
        )
    config.left_out["num_train_epochs"] = (
        f"how many rows there are is not known here: steps is {STEPS}, a guess; {epochs:g} passes over N "
        f"prompts are {epochs:g} × N ÷ {prompts}"
    )
    return Commented(STEPS, f"a guess: {epochs:g} passes over N prompts are {epochs:g} × N ÷ {prompts}")


def _loss(config: Config) -> Tree:
    kind, level = config.text("loss_type"), config.text("importance_sampling_level")
    if kind not in LOSSES:
        config.left_out["loss_type"] = f"{kind} is not offered; the recipe has dapo, TRL's default"
        kind = "dapo"
    if kind == "bnpo":
        config.changed["loss_type"] = "the mean is over all tokens of the batch and not of each micro-batch"
    if level == "sequence":
        if kind != "grpo":
            config.changed["importance_sampling_level"] = (
                f"gspo: ratios of sequences, and a mean over sequences where TRL's {kind} has its own"
            )
        kind = "gspo"
    loss: Tree = {"kind": kind, "clip_low": config.number("epsilon")}
    loss |= _clip_high(config, kind)
    if config.given("delta"):
        loss["dual_clip"] = Commented(config.number("delta"), "delta")
    if config.text("multi_objective_aggregation") == "sum_then_normalize":
        scale = {True: "group", False: "none", "True": "group", "False": "none"}
        given = config.raw("scale_rewards")
        loss["scale"] = scale.get(given, given)
    if beta := config.number("beta"):
        loss["kl"] = beta
    if entropy := config.number("entropy_coef"):
        loss["entropy"] = entropy
    return {**loss, "importance": _importance(config)}


def _clip_high(config: Config, kind: str) -> Tree:
    if kind != "cispo":
        return {"clip_high": config.number("epsilon_high")} if config.given("epsilon_high") else {}
    cap = config.number("epsilon_high" if config.given("epsilon_high") else "epsilon")
    if cap <= 1:
        config.left_out["epsilon_high"] = f"the ratio is capped at 1 + clip_high, which cannot be {cap:g}"
        return {}
    return {"clip_high": Commented(round(cap - 1, 12), f"the ratio's cap is 1 + clip_high = {cap:g}")}


def _importance(config: Config) -> Tree:
    """TRL corrects for vLLM's log-probs alone."""
    if not (config.flag("use_vllm") and config.flag("vllm_importance_sampling_correction")):
        return {"mode": "none"}
    cap = "vllm_importance_sampling_cap"
    cap = cap if config.given(cap) else "vllm_importance_sampling_clip_max"
    return {"mode": config.text("vllm_importance_sampling_mode"), "cap": config.number(cap)}


def _optimizer(config: Config, updates: int) -> Tree:
    optimizer: Tree = {}
    if config.given("optim"):
        optimizer["name"] = config.text("optim")
    optimizer["learning_rate"] = config.number("learning_rate")
    schedule = config.text("lr_scheduler_type")
    if schedule not in SCHEDULES:
        config.left_out["lr_scheduler_type"] = (
            f"{schedule} is not offered; the recipe has TRL's default, linear"
        )
    optimizer["schedule"] = SCHEDULES.get(schedule, "linear")
    warmup = config.number("warmup_steps")
    if 0 < warmup < 1:  # a share of all updates
        warmup = Commented(math.ceil(warmup * updates), f"{warmup:g} of {updates} updates")  # type: ignore[assignment]
    elif schedule == "constant":
        warmup = 0  # transformers' schedule of this name has none
    if warmup:
        optimizer["warmup_steps"] = int(warmup) if isinstance(warmup, float) else warmup
    optimizer["weight_decay"] = config.number("weight_decay")
    betas = [config.number("adam_beta1"), config.number("adam_beta2")]
    return {**optimizer, "betas": betas, "max_grad_norm": config.number("max_grad_norm")}


def _saving(config: Config, updates: int, steps: int) -> Tree:
    strategy = config.text("save_strategy")
    if strategy == "no":
        return {}
    if strategy != "steps":
        config.left_out["save_strategy"] = f"checkpoints are written every so many steps, not by {strategy}"
        return {}
    every = config.number("save_steps")
    every = every * steps if every < 1 else every / updates
    keep = (
        {"keep_checkpoints": config.positive("save_total_limit")} if config.given("save_total_limit") else {}
    )
    if not keep:
        config.changed["save_total_limit"] = "the two newest checkpoints are kept; TRL keeps all"
    return {"save_steps": max(math.ceil(every), 1), **keep}
