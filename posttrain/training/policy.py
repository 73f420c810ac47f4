"""The policy trainer: plan, generate, score, advantages, update, sync.

One step of `transformers.Trainer` is one optimiser step; `training_step` owns the micro-batches. The Trainer
brings optimisers, schedulers, clipping, trackers, checkpoints and every way of distributing that accelerate
knows. Everything specific to learning from rewards is here and in the pure modules beside.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType, gather_object
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments

from posttrain.errors import TrainingError
from posttrain.methods.base import Channel, LossTerm, Method, StepContext
from posttrain.recipe.schema import PolicyStage, RolloutConfig
from posttrain.rollout.engine import RolloutEngine
from posttrain.rollout.types import RolloutBatch, derive_seed
from posttrain.training.advantages import Floats
from posttrain.training.around import AroundUpdate
from posttrain.training.batch import MicroBatch, Packing, TrainRow, empty_row, rollout_row, supervised_rows
from posttrain.training.buffer import PendingBatch, State, Tensors, UpdateBatch
from posttrain.training.collect import SOLUTION, Collected, Collector
from posttrain.training.distributed import check_backend
from posttrain.training.forward import (
    Reference,
    choose_packing,
    policy_logprobs,
    prepare_model,
    verify_packing,
)
from posttrain.training.gradients import GradientComparison, asked, cut, require_affordable
from posttrain.training.health import (
    MISMATCH,
    WeightsWatch,
    check_sync,
    finite_gradients,
    refuse_bad_loss,
    rollout_metrics,
    update_metrics,
)
from posttrain.training.losses import Denominators, Stats, merge_stats
from posttrain.training.objective import member_counts, objective
from posttrain.training.provenance import StepRecord
from posttrain.training.tally import Tally

logger = logging.getLogger(__name__)

OUTCOME = "outcome"


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
        bad_batches: Path | None = None,
        on_rollouts: Callable[[StepRecord], None] = lambda record: None,
        on_log: Callable[[int, int, dict[str, Any]], None] = lambda step, steps, metrics: None,
    ):
        """`on_rollouts` sees every rollout batch on every rank, `on_log` every line of metrics on rank 0.

        Batches whose loss or gradient is not finite are kept in the folder `bad_batches`.
        """
        super().__init__(
            model=model, args=arguments, processing_class=tokenizer, callbacks=[AroundUpdate(self)]
        )
        self.remove_callback(PrinterCallback)
        check_backend(self.accelerator)
        if arguments.gradient_accumulation_steps != 1:
            raise TrainingError("gradient_accumulation_steps must be 1: micro_batch_tokens cuts the batch")
        self.collector = collector
        self.stage = stage
        self.rollout = rollout
        self.methods = methods
        self.reference = reference
        self.seed = seed
        self.verify_tolerance = verify_tolerance
        self.bad_batches = bad_batches or Path(arguments.output_dir) / "bad_batches"
        self.on_rollouts = on_rollouts
        self.on_log = on_log
        prepare_model(self.policy)
        require_affordable(self.policy, methods)
        self.packing: Packing | None = None
        self.watch = WeightsWatch(self.policy)
        self.totals = Tally()
        self._batch: UpdateBatch | None = None
        self._pending: PendingBatch | None = None
        self._comparison: GradientComparison | None = None
        self._sampler = ThreadPoolExecutor(1, "posttrain-sampler") if stage.overlap else None
        self._metrics: dict[str, float] = {}
        self._synced_at = 0
        self._learning_rate = 0.0
        self._bad = False
        self._bad_in_a_row = 0

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
        if self.packing is None:
            device = self.accelerator.device
            self.packing = verify_packing(model, self.policy, choose_packing(self.policy), device)
        # The Trainer's own counter, not the loader's item: it is what a checkpoint goes on from.
        step, update = divmod(self.state.global_step, self.stage.updates_per_batch)
        if update == 0:
            self._batch = self._prepare(model, step)
        elif self._pending is not None and self.methods:
            self._extended(self._pending)  # here, so that a checkpoint after any update finds it done
        assert self._batch is not None
        batch = self._batch
        started = time.monotonic()
        loss = self._update(model, batch, first=update == 0)
        batch.metrics.total("seconds/update", time.monotonic() - started)
        self._metrics = Tally.merged(gather_object([batch.metrics])).values()
        self._metrics["loss"] = self.accelerator.reduce(loss, "mean").item()
        self._bad = not np.isfinite([self._metrics["loss"], self._metrics.get(MISMATCH, 0.0)]).all()
        # The Trainer sums the losses between two lines of its log: one NaN would stay there for good.
        return torch.zeros_like(loss) if self._bad else loss

    # --- plan, generate, score, advantages -------------------------------------------------------------

    def _prepare(self, model: Any, step: int) -> UpdateBatch:
        pending = self._pending or self._sample(step)
        collected = self._extended(pending)
        stale = pending.version != self.engine.version or self.state.global_step != self._synced_at
        overlapped = self._sampler is not None and step + 1 < self.stage.steps
        self._pending = self._sample(step + 1, self._sampler) if overlapped else None
        tally, contexts = pending.tally, pending.contexts

        channels = self._channels(collected.batch, contexts)
        terms = [t for m, context in zip(self.methods, contexts, strict=False) for t in m.auxiliary(context)]
        self._comparison = asked(self.methods, collected.batch, contexts)
        if self.stage.mask_truncated:
            collected.drop([r for r in collected.batch if r.truncated], lambda _: "truncated")
        rows = [row for rollout in collected.batch if (row := rollout_row(rollout, channels)) is not None]
        rows += [row for term in terms for row in supervised_rows(term)]
        batch = UpdateBatch(
            step=step,
            version=pending.version,
            stale=stale,
            micro_batches=cut(rows, terms, self._comparison, self._micro_batches),
            channels={channel.name: channel.weight for channel in channels},
            terms={term.name: term.weight for term in terms},
            denominators=self._denominators(rows, channels, terms),
            metrics=tally,
            contexts=contexts,
        )
        self._fill_logprobs(model, batch)
        rollout_metrics(tally, collected, rows)
        self.on_rollouts(StepRecord(step * self.stage.updates_per_batch + 1, collected, channels, terms))
        return batch

    def _sample(self, step: int, sampler: ThreadPoolExecutor | None = None) -> PendingBatch:
        """Sample and score a batch with the weights of now: here, or in the thread of `sampler`."""
        tally = Tally()
        started = time.monotonic()
        self._sync_engine()
        tally.total("seconds/sync", time.monotonic() - started)
        contexts = self._contexts(step, tally)
        requests = self.collector.plan(self._slots(), contexts)
        future: Future[Collected]
        if sampler is not None:
            future = sampler.submit(self.collector.sample, requests, step)
        else:
            future = Future()
            future.set_result(self.collector.sample(requests, step))
        return PendingBatch(step, self.engine.version, contexts, tally, future)

    def _extended(self, pending: PendingBatch) -> Collected:
        """The rollouts of a batch with the methods' follow-ups, which need the engine it was sampled by."""
        collected = pending.future.result()
        if not pending.extended:
            self.collector.extend(collected, pending.contexts)
            pending.extended = True
        return collected

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

    def _contexts(self, step: int, tally: Tally) -> list[StepContext]:
        """One context for each method; one that belongs to none when there are none."""
        methods: Sequence[Method | None] = self.methods or [None]
        return [self._context(step, method, tally) for method in methods]

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
            score=lambda rollouts: self.collector.score_follow_ups(rollouts, tally, step),
            gather=lambda value: gather_object([value]),
            sampling=self.collector.sampling,
            loss=self.stage.loss,
            seed=self.seed,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )

    def _channels(self, batch: RolloutBatch, contexts: Sequence[StepContext]) -> list[Channel]:
        """The outcome channel, then what the methods add; a later channel replaces one of the same name."""
        solutions = batch.with_role(SOLUTION).rollouts
        advantages = self.collector.advantages(solutions, contexts[0].step, self._summed)
        channels = {OUTCOME: Channel(OUTCOME, advantages)}
        for method, context in zip(self.methods, contexts, strict=False):
            channels |= {channel.name: channel for channel in method.channels(batch, context)}
        weighed = list(channels.values())
        for method, context in zip(self.methods, contexts, strict=False):
            weighed = method.weigh(weighed, context)
        return weighed

    def _summed(self, values: Floats) -> Floats:
        """Values of this rank, summed over all ranks."""
        local = torch.tensor(values, device=self.accelerator.device)
        return np.asarray(self.accelerator.reduce(local, "sum").cpu())

    # --- update ----------------------------------------------------------------------------------------

    def _denominators(
        self, rows: Sequence[TrainRow], channels: Sequence[Channel], terms: Sequence[LossTerm]
    ) -> dict[str, Denominators]:
        """Sequences and tokens of every channel and term, over all ranks."""
        counts = member_counts(rows, channels, terms)
        local = torch.tensor([*counts.values()], dtype=torch.float64, device=self.accelerator.device)
        total = self.accelerator.reduce(local, "sum").tolist()
        return {
            name: Denominators(max(sequences, 1.0), max(tokens, 1.0), self.rollout.max_tokens)
            for name, (sequences, tokens) in zip(counts, total, strict=True)
        }

    def _micro_batches(self, rows: Sequence[TrainRow]) -> list[list[TrainRow]]:
        """Micro-batches, as many on every rank: collectives run once per micro-batch."""
        assert self.packing is not None
        micro_batches = self.packing.split(rows, self.stage.micro_batch_tokens)
        count = torch.tensor([len(micro_batches)], device=self.accelerator.device)
        most = max(int(self.accelerator.gather(count).max()), 1)
        return micro_batches + [[empty_row()]] * (most - len(micro_batches))

    def _collate(self, rows: Sequence[TrainRow]) -> MicroBatch:
        assert self.packing is not None
        return self.packing.collate(rows, self.accelerator.device)

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
        return policy_logprobs(
            model,
            self.policy,
            micro,
            temperature=self.rollout.temperature,
            train_entropy=self.stage.loss.entropy != 0,
        )

    def _update(self, model: Any, batch: UpdateBatch, *, first: bool) -> torch.Tensor:
        """Forward and backward of every micro-batch. The mean over ranks of what it returns is the loss."""
        total = torch.zeros((), device=self.accelerator.device)
        parts: list[Stats] = []
        comparison, self._comparison = self._comparison, None
        with comparison.watching(self.policy) if comparison else nullcontext():
            if comparison:
                self._compare(model, comparison)
            for index, rows in enumerate(batch.micro_batches):
                if comparison:
                    comparison.step_into(index)
                with self._micro_step(model, last=index == len(batch.micro_batches) - 1):
                    loss, stats = self._loss(model, batch, rows)
                    total += loss.detach()
                    if self._deepspeed and self.accelerator.sync_gradients:
                        refuse_bad_loss(self.accelerator, total, self.state.global_step + 1)
                    self._backward(loss)
                parts += [stats] if stats else []
        if comparison:
            comparison.tell(self.accelerator, self.lr_scheduler.get_last_lr()[0])
        self._record(merge_stats(parts), batch, first=first)
        return total

    def _compare(self, model: Any, comparison: GradientComparison) -> None:
        """Have a comparison see its own gradient; nothing of it is left behind."""
        for rows in comparison.micro_batches:
            with self._micro_step(model, last=False):
                with self.compute_loss_context_manager():
                    micro = self._collate(rows)
                    surrogate = comparison.surrogate(micro, self._logprobs(model, micro)[0], self.accelerator)
                self._backward(surrogate)
        comparison.begin(self.accelerator)

    @property
    def _deepspeed(self) -> bool:
        return bool(self.accelerator.distributed_type == DistributedType.DEEPSPEED)

    @contextmanager
    def _micro_step(self, model: Any, *, last: bool) -> Iterator[None]:
        """Around a forward and backward pass: ranks put their gradients together in the last."""
        # DeepSpeed takes its accumulation boundary from sync_gradients and refuses no_sync.
        self.accelerator.sync_gradients = last
        with nullcontext() if last or self._deepspeed else self.accelerator.no_sync(model):
            yield

    def _loss(self, model: Any, batch: UpdateBatch, rows: Sequence[TrainRow]) -> tuple[torch.Tensor, Stats]:
        """The loss of a micro-batch. Gradients are averaged over ranks; the loss is a sum over them."""
        with self.compute_loss_context_manager():
            micro = self._collate(rows)
            loss, stats = objective(
                batch,
                micro,
                *self._logprobs(model, micro),
                loss=self.stage.loss,
                several_updates=self.stage.updates_per_batch > 1,
            )
        return loss * self.accelerator.num_processes, stats

    def _backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self._deepspeed else {}))

    def _record(self, stats: Stats, batch: UpdateBatch, *, first: bool) -> None:
        """Metrics of the update, and the check that the engine had the policy's weights."""
        mismatch = update_metrics(batch.metrics, stats)
        if first and not batch.stale and batch.version <= self.stage.verify_syncs:
            step = self.state.global_step + 1
            check_sync(mismatch, self.verify_tolerance, step, batch.version)

    def before_optimizer_step(self) -> None:
        """Take the gradients away from an optimiser that must not step, and keep what they came from."""
        self._learning_rate = self.lr_scheduler.get_last_lr()[0]  # after the step it is the next one's
        if not self._bad:
            finite = torch.tensor([float(finite_gradients(self.model))], device=self.accelerator.device)
            self._bad = self.accelerator.reduce(finite, "sum").item() < self.accelerator.num_processes
        if not self._bad:
            self._bad_in_a_row = 0
            return
        assert self._batch is not None
        self._bad_in_a_row += 1
        self._metrics["bad_steps"] = self._bad_in_a_row
        self.model.zero_grad(set_to_none=True)  # an optimiser leaves parameters without a gradient alone
        step = self.state.global_step + 1
        folder = self.bad_batches / f"step-{step:06d}"
        why = {"loss": repr(self._metrics["loss"]), "step": step}
        self._batch.write(folder, self.accelerator.process_index, why)
        message = "step %d: loss %s or its gradient is not finite; weights not updated, batch kept in %s"
        logger.warning(message, step, self._metrics["loss"], folder)

    def after_update(self) -> None:
        """The optimiser has stepped: check that it changed something, tell the methods."""
        assert self._batch is not None
        if self._bad:
            return
        loss, learned = self.stage.loss, ("tokens/with_advantage", "tokens/supervised")
        if any(self._metrics[name] for name in learned) or loss.kl or loss.entropy:
            self.watch.after_step(self.policy, self._learning_rate, self.state.global_step)
        for method, context in zip(self.methods, self._batch.contexts, strict=False):
            method.after_update(context)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Join the step's own metrics to the Trainer's gradient norm and learning rate.

        Raises:
            TrainingError: too many steps in a row could not be taken.
        """
        if "loss" in logs:
            logs = {**logs, **self._metrics}
            for name in ("tokens/sampled", "tokens/trained"):
                self.totals.total(name, logs.get(name, 0.0))
            if self.is_world_process_zero():
                self.on_log(self.state.global_step, self.args.max_steps, logs)
            if self._bad_in_a_row >= self.stage.max_bad_steps:
                raise TrainingError(
                    f"{self._bad_in_a_row} steps in a row, up to step {self.state.global_step}, had a loss "
                    f"or gradient that is not finite; the batches are in {self.bad_batches}"
                )
        super().log(logs, start_time)

    # --- checkpoints -----------------------------------------------------------------------------------

    def state_dict(self) -> tuple[State, Tensors]:
        """What this rank's part of a checkpoint holds beside the Trainer's own files: JSON and tensors."""
        if self._pending is not None:
            self._extended(self._pending)  # first, since it may change the methods' state
        state: State = {
            "totals": self.totals.state(),
            "watching": self.watch.before is not None,
            "engine_version": self.engine.version,
            "bad_in_a_row": self._bad_in_a_row,
            "methods": {method.name: method.state_dict() for method in self.methods},
        }
        tensors: Tensors = {}
        if self._batch is not None and self.state.global_step % self.stage.updates_per_batch:
            state["batch"], tensors = self._batch.state()
        if self._pending is not None:
            state["pending"] = self._pending.state()
        return state, tensors

    def load_state_dict(self, state: State, tensors: Tensors) -> None:
        """Take back what `state_dict` gave; the Trainer takes back its own files itself."""
        self.totals = Tally.from_state(state["totals"])
        if not state["watching"]:
            self.watch.before = None
        self.engine.version = state["engine_version"]
        self._synced_at = -1  # the engine may hold the weights that the stage began with
        self._bad_in_a_row = state["bad_in_a_row"]
        for method in self.methods:
            method.load_state_dict(state["methods"][method.name])
        if "batch" in state:
            contexts = self._contexts(state["batch"]["step"], Tally())
            self._batch = UpdateBatch.from_state(state["batch"], tensors, contexts)
        if "pending" in state:
            tally = Tally()
            contexts = self._contexts(state["pending"]["step"], tally)
            self._pending = PendingBatch.from_state(state["pending"], tally, contexts)

    def close(self) -> None:
        """Wait for a batch that is being sampled; nothing is sampled afterwards."""
        if self._sampler is not None:
            self._sampler.shutdown(wait=True, cancel_futures=True)
