"""The policy trainer: plan, generate, score, advantages, update, sync.

One step of `transformers.Trainer` is one optimiser step; `training_step` owns the micro-batches. The Trainer
brings optimisers, schedulers, clipping, trackers, checkpoints and every way of distributing that accelerate
knows. Everything specific to learning from rewards is here and in the pure modules beside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType, gather_object
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from posttrain.errors import TrainingError
from posttrain.methods.base import Channel, LossTerm, Method, StepContext
from posttrain.recipe.schema import LossConfig, PolicyStage, RolloutConfig
from posttrain.rollout.engine import RolloutEngine
from posttrain.rollout.types import Rollout, RolloutBatch, derive_seed
from posttrain.training.advantages import BatchStats, batch_moments, compute_advantages, default_scale
from posttrain.training.batch import (
    MicroBatch,
    TrainRow,
    collate,
    empty_row,
    rollout_row,
    split_rows,
    supervised_rows,
)
from posttrain.training.collect import SOLUTION, Collected, Collector
from posttrain.training.forward import Reference, check_output_head, policy_logprobs
from posttrain.training.health import WeightsWatch, check_sync, rollout_metrics
from posttrain.training.losses import Denominators, Stats, mean_stats, merge_stats, nll_loss, policy_loss
from posttrain.training.tally import Tally

OUTCOME = "outcome"


@dataclass
class UpdateBatch:
    """What the optimiser steps on one rollout batch work with; counts are over all ranks."""

    version: int
    micro_batches: list[list[TrainRow]]
    channels: list[Channel]
    terms: list[LossTerm]
    denominators: dict[str, Denominators]
    metrics: Tally = field(default_factory=Tally)
    contexts: Sequence[StepContext] = ()


@dataclass(frozen=True)
class StepRecord:
    """What a step leaves for the run folder."""

    step: int
    collected: Collected
    channels: list[Channel]


class PolicyTrainer(Trainer):
    """Trains a policy on the rewards of its own rollouts."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        model: Any,
        tokenizer: Any,
        arguments: TrainingArguments,
        collector: Collector,
        stage: PolicyStage,
        rollout: RolloutConfig,
        methods: Sequence[Method] = (),
        reference: Reference | None = None,
        seed: int = 0,
        verify_tolerance: float = 1e-3,
        on_rollouts: Callable[[StepRecord], None] = lambda record: None,
        on_log: Callable[[int, int, dict[str, Any]], None] = lambda step, steps, metrics: None,
    ):
        """`on_rollouts` sees every rollout batch on every rank, `on_log` every line of metrics on rank 0."""
        super().__init__(
            model=model, args=arguments, processing_class=tokenizer, callbacks=[_AfterUpdate(self)]
        )
        self.remove_callback(PrinterCallback)
        if arguments.gradient_accumulation_steps != 1:
            raise TrainingError("gradient_accumulation_steps must be 1: micro_batch_tokens cuts the batch")
        self.collector = collector
        self.stage = stage
        self.rollout = rollout
        self.methods = methods
        self.reference = reference
        self.seed = seed
        self.verify_tolerance = verify_tolerance
        self.on_rollouts = on_rollouts
        self.on_log = on_log
        self.watch = WeightsWatch(self.policy)
        self.totals = Tally()
        self._batch: UpdateBatch | None = None
        self._metrics: dict[str, float] = {}
        self._synced_at = 0

    @property
    def policy(self) -> Any:
        """The unwrapped policy."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def engine(self) -> RolloutEngine:
        """The engine that the rollouts come from."""
        return self.collector.engine

    def get_train_dataloader(self) -> DataLoader:
        """One item per optimiser step: its number. Prompts come from the collector."""
        return DataLoader(
            range(self.args.max_steps), batch_size=1, collate_fn=lambda steps: {"step": steps[0]}
        )

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Not counted: the inputs of a step are not tensors."""
        return 0

    def training_step(
        self, model: Any, inputs: Mapping[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """One optimiser step's gradients; the first on a rollout batch also samples and scores the batch."""
        model.train()
        step, update = divmod(inputs["step"], self.stage.updates_per_batch)
        if update == 0:
            self._batch = self._prepare(model, step)
        assert self._batch is not None
        started = time.monotonic()
        loss = self._update(model, self._batch, first=update == 0)
        self._batch.metrics.total("seconds/update", time.monotonic() - started)
        self._metrics = Tally.merged(gather_object([self._batch.metrics])).values()
        return loss

    # --- plan, generate, score, advantages -------------------------------------------------------------

    def _prepare(self, model: Any, step: int) -> UpdateBatch:
        tally = Tally()
        started = time.monotonic()
        self._sync_engine()
        tally.total("seconds/sync", time.monotonic() - started)
        contexts = [self._context(step, method, tally) for method in self.methods]
        collected = self.collector.collect(self._slots(), contexts or [self._context(step, None, tally)])

        channels = self._channels(collected.batch, contexts)
        terms = [
            term
            for method, context in zip(self.methods, contexts, strict=True)
            for term in method.auxiliary(context)
        ]
        trained = collected.batch
        if self.stage.mask_truncated:
            collected.drop([rollout for rollout in trained if rollout.truncated], lambda _: "truncated")
        rows = [row for rollout in collected.batch if (row := rollout_row(rollout, channels)) is not None]
        rows += [row for term in terms for row in supervised_rows(term)]
        denominators = self._denominators(rows, channels, terms)
        batch = UpdateBatch(
            self.engine.version, self._micro_batches(rows), channels, terms, denominators, tally, contexts
        )
        if step == 0 and rows:
            check_output_head(self.policy, self._collate(batch.micro_batches[0]))
        self._fill_logprobs(model, batch)
        rollout_metrics(tally, collected, rows)
        self.on_rollouts(StepRecord(step * self.stage.updates_per_batch + 1, collected, channels))
        return batch

    def _sync_engine(self) -> None:
        """Bring the engine to the current weights, once per policy version."""
        if self.state.global_step != self._synced_at:
            self.engine.sync(self.policy)
            self._synced_at = self.state.global_step

    def _slots(self) -> range:
        """This rank's share of the step's prompts; sizes differ by at most one."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        prompts = self.stage.prompts_per_step
        return range(rank * prompts // world, (rank + 1) * prompts // world)

    def _context(self, step: int, method: Method | None, tally: Tally) -> StepContext:
        name = method.name if method else ""
        return StepContext(
            step=step,
            engine=self.engine,
            tokenizer=self.processing_class,
            model=self.policy,
            rng=np.random.default_rng(
                derive_seed(self.seed, step, "method", name, self.accelerator.process_index)
            ),
            log=lambda key, value: tally.mean(f"{name}/{key}", value),
            score=lambda rollouts: self.collector.score(rollouts, Collected(RolloutBatch([])), step),
        )

    def _channels(self, batch: RolloutBatch, contexts: Sequence[StepContext]) -> list[Channel]:
        """The outcome channel, then what the methods add; a later channel replaces one of the same name."""
        channels = {OUTCOME: self._outcome(batch.with_role(SOLUTION).rollouts)}
        for method, context in zip(self.methods, contexts, strict=True):
            channels |= {channel.name: channel for channel in method.channels(batch, context)}
        return list(channels.values())

    def _outcome(self, rollouts: list[Rollout]) -> Channel:
        loss = self.stage.loss
        rewards = np.array([rollout.reward for rollout in rollouts], dtype=np.float64)
        groups = [rollout.request.group for rollout in rollouts]
        stats = None
        if (loss.scale or default_scale(loss.kind)) == "batch":
            moments = torch.tensor(batch_moments(loss.kind, rewards, groups), device=self.accelerator.device)
            stats = BatchStats.from_moments(self.accelerator.reduce(moments, "sum").cpu().numpy())
        advantages = compute_advantages(loss.kind, loss.scale, rewards, groups, stats)
        return Channel(
            OUTCOME,
            {rollout.id: float(value) for rollout, value in zip(rollouts, advantages, strict=True)},
        )

    # --- update ----------------------------------------------------------------------------------------

    def _denominators(
        self, rows: Sequence[TrainRow], channels: Sequence[Channel], terms: Sequence[LossTerm]
    ) -> dict[str, Denominators]:
        """Sequences and tokens of every channel and term, over all ranks."""
        counts = []
        for name, table in [
            *((c.name, "advantages") for c in channels),
            *((t.name, "nll_weights") for t in terms),
        ]:
            members = [row for row in rows if name in getattr(row, table)]
            counts.append([len(members), sum(len(row.positions) for row in members)])
        total = self.accelerator.reduce(
            torch.tensor(counts, dtype=torch.float64, device=self.accelerator.device), "sum"
        )
        names = [*(channel.name for channel in channels), *(term.name for term in terms)]
        return {
            name: Denominators(max(sequences, 1.0), max(tokens, 1.0), self.rollout.max_tokens)
            for name, (sequences, tokens) in zip(names, total.tolist(), strict=True)
        }

    def _micro_batches(self, rows: Sequence[TrainRow]) -> list[list[TrainRow]]:
        """Micro-batches, as many on every rank: collectives run once per micro-batch."""
        micro_batches = split_rows(rows, self.stage.micro_batch_tokens)
        count = torch.tensor([len(micro_batches)], device=self.accelerator.device)
        most = max(int(self.accelerator.gather(count).max()), 1)
        return micro_batches + [[empty_row(self._pad)]] * (most - len(micro_batches))

    @property
    def _pad(self) -> int:
        tokenizer = self.processing_class
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def _collate(self, rows: Sequence[TrainRow]) -> MicroBatch:
        return collate(rows, self._pad, self.accelerator.device)

    def _fill_logprobs(self, model: Any, batch: UpdateBatch) -> None:
        """Log-probs that stay fixed over the updates on a batch: the old policy's and the reference's.

        With a single update the old log-probs are those of the update's own forward pass.
        """
        several = self.stage.updates_per_batch > 1
        if not (several or self.reference):
            return
        for rows in batch.micro_batches:
            micro = self._collate(rows)
            bounds = np.cumsum([len(row.positions) for row in rows])[:-1]
            with torch.no_grad(), self.compute_loss_context_manager():
                if several:
                    logprobs, _ = self._logprobs(model, micro)
                    for row, part in zip(rows, np.split(logprobs.cpu().numpy(), bounds), strict=True):
                        row.old_logprobs = part
                if self.reference:
                    logprobs = self.reference.logprobs(
                        model, self.policy, micro, temperature=self.rollout.temperature
                    )
                    for row, part in zip(rows, np.split(logprobs.cpu().numpy(), bounds), strict=True):
                        row.reference_logprobs = part

    def _logprobs(self, model: Any, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        return policy_logprobs(model, self.policy, micro, temperature=self.rollout.temperature)

    def _update(self, model: Any, batch: UpdateBatch, *, first: bool) -> torch.Tensor:
        """Forward and backward of every micro-batch. The mean over ranks of what it returns is the loss."""
        accelerator = self.accelerator
        deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        total = torch.zeros((), device=accelerator.device)
        parts: list[Stats] = []
        for index, rows in enumerate(batch.micro_batches):
            last = index == len(batch.micro_batches) - 1
            # DeepSpeed takes its accumulation boundary from sync_gradients and refuses no_sync.
            accelerator.sync_gradients = last
            with nullcontext() if last or deepspeed else accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    loss, stats = self._loss(model, batch, self._collate(rows))
                # Gradients are averaged over ranks; the loss is a sum over them.
                loss = loss * accelerator.num_processes
                accelerator.backward(loss, **({"scale_wrt_gas": False} if deepspeed else {}))
            total += loss.detach()
            parts += [stats] if stats else []
        self._check_update(total, merge_stats(parts), batch, first=first)
        return total

    def _loss(self, model: Any, batch: UpdateBatch, micro: MicroBatch) -> tuple[torch.Tensor, Stats]:
        """Σ weight · channel + Σ weight · term, each over its own denominator."""
        logprobs, entropy = self._logprobs(model, micro)
        loss = logprobs.sum() * 0.0  # keeps every weight in the graph when a micro-batch trains no channel
        stats: Stats = {}
        for index, channel in enumerate(batch.channels):
            member, advantages = micro.select("advantages", channel.name)
            if index > 0 and not member.any():
                continue
            config = self._channel_config(first=index == 0)
            part, found = policy_loss(
                config,
                logprobs=logprobs[member],
                advantages=advantages,
                sequence=micro.row[member],
                denominators=batch.denominators[channel.name],
                entropy=(entropy if config.entropy else entropy.detach())[member],
                **self._fixed_logprobs(micro, member, config),
            )
            loss = loss + channel.weight * part
            stats = stats or found
        for term in batch.terms:
            member, weights = micro.select("nll_weights", term.name)
            denominator = batch.denominators[term.name].tokens
            loss = loss + term.weight * nll_loss(logprobs[member], weights, denominator)
        return loss, stats

    def _channel_config(self, *, first: bool) -> LossConfig:
        """KL and entropy are terms of the whole loss: only the first channel carries them."""
        loss = self.stage.loss
        return loss if first else loss.model_copy(update={"kl": 0.0, "entropy": 0.0})

    def _fixed_logprobs(self, micro: MicroBatch, member: torch.Tensor, config: LossConfig) -> dict[str, Any]:
        """The [N] log-probs of a channel's tokens that do not depend on the weights."""
        names = ["sampling_logprobs"]
        if self.stage.updates_per_batch > 1:
            names.append("old_logprobs")
        if config.kl:
            names.append("reference_logprobs")
        rollouts = [row for row in micro.rows if row.is_rollout]
        is_rollout = torch.tensor([row.is_rollout for row in micro.rows], device=micro.row.device)[micro.row]
        part = replace(micro, rows=rollouts)
        return {name: part.flat(name)[member[is_rollout]] for name in names}

    def _check_update(self, loss: torch.Tensor, stats: Stats, batch: UpdateBatch, *, first: bool) -> None:
        """Metrics of the update, and the checks that stop a run which learns nothing or nonsense."""
        step = self.state.global_step + 1
        if not torch.isfinite(loss):
            raise TrainingError(f"the loss of step {step} is {float(loss)}; the weights were not updated")
        values = mean_stats(stats) if stats else {}
        tokens = values.pop("tokens", 0.0)
        tally = batch.metrics
        for key, name in METRIC_NAMES.items():
            if key in values:
                tally.mean(name, values[key], tokens)
        if first and batch.version <= self.stage.verify_syncs:
            check_sync(values.get("mismatch", 0.0), self.verify_tolerance, step, batch.version)

    def after_update(self) -> None:
        """The optimiser has stepped: check that it changed something, tell the methods."""
        assert self._batch is not None
        loss = self.stage.loss
        if self._metrics["tokens/with_advantage"] or self._batch.terms or loss.kl or loss.entropy:
            self.watch.after_step(self.policy, self.lr_scheduler.get_last_lr()[0], self.state.global_step)
        for method, context in zip(self.methods, self._batch.contexts, strict=True):
            method.after_update(context)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Join the step's own metrics to the Trainer's loss, gradient norm and learning rate."""
        if "loss" in logs:
            logs = {**logs, **self._metrics}
            for name in ("tokens/sampled", "tokens/trained"):
                self.totals.total(name, logs.get(name, 0.0))
            if self.is_world_process_zero():
                self.on_log(self.state.global_step, self.args.max_steps, logs)
        super().log(logs, start_time)


METRIC_NAMES = {
    "entropy": "entropy",
    "kl": "kl",
    "ratio": "ratio/mean",
    "clipped_low": "ratio/clipped_low",
    "clipped_high": "ratio/clipped_high",
    "importance": "sampling/importance_ratio",
    "mismatch": "sampling/logprob_difference",
}


class _AfterUpdate(TrainerCallback):
    """Calls back when the optimiser has stepped."""

    def __init__(self, trainer: PolicyTrainer):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.after_update()
