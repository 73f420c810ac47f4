"""Score saved rollouts again, with a reward as it is now, and compare with what it said then."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import DataError
from posttrain.rewards.scorer import Scorer
from posttrain.rollout.types import Completion, Example, Rollout, RolloutRequest, Sampling

if TYPE_CHECKING:
    from posttrain.recipe.schema import RewardModelConfig, RewardSpec

NEEDED = ("step", "example_id", "group", "role", "index", "prompt", "completion", "completion_ids")


@dataclass(frozen=True)
class Agreement:
    """Old values against new ones, in rollouts. `old` is None where the reward was not part of the run."""

    rollouts: int
    equal: int
    different: int
    largest: float
    """The largest difference."""
    old: float | None
    new: float | None
    """Means over the rollouts that have both values (without old ones, over all new ones)."""
    gained: int
    """Rollouts with a value now and none then."""
    lost: int
    """Rollouts with a value then and none now."""
    errors: int
    """Rollouts that the reward failed on now."""
    unknown: int
    """Rollouts whose example was not found: the reward saw the rendered prompt and the answer alone."""
    counts: Counter[str] = field(default_factory=Counter)
    """What the reward counted while it scored."""


def rescore(
    path: Path,
    out: Path,
    spec: RewardSpec,
    examples: Mapping[str, Example],
    models: Mapping[str, RewardModelConfig] | None = None,
) -> Agreement:
    """Write the rollouts of a parquet file to `out`, with the columns `rescored/NAME` and
    `rescored_error/NAME`.

    Args:
        path: a file that a run has written to its folder `rollouts`.
        out: a file that is not there yet.
        spec: the reward.
        examples: the examples by id, whose further columns the reward may want.
        models: reward models that the spec may name.

    Raises:
        DataError: the file is no rollouts, or `out` exists.
        PosttrainError: the reward cannot be found or loaded.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from posttrain.recipe.schema import RewardOptions
    from posttrain.training.record import replacing

    if out.exists():
        raise DataError(f"{out} exists already; --out names another file")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from error
    missing = [name for name in NEEDED if name not in table.column_names]
    if missing:
        raise DataError(f"{path} has no column {missing[0]!r}: it is no rollouts of a run")
    rows = table.to_pylist()
    rollouts = [_rollout(row, examples) for row in rows]
    counts: Counter[str] = Counter()
    with Scorer([spec], RewardOptions(), models=models) as scorer:
        for step in sorted({row["step"] for row in rows}):
            of_step = [rollout for rollout, row in zip(rollouts, rows, strict=True) if row["step"] == step]
            counts.update(scorer.score(of_step, step).rewards[spec.name].counts)
    values = [rollout.rewards[spec.name] for rollout in rollouts]
    errors = [rollout.reward_errors.get(spec.name) for rollout in rollouts]
    versions = [json.dumps(rollout.reward_versions, ensure_ascii=False) for rollout in rollouts]
    columns = {
        f"rescored/{spec.name}": pa.array(values, pa.float64()),
        f"rescored_error/{spec.name}": pa.array(errors, pa.string()),
        f"rescored_version/{spec.name}": pa.array(versions, pa.string()),
    }
    table = table.drop_columns([name for name in columns if name in table.column_names])
    for name, column in columns.items():
        table = table.append_column(name, column)
    with replacing(out) as file:
        pq.write_table(table, file)
    unknown = sum(row["example_id"] not in examples for row in rows)
    return _compare([row.get(f"reward/{spec.name}") for row in rows], values, errors, unknown, counts)


def _rollout(row: Mapping[str, Any], examples: Mapping[str, Example]) -> Rollout:
    example = examples.get(row["example_id"])
    if example is None:
        example = Example(row["example_id"], row["prompt"], row.get("answer"))
    ids = tuple(row["completion_ids"])
    mask = row.get("loss_mask")
    completion = Completion(
        ids,
        tuple(row.get("logprobs") or (0.0,) * len(ids)),
        row.get("finish_reason") or "stop",
        row["completion"],
        None if mask is None else tuple(mask),
    )
    request = RolloutRequest((), example, str(row["group"]), Sampling(max(len(ids), 1)), row["role"])
    return Rollout(request, completion, row["index"], row.get("policy_version") or 0)


def _compare(
    old: Sequence[float | None],
    new: Sequence[float | None],
    errors: Sequence[str | None],
    unknown: int,
    counts: Counter[str],
) -> Agreement:
    pairs = [(a, b) for a, b in zip(old, new, strict=True) if a is not None and b is not None]
    gaps = [abs(a - b) for a, b in pairs]
    now = [b for _, b in pairs] or [b for b in new if b is not None]
    return Agreement(
        rollouts=len(new),
        equal=sum(gap == 0 for gap in gaps),
        different=sum(gap > 0 for gap in gaps),
        largest=max(gaps, default=0.0),
        old=sum(a for a, _ in pairs) / len(pairs) if pairs else None,
        new=sum(now) / len(now) if now else None,
        gained=sum(a is None and b is not None for a, b in zip(old, new, strict=True)),
        lost=sum(a is not None and b is None for a, b in zip(old, new, strict=True)),
        errors=sum(error is not None for error in errors),
        unknown=unknown,
        counts=counts,
    )
