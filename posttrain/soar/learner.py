"""Policy-gradient steps of one process: what teacher and students of SOAR learn with.

The parts are the policy trainer's: advantages, packing, forward pass, losses. Its loop is not: a
`transformers.Trainer` takes every step on all processes together, while here every process trains a student
of its own, and it is built for one long run where here sixteen runs of ten steps follow each other. A test
compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainingArguments, get_scheduler

from posttrain.errors import TrainingError
from posttrain.methods.base import Channel
from posttrain.recipe.schema import LossConfig, OptimizerConfig
from posttrain.rollout.types import Rollout, derive_seed
from posttrain.training.arguments import optimizer_arguments
from posttrain.training.batch import Packing, TrainRow, rollout_row
from posttrain.training.buffer import UpdateBatch
from posttrain.training.forward import (
    Reference,
    choose_packing,
    policy_logprobs,
    prepare_model,
    verify_packing,
)
from posttrain.training.health import finite_gradients
from posttrain.training.losses import Denominators
from posttrain.training.objective import member_counts, objective

CHANNEL = "outcome"


class Forward:
    """A model that is ready for training passes: its head, how rows are packed for it, in what it
    computes."""

    def __init__(self, model: Any, dtype: torch.dtype, *, temperature: float, micro_batch_tokens: int):
        """`dtype` is what the model computes in; bfloat16 is done by autocast, over weights in float32."""
        prepare_model(model)
        self.model = model
        self.dtype = dtype
        self.temperature = temperature
        self.micro_batch_tokens = micro_batch_tokens
        self.device = next(model.parameters()).device
        with self.autocast():
            self.packing: Packing = verify_packing(model, model, choose_packing(model), self.device)

    def autocast(self) -> Any:
        """The precision of passes through the model, sampling included."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype == torch.bfloat16 else nullcontext()

    def micro_batches(self, rows: Sequence[TrainRow]) -> list[list[TrainRow]]:
        """Rows cut under the budget of tokens."""
        return self.packing.split(rows, self.micro_batch_tokens)

    def note_reference(self, rows: Sequence[TrainRow], reference: Reference) -> None:
        """Fill the rows' log-probs under the reference."""
        for part in self.micro_batches(rows):
            micro = self.packing.collate(part, self.device)
            with self.autocast():
                logprobs = reference.logprobs(self.model, self.model, micro, temperature=self.temperature)
            ends = np.cumsum([len(row.positions) for row in part])[:-1]
            for row, values in zip(part, np.split(logprobs.float().cpu().numpy(), ends), strict=True):
                row.reference_logprobs = values


def optimizer_settings(optimizer: OptimizerConfig, folder: str) -> TrainingArguments:
    """A recipe's optimiser in the Trainer's terms; nothing is written to the folder."""
    return TrainingArguments(folder, report_to="none", **optimizer_arguments(optimizer, dtype=torch.float32))


class Learner:
    """An optimiser and what it does with scored rollouts. Its state is that of one run."""

    def __init__(
        self,
        forward: Forward,
        *,
        loss: LossConfig,
        arguments: TrainingArguments,
        max_tokens: int,
        steps: int,
        seed: int,
        max_bad_steps: int,
    ):
        """`arguments` are what `optimizer_settings` made; `steps` those of the learning rate's schedule."""
        self.forward = forward
        self.loss = loss
        self.max_tokens = max_tokens
        self.seed = seed
        self.max_bad_steps = max_bad_steps
        self.clip = arguments.max_grad_norm
        self.updates = 0
        self.bad_in_a_row = 0
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, forward.model)
        trained = [weight for weight in forward.model.parameters() if weight.requires_grad]
        decays = [
            [w for w in trained if w.ndim > 1],
            [w for w in trained if w.ndim <= 1],
        ]  # norms, biases not
        groups = [
            {"params": weights, "weight_decay": decay}
            for weights, decay in zip(decays, (arguments.weight_decay, 0.0), strict=True)
            if weights
        ]
        self.trained = trained
        self.optimizer = kind(groups, **options)
        self.schedule = get_scheduler(
            arguments.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
        )

    def update(
        self, rollouts: Sequence[Rollout], advantages: Sequence[float], reference: Reference | None = None
    ) -> dict[str, float]:
        """One optimiser step on rollouts with an advantage each; `reference` is needed for a KL term.

        Without KL and entropy terms completions with an advantage of 0 have no gradient: they count in the
        denominators and are not computed. Where nothing is left, the optimiser does not step, so that
        momentum alone moves nothing. The schedule goes on in any case.

        Returns:
            Metrics: loss, gradient norm, trained tokens, and the KL where there is a reference.

        Raises:
            TrainingError: too many steps in a row had a loss or gradient that is not finite.
        """
        torch.manual_seed(derive_seed(self.seed, "dropout", self.updates))
        self.updates += 1
        model = self.forward.model
        batch, rows = self._batch(rollouts, advantages)
        metrics = {"tokens/trained": float(sum(len(row.positions) for row in rows))}
        self.optimizer.zero_grad(set_to_none=True)
        if any(advantages) and rows:
            model.train()
            if reference is not None:
                self.forward.note_reference(rows, reference)
            metrics |= self._backward(batch, rows, reference is not None)
            if not self._finite(metrics["loss"]):
                self.optimizer.zero_grad(set_to_none=True)
            elif self.clip:
                norm = torch.nn.utils.clip_grad_norm_(self.trained, self.clip)
                metrics["grad_norm"] = float(norm)
        self.optimizer.step()  # which leaves weights without a gradient alone
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return metrics

    def advance(self, steps: int) -> None:
        """Bring schedule and seeds to where they are after so many steps; the optimiser's state is loaded."""
        self.optimizer.zero_grad(set_to_none=True)
        for _ in range(steps):
            self.optimizer.step()
            self.schedule.step()
        self.updates = steps

    def move(self, device: torch.device | str) -> None:
        """Take the optimiser's moments to a device, out of the way of others' on the one that trains."""
        for state in self.optimizer.state.values():
            for key, value in state.items():
                if (
                    isinstance(value, torch.Tensor) and value.ndim
                ):  # a step count stays where its optimiser wants it
                    state[key] = value.to(device)

    def _batch(
        self, rollouts: Sequence[Rollout], advantages: Sequence[float]
    ) -> tuple[UpdateBatch, list[TrainRow]]:
        channel = Channel(CHANNEL, {r.id: float(a) for r, a in zip(rollouts, advantages, strict=True)})
        rows = [row for rollout in rollouts if (row := rollout_row(rollout, [channel])) is not None]
        sequences, tokens = member_counts(rows, [channel], [])[CHANNEL]
        if not (self.loss.kl or self.loss.entropy):
            rows = [row for row in rows if row.advantages[CHANNEL].any()]
        batch = UpdateBatch(
            step=self.updates,
            version=0,
            stale=False,
            micro_batches=self.forward.micro_batches(rows),
            channels={CHANNEL: 1.0},
            terms={},
            denominators={CHANNEL: Denominators(max(sequences, 1.0), max(tokens, 1.0), self.max_tokens)},
        )
        return batch, rows

    def _backward(self, batch: UpdateBatch, rows: Sequence[TrainRow], kl: bool) -> dict[str, float]:
        forward, loss_sum, kl_sum = self.forward, 0.0, 0.0
        for part in batch.micro_batches:
            micro = forward.packing.collate(part, forward.device)
            with forward.autocast():
                logprobs, entropy = policy_logprobs(
                    forward.model,
                    forward.model,
                    micro,
                    temperature=forward.temperature,
                    train_entropy=self.loss.entropy != 0,
                )
                loss, stats = objective(
                    batch, micro, logprobs, entropy, loss=self.loss, several_updates=False
                )
            loss.backward()
            loss_sum += float(loss.detach())
            kl_sum += float(stats.get("kl", 0.0))
        tokens = max(sum(len(row.positions) for row in rows), 1)
        return {"loss": loss_sum} | ({"kl": kl_sum / tokens} if kl else {})

    def _finite(self, loss: float) -> bool:
        if np.isfinite(loss) and finite_gradients(self.forward.model):
            self.bad_in_a_row = 0
            return True
        self.bad_in_a_row += 1
        if self.bad_in_a_row >= self.max_bad_steps:
            raise TrainingError(
                f"{self.bad_in_a_row} updates in a row had a loss or gradient that is not finite "
                f"(the last loss: {loss})"
            )
        return False
