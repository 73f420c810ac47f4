"""Trains a model to forecast reward and remaining length at every token of its own rollouts.

One step of `transformers.Trainer` is one optimiser step on `batch_size` rollouts; `training_step` owns the
micro-batches. The order of the rollouts is a function of seed and step, so a checkpoint needs nothing but the
Trainer's own counter to go on exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType, gather_object
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments

from posttrain.errors import TrainingError
from posttrain.rollout.types import derive_seed
from posttrain.training.batch import MicroBatch, Packing, TrainRow
from posttrain.training.distributed import check_backend
from posttrain.training.forward import choose_packing, head_outputs, prepare_model, verify_packing
from posttrain.training.logprobs import output_head
from posttrain.zip_rc.grid import Grid, expected_reward, value_label
from posttrain.zip_rc.head import ForecastTask, HiddenTask, freeze_all_but_head
from posttrain.zip_rc.loss import States


@dataclass
class ForecastRow(TrainRow):
    """A rollout to learn forecasts from: `cells` are over its `positions`, see `grid.labels`."""

    cells: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


def forecast_row(
    prompt_ids: Sequence[int], completion_ids: Sequence[int], cells: NDArray[np.int64] | None = None
) -> ForecastRow:
    """The row of a rollout, with labels at every token of its completion; without `cells` it has none yet."""
    first, stop = len(prompt_ids), len(prompt_ids) + len(completion_ids)
    labels = np.zeros(len(completion_ids), dtype=np.int64) if cells is None else cells
    return ForecastRow((*prompt_ids, *completion_ids), np.arange(first, stop), cells=labels)


@dataclass(frozen=True)
class ForecastSettings:
    """How forecasts are trained.

    Attributes:
        batch_size: rollouts of one optimiser step, over all processes.
        micro_batch_tokens: tokens of one forward pass.
        kl: weight of the KL from the reference.
        kl_top: see `chunked_kl`.
        lite: only the slice's rows of the head learn; the model is otherwise bit-identical, its policy too.
    """

    batch_size: int
    micro_batch_tokens: int
    kl: float
    kl_top: int | None = None
    lite: bool = False


class ForecastTrainer(Trainer):
    """Trains the slice of a model that `claim_slice` has prepared.

    Its log has, besides the loss, the means over the step's positions of `cross_entropy` and `kl`.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        model: Any,
        tokenizer: Any,
        arguments: TrainingArguments,
        grid: Grid,
        rows: Sequence[ForecastRow],
        settings: ForecastSettings,
        reference: Any | None = None,
        seed: int = 0,
        callbacks: Sequence[Any] = (),
    ):
        """`reference` is a frozen model with the same slice, on the device; None leaves the KL out."""
        if settings.lite:
            freeze_all_but_head(model)
        prepare_model(model)
        super().__init__(model=model, args=arguments, processing_class=tokenizer, callbacks=list(callbacks))
        self.remove_callback(PrinterCallback)
        check_backend(self.accelerator)
        self.grid = grid
        self.rows = rows
        self.settings = settings
        self.reference = reference
        self.seed = seed
        self.packing: Packing | None = None
        self._means: dict[str, float] = {}
        if reference is not None:
            prepare_model(reference)

    @property
    def policy(self) -> Any:
        """The unwrapped model."""
        return self.accelerator.unwrap_model(self.model)

    def get_train_dataloader(self) -> DataLoader:
        """One item per optimiser step: its number."""
        return DataLoader(
            range(self.args.max_steps), batch_size=1, collate_fn=lambda steps: {"step": steps[0]}
        )

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Not counted: the inputs of a step are not tensors."""
        return 0

    def batch(self, step: int) -> list[ForecastRow]:
        """The rollouts of a step, over all processes: every epoch goes through all of them in a new order."""
        rows, size = len(self.rows), self.settings.batch_size
        places = range(step * size, (step + 1) * size)
        orders = {
            epoch: np.random.default_rng(derive_seed(self.seed, "zip_rc", epoch)).permutation(rows)
            for epoch in {place // rows for place in places}
        }
        return [self.rows[orders[place // rows][place % rows]] for place in places]

    def training_step(
        self, model: Any, inputs: Mapping[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """One optimiser step's gradients: means over all labelled positions, so long rollouts weigh more.

        Raises:
            TrainingError: the loss is not finite.
        """
        model.train()
        accelerator = self.accelerator
        rows = self.batch(self.state.global_step)
        tokens = sum(len(row.positions) for row in rows)
        micro_batches = self._micro_batches(rows)
        deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        sums = torch.zeros(2, device=accelerator.device)
        for index, part in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            # DeepSpeed takes its accumulation boundary from sync_gradients and refuses no_sync.
            accelerator.sync_gradients = last
            with nullcontext() if last or deepspeed else accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    cross_entropy, kl = self._losses(model, part)
                # Gradients are averaged over processes; the loss is a sum over them.
                loss = (cross_entropy + self.settings.kl * kl) * (accelerator.num_processes / tokens)
                accelerator.backward(loss, **({"scale_wrt_gas": False} if deepspeed else {}))
            sums += torch.stack([cross_entropy, kl]).detach()
        cross_entropy, kl = (accelerator.reduce(sums, "sum") / tokens).tolist()
        total = cross_entropy + self.settings.kl * kl
        if not np.isfinite(total):
            raise TrainingError(f"the loss of step {self.state.global_step + 1} is not finite: {total}")
        self._means = {"cross_entropy": cross_entropy, "kl": kl}
        return sums.new_tensor(total)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's own means."""
        super().log({**logs, **self._means} if "loss" in logs else logs, start_time)

    def expected_rewards(self, rows: Sequence[TrainRow]) -> list[float]:
        """`value_label` of rollouts over the positions that they list. All processes call it and get all."""
        model = self.model_wrapped
        numbered = list(enumerate(rows))[self.accelerator.process_index :: self.accelerator.num_processes]
        places = {id(row): number for number, row in numbered}
        model.eval()
        found: list[tuple[int, float]] = []
        for part in self._micro_batches([row for _, row in numbered], share=False):
            with torch.no_grad(), self.compute_loss_context_manager():
                micro = self._collate(part)
                task = ForecastTask(micro.places, output_head(self.policy))
                logits = head_outputs(model, self.policy, micro.inputs, task)[:, :-1]
                forecasts = self.grid.joint(logits.index_select(0, micro.prediction).float().cpu().numpy())
            ends = np.cumsum([len(row.positions) for row in part])[:-1]
            means = np.split(expected_reward(self.grid, forecasts), ends)
            for row, values in zip(part, means, strict=True):
                if id(row) in places:
                    found.append((places[id(row)], value_label(values, len(values))))
        return [value for _, value in sorted(gather_object(found))]

    def _micro_batches(self, rows: Sequence[TrainRow], *, share: bool = True) -> list[list[TrainRow]]:
        """Micro-batches of this process's share of the rows, as many on every process."""
        if self.packing is None:
            device = self.accelerator.device
            packing = choose_packing(self.policy)
            self.packing = verify_packing(self.model_wrapped, self.policy, packing, device)
        mine = rows[self.accelerator.process_index :: self.accelerator.num_processes] if share else rows
        micro_batches = self.packing.split(mine, self.settings.micro_batch_tokens)
        count = torch.tensor([len(micro_batches)], device=self.accelerator.device)
        most = max(int(self.accelerator.gather(count).max()), 1)
        empty = ForecastRow((0,), np.zeros(0, dtype=np.int64))
        return micro_batches + [[empty]] * (most - len(micro_batches))

    def _collate(self, rows: Sequence[TrainRow]) -> MicroBatch:
        assert self.packing is not None
        return self.packing.collate(rows, self.accelerator.device)

    def _losses(self, model: Any, rows: Sequence[TrainRow]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over a micro-batch's positions of cross-entropy and KL."""
        micro = self._collate(rows)
        reference = None
        if self.reference is not None and self.settings.kl > 0:
            with torch.no_grad():
                hidden = head_outputs(self.reference, self.reference, micro.inputs, HiddenTask(micro.places))
            reference = States(hidden, output_head(self.reference))
        task = ForecastTask(micro.places, output_head(self.policy), reference, self.settings.kl_top)
        scores = head_outputs(model, self.policy, micro.inputs, task).index_select(0, micro.prediction)
        cells = micro.flat("cells").long()
        return F.cross_entropy(scores[:, :-1], cells, reduction="sum"), scores[:, -1].sum()
