"""What a run writes down: metrics as JSON lines, rollouts as parquet."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from posttrain.errors import TrainingError
from posttrain.redaction import redact_texts
from posttrain.rewards.registry import RewardInfo, provenance
from posttrain.rollout.types import Rollout


def jsonable(value: Any) -> Any:
    """A value that strict JSON can hold; NaN and infinities become strings, so that they stay visible."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def free_space(folder: Path) -> str:
    """`1.5 GB free on its disk`."""
    return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free on its disk"


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, forced to disk and renamed to `path` at the end: a reader never sees half of it.

    Raises:
        TrainingError: it cannot be written; what was at `path` is untouched.
    """
    beside = path.with_name(f"{path.name}.tmp")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        free = free_space(path.parent)
        beside.unlink(missing_ok=True)
        raise TrainingError(f"{path} cannot be written: {error.strerror} ({free})") from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file as a whole (see `replacing`); texts in it without secrets."""
    text = json.dumps(redact_texts(content), indent=2, ensure_ascii=False, default=jsonable, allow_nan=False)
    with replacing(path) as file:
        file.write((text + "\n").encode())


def note_rewards(path: Path, rewards: Sequence[RewardInfo]) -> None:
    """List the rewards of a run with version and code hash; what an earlier attempt listed stays there."""
    listed = json.loads(path.read_text()) if path.is_file() else []
    for info in rewards:
        entry = json.loads(json.dumps({**asdict(info), "provenance": provenance(info)}))
        listed += [] if entry in listed else [entry]
    write_json(path, listed)


class Clock:
    """Seconds that a stage has taken, over all attempts at it; work that was lost does not count."""

    def __init__(self) -> None:
        self.restart(0.0)

    def restart(self, seconds: float) -> None:
        """Count on from `seconds`."""
        self._start = time.monotonic() - seconds

    def seconds(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self._start


class MetricsFile:
    """`metrics.jsonl`: one line a step, flushed at once."""

    def __init__(self, path: Path):
        self.path = path

    def lines(self) -> list[dict[str, Any]]:
        """All lines; a last one that a kill cut short is left out."""
        found = []
        for text in self.path.read_text().splitlines() if self.path.is_file() else []:
            try:
                found.append(json.loads(text))
            except ValueError:
                break
        return found

    def cut(self, stage: str, step: int) -> None:
        """Drop the lines of a stage after `step`, which are about to be written again."""
        lines = [line for line in self.lines() if line["stage"] != stage or line["step"] <= step]
        with replacing(self.path) as file:
            file.writelines(json.dumps(line, allow_nan=False).encode() + b"\n" for line in lines)

    def write(self, *, stage: str, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line."""
        line = {"stage": stage, "kind": kind, "step": step, "time": round(time.time(), 3)}
        line |= {key: jsonable(value) for key, value in metrics.items()}
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            free = free_space(self.path.parent)
            raise TrainingError(f"{self.path} cannot be written: {error.strerror} ({free})") from error


def rollout_rows(
    rollouts: Iterable[Rollout],
    *,
    step: int,
    prompt_text: Mapping[str, str],
    status: Mapping[str, str] | None = None,
    advantages: Mapping[str, Mapping[str, list[float]]] | None = None,
    weights: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """One flat record per rollout.

    `prompt_text` maps example ids to rendered prompts, `status` maps rollout ids to "trained" or why they
    were not, `advantages` maps channel names to advantages per completion token by rollout id, `weights` to
    the channels' weights in the loss.
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
            "temperature": float(request.sampling.temperature),
            "max_tokens": request.sampling.max_tokens,
            "parent": None if request.fork is None else request.fork.parent,
            "forked_at": None if request.fork is None else request.fork.at,
            "prompt": prompt_text[request.example.id] + request.given,
            "completion": completion.text,
            "answer": request.example.answer,
            "prompt_ids": list(request.prompt_ids),
            "completion_ids": list(completion.token_ids),
            "logprobs": list(completion.logprobs),
            "finish_reason": completion.finish_reason,
            "loss_mask": None if completion.loss_mask is None else list(completion.loss_mask),
            "turns": json.dumps([[turn.start, turn.stop] for turn in completion.turns]),
            "tool_calls": json.dumps([asdict(call) for call in completion.tool_calls], ensure_ascii=False),
            "reward": rollout.reward,
            "reward_errors": json.dumps(rollout.reward_errors, ensure_ascii=False),
            "reward_versions": json.dumps(rollout.reward_versions, ensure_ascii=False),
        }
        row |= {f"reward/{name}": value for name, value in rollout.rewards.items()}
        if status is not None:
            row["status"] = status[rollout.id]
        for channel, by_rollout in (advantages or {}).items():
            row[f"advantage/{channel}"] = by_rollout.get(rollout.id)
        if weights is not None:
            own = {name: weight for name, weight in weights.items() if row[f"advantage/{name}"] is not None}
            row["channel_weights"] = json.dumps(own)
        rows.append(row)
    return rows


def write_rollouts(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rollout records to a parquet file (see `replacing`)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    types = {"reward": pa.float64(), "loss_mask": pa.list_(pa.int8()), "forked_at": pa.int64()}
    types |= dict.fromkeys(("answer", "parent", "source"), pa.string())
    arrays = {
        name: pa.array(values, type=types.get(name) or (pa.float64() if name.startswith("reward/") else None))
        for name, values in columns.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        pq.write_table(pa.table(arrays), file)


def remove_rollouts(folder: Path, step: int) -> None:
    """Delete the rollout files of steps after `step`, which are about to be sampled again."""
    for path in [*folder.glob("step-*.parquet"), *folder.glob("supervised-*.parquet")]:
        if int(path.stem.split("-")[1]) > step:
            path.unlink()
