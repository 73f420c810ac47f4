"""What a step holds between sampling and its last optimiser step, and how a checkpoint keeps it.

A batch of rollouts may serve several optimiser steps, and with `overlap` the next batch is sampled while
this one trains: a checkpoint between two optimiser steps must hold both, since their rollouts were sampled
with weights that are gone. JSON for what is plain, tensors for what is per token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict, TypeAdapter
from safetensors.torch import save_file

from posttrain.errors import TrainingError
from posttrain.methods.base import StepContext
from posttrain.rollout.types import Rollout, RolloutBatch
from posttrain.training.batch import TrainRow
from posttrain.training.collect import Collected
from posttrain.training.losses import Denominators
from posttrain.training.tally import Tally

Tensors = dict[str, torch.Tensor]
State = dict[str, Any]

_LOGPROBS = ("sampling_logprobs", "old_logprobs", "reference_logprobs")
_TABLES = ("advantages", "nll_weights")
# Log-probs of broken weights are NaN, and must come back as such.
_ROLLOUTS = TypeAdapter(list[Rollout], config=ConfigDict(ser_json_inf_nan="constants"))


@dataclass
class UpdateBatch:
    """What the optimiser steps on one rollout batch work with; counts are over all ranks.

    `step` is the rollout batch's number from 0, `version` the engine's when it was sampled. `channels` and
    `terms` map names to weights in the loss; KL and entropy go with the first channel.
    """

    step: int
    version: int
    stale: bool
    """Whether the policy has been updated since the rollouts were sampled."""
    micro_batches: list[list[TrainRow]]
    channels: dict[str, float]
    terms: dict[str, float]
    denominators: dict[str, Denominators]
    metrics: Tally = field(default_factory=Tally)
    contexts: Sequence[StepContext] = ()

    @property
    def rows(self) -> list[TrainRow]:
        """All rows, micro-batch by micro-batch."""
        return [row for rows in self.micro_batches for row in rows]

    def state(self) -> tuple[State, Tensors]:
        """What a checkpoint keeps of the batch."""
        state = {
            "step": self.step,
            "version": self.version,
            "stale": self.stale,
            "sizes": [len(rows) for rows in self.micro_batches],
            "channels": self.channels,
            "terms": self.terms,
            "denominators": {name: asdict(value) for name, value in self.denominators.items()},
            "metrics": self.metrics.state(),
            "rngs": rng_states(self.contexts),
        }
        return state, _row_tensors(self.rows)

    @classmethod
    def from_state(cls, state: State, tensors: Tensors, contexts: Sequence[StepContext]) -> UpdateBatch:
        """The batch that `state` was taken of; `contexts` are new ones for its step."""
        rows = iter(_rows(tensors, sum(state["sizes"])))
        set_rng_states(contexts, state["rngs"])
        return cls(
            step=state["step"],
            version=state["version"],
            stale=state["stale"],
            micro_batches=[[next(rows) for _ in range(size)] for size in state["sizes"]],
            channels=state["channels"],
            terms=state["terms"],
            denominators={name: Denominators(**value) for name, value in state["denominators"].items()},
            metrics=Tally.from_state(state["metrics"]),
            contexts=contexts,
        )

    def write(self, folder: Path, rank: int, why: Mapping[str, Any]) -> None:
        """Keep the batch for a look at what went wrong with it."""
        folder.mkdir(parents=True, exist_ok=True)
        state, tensors = self.state()
        save_file(tensors, folder / f"rows-{rank}.safetensors")
        (folder / f"batch-{rank}.json").write_text(json.dumps({"why": dict(why), **state}, indent=2) + "\n")


@dataclass
class PendingBatch:
    """A rollout batch that is being sampled or waits for its step."""

    step: int
    version: int
    contexts: Sequence[StepContext]
    tally: Tally
    future: Future[Collected]
    extended: bool = False
    """Whether the methods have had their follow-up rollouts."""

    def state(self) -> State:
        """What a checkpoint keeps of it. Waits for the rollouts; the methods' follow-ups must be in."""
        assert self.extended, "a pending batch is saved when its methods have extended it"
        collected = self.future.result()
        return {
            "step": self.step,
            "version": self.version,
            "rngs": rng_states(self.contexts),
            "tally": self.tally.state(),
            "batch": _dump(collected.batch.rollouts),
            "dropped": _dump(collected.dropped),
            "redrawn": _dump(collected.redrawn),
            "reasons": collected.reasons,
            "seconds": collected.seconds,
            "counts": collected.counts,
        }

    @classmethod
    def from_state(cls, state: State, tally: Tally, contexts: Sequence[StepContext]) -> PendingBatch:
        """The batch that `state` was taken of; `contexts` are new ones that log to `tally`."""
        tally.load(state["tally"])
        set_rng_states(contexts, state["rngs"])
        future: Future[Collected] = Future()
        future.set_result(
            Collected(
                RolloutBatch(_ROLLOUTS.validate_python(state["batch"])),
                _ROLLOUTS.validate_python(state["dropped"]),
                _ROLLOUTS.validate_python(state["redrawn"]),
                state["reasons"],
                state["seconds"],
                state["counts"],
            )
        )
        return cls(state["step"], state["version"], contexts, tally, future, extended=True)


def rng_states(contexts: Sequence[StepContext]) -> list[State]:
    """Where the methods' random generators are."""
    return [dict(context.rng.bit_generator.state) for context in contexts]


def set_rng_states(contexts: Sequence[StepContext], states: Sequence[State]) -> None:
    """Bring the methods' random generators to where they were."""
    for context, state in zip(contexts, states, strict=True):
        context.rng.bit_generator.state = state


def _dump(rollouts: Sequence[Rollout]) -> Any:
    try:
        return json.loads(_ROLLOUTS.dump_json(list(rollouts)))
    except ValueError as error:
        raise TrainingError(
            f"a checkpoint cannot hold the rollouts sampled ahead, since a data column or a method's info "
            f"is no plain value: {error}"
        ) from error


def _row_tensors(rows: Sequence[TrainRow]) -> Tensors:
    arrays: dict[str, np.ndarray] = {}
    for index, row in enumerate(rows):
        arrays[f"{index}.token_ids"] = np.array(row.token_ids, dtype=np.int64)
        arrays[f"{index}.positions"] = np.asarray(row.positions, dtype=np.int64)
        arrays |= {
            f"{index}.{name}": value for name in _LOGPROBS if (value := getattr(row, name)) is not None
        }
        for table in _TABLES:
            arrays |= {f"{index}.{table}.{name}": value for name, value in getattr(row, table).items()}
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def _rows(tensors: Tensors, count: int) -> list[TrainRow]:
    fields: list[dict[str, Any]] = [{table: {} for table in _TABLES} for _ in range(count)]
    for key, tensor in tensors.items():
        index, name, *entry = key.split(".", 2)
        values = fields[int(index)]
        if entry:
            values[name][entry[0]] = tensor.numpy()
        else:
            values[name] = tuple(tensor.tolist()) if name == "token_ids" else tensor.numpy()
    return [TrainRow(**values) for values in fields]
