"""What a run writes down: metrics as JSON lines, rollouts as parquet."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from posttrain.rollout.types import Rollout


def jsonable(value: Any) -> Any:
    """A value that strict JSON can hold; NaN and infinities become strings, so that they stay visible."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file beside and rename it, so that a reader never sees half of it."""
    beside = path.with_suffix(".tmp")
    text = json.dumps(content, indent=2, ensure_ascii=False, default=jsonable, allow_nan=False)
    beside.write_text(text + "\n")
    beside.replace(path)


class MetricsFile:
    """`metrics.jsonl`: one line a step, flushed at once."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, *, stage: str, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line."""
        line = {"stage": stage, "kind": kind, "step": step, "time": round(time.time(), 3)}
        line |= {key: jsonable(value) for key, value in metrics.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")


def rollout_rows(
    rollouts: Iterable[Rollout],
    *,
    step: int,
    prompt_text: Mapping[str, str],
    status: Mapping[str, str] | None = None,
    advantages: Mapping[str, Mapping[str, list[float]]] | None = None,
) -> list[dict[str, Any]]:
    """One flat record per rollout.

    `prompt_text` maps example ids to rendered prompts, `status` maps rollout ids to "trained" or
    "dropped: why", `advantages` maps channel names to advantages per completion token by rollout id.
    """
    rows = []
    for rollout in rollouts:
        request, completion = rollout.request, rollout.completion
        row: dict[str, Any] = {
            "step": step,
            "policy_version": rollout.policy_version,
            "rollout_id": rollout.id,
            "example_id": request.example.id,
            "group": request.group,
            "role": request.role,
            "index": rollout.index,
            "seed": request.sampling.seed,
            "prompt": prompt_text[request.example.id],
            "completion": completion.text,
            "answer": request.example.answer,
            "prompt_ids": list(request.prompt_ids),
            "completion_ids": list(completion.token_ids),
            "logprobs": list(completion.logprobs),
            "finish_reason": completion.finish_reason,
            "loss_mask": None if completion.loss_mask is None else list(completion.loss_mask),
            "reward": rollout.reward,
            "reward_errors": json.dumps(rollout.reward_errors, ensure_ascii=False),
        }
        row |= {f"reward/{name}": value for name, value in rollout.rewards.items()}
        if status is not None:
            row["status"] = status[rollout.id]
        for channel, by_rollout in (advantages or {}).items():
            row[f"advantage/{channel}"] = by_rollout.get(rollout.id)
        rows.append(row)
    return rows


def write_rollouts(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rollout records to a parquet file, beside and renamed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    types = {"reward": pa.float64(), "loss_mask": pa.list_(pa.int8()), "answer": pa.string()}
    arrays = {
        name: pa.array(values, type=types.get(name) or (pa.float64() if name.startswith("reward/") else None))
        for name, values in columns.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    pq.write_table(pa.table(arrays), beside)
    beside.replace(path)
