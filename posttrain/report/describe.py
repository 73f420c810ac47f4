"""A rollout in words: where its tokens come from and what they were trained with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.report.lookup import Found
from posttrain.report.run_folder import Run, Stage
from posttrain.report.tokens import Pieces

PREVIEW = 60
"""Characters of a completion in a list."""
Facts = list[tuple[str, str]]


def listed(stage: Stage, row: Mapping[str, Any]) -> list[str]:
    """The cells of a rollout in a list: id, stage, step, reward, tokens, status, and how it begins."""
    return [
        str(row["rollout_id"]),
        stage.name,
        "" if row.get("correct") is not None or stage.samples is not None else str(row["step"]),
        _number(row["reward"]),
        f"{len(row['completion_ids'])}{'+' if row['finish_reason'] == 'length' else ''}",
        _status(row),
        " ".join(row["completion"].split())[:PREVIEW],
    ]


def described(run: Run, found: Found) -> str:
    """Everything that is known of a rollout or supervised text, but for its single tokens."""
    row = found.row
    facts = _supervised_facts(found) if found.supervised else _rollout_facts(run, found)
    width = max(len(name) for name, _ in facts)
    lines = [f"{row['rollout_id']} of stage {found.stage.name}, in {run.path}"]
    lines += [f"  {name:<{width}}  {value}" for name, value in facts]
    for title, text, ids in (
        ("prompt", row["prompt"], row["prompt_ids"]),
        ("completion", row["completion"], row["completion_ids"]),
    ):
        lines += [f"{title}, {_count(len(ids), 'token')}:", *_indented(text)]
    return "\n".join(lines)


def token_table(found: Found, pieces: Pieces | None) -> str:
    """A line for every token of the completion: text, log-prob, whether it is trained, and its advantages.

    The last column is what the loss multiplies the token's gradient with, before it is divided by the
    channels' numbers of sequences or tokens: the sum of its advantages times the channels' weights.
    """
    row, ids = found.row, found.row["completion_ids"]
    texts = [json.dumps(text, ensure_ascii=False) for text in pieces.of(ids)] if pieces else [""] * len(ids)
    header = ["token", "id", "text"]
    columns: list[Sequence[str]] = [[str(place) for place in range(len(ids))], list(map(str, ids)), texts]
    if found.supervised:
        header.append("weight in the loss")
        columns.append([_number(row["weight"] * row["token_weight"])] * len(ids))
    else:
        mask = row.get("loss_mask") or [1] * len(ids)
        channels = channels_of(row)
        weights = json.loads(row.get("channel_weights") or "{}")
        header += ["log-prob", "trained"]
        columns += [
            [_number(value) for value in row["logprobs"]],
            ["yes" if trained(row) and kept else "no" for kept in mask],
        ]
        for name, values in channels.items():
            header.append(name)
            columns.append([_number(value) for value in values])
        if weights:
            total = [
                sum(weight * channels[name][place] for name, weight in weights.items()) * mask[place]
                for place in range(len(ids))
            ]
            header.append("weighted sum")
            columns.append([_number(value) for value in total])
    return table(header, list(zip(*columns, strict=True)))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells in columns as wide as they need to be."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [header, *rows]
    )


def channels_of(row: Mapping[str, Any]) -> dict[str, list[float]]:
    """The advantages of a rollout's tokens, by channel."""
    return {
        name.removeprefix("advantage/"): values
        for name, values in row.items()
        if name.startswith("advantage/") and values
    }


def trained(row: Mapping[str, Any]) -> bool:
    """Whether some token of a rollout was trained on by a channel."""
    return row.get("status") == "trained"


def _rollout_facts(run: Run, found: Found) -> Facts:
    row = found.row
    facts = [("status", _status(row) + _when(run, found))]
    if trained(row) and not any(map(any, channels_of(row).values())):
        facts.append(("", "all its advantages are 0: it counts in the denominators and has no gradient"))
    facts += [
        ("example", f"{row['example_id']}, group {row['group']}, {row['role']} {row['index']}"),
        ("policy", f"version {row['policy_version']}, which counts the engine's syncs of weights"),
        ("sampling", _sampling(row)),
        ("fork", _fork(row)),
    ]
    facts += [("forks of it", text) for text in _forks(found)]
    facts.append(("ended by", "the token cap" if row["finish_reason"] == "length" else row["finish_reason"]))
    facts += _reward_facts(row)
    facts += _channel_facts(row)
    mask = row.get("loss_mask")
    total = len(row["completion_ids"])
    facts.append(
        (
            "loss mask",
            f"{total if mask is None else sum(mask)} of {_count(total, 'token')} written by the policy",
        )
    )
    for call in json.loads(row.get("tool_calls") or "[]"):
        facts.append(("tool call", f"{call['name'] or 'unreadable'}: {call['error'] or 'answered'}"))
    for text in found.learned:
        facts.append(("learned as", f"{text['rollout_id']}, a text of term {text['term']}"))
    return facts


def _supervised_facts(found: Found) -> Facts:
    row = found.row
    return [
        ("status", f"trained: as a text of term {row['term']}, at step {row['step']}"),
        (
            "weight",
            f"{row['weight']:.6g} of the term in the loss, {row['token_weight']:.6g} of a token in the term",
        ),
        ("source", row["source"] or "no rollout of this step"),
    ]


def _when(run: Run, found: Found) -> str:
    """At which optimiser steps a policy stage trained on it."""
    row = found.row
    if not str(row.get("status") or "").startswith("trained"):
        return f", step {row['step']}" if found.stage.rollouts else ""
    updates = _updates_per_batch(run, found.stage)
    if updates == 1:
        return f", at optimiser step {row['step']}"
    return f", at optimiser steps {row['step']} to {row['step'] + updates - 1}"


def _updates_per_batch(run: Run, stage: Stage) -> int:
    """Optimiser steps on each rollout batch, from the recipe; the numbers of stages begin with 1."""
    number = stage.name.partition("-")[0]
    stages = run.recipe.get("stages") or []
    if not number.isdigit() or not 0 < int(number) <= len(stages):
        return 1
    section = stages[int(number) - 1]
    return int((section.get("policy") or {}).get("updates_per_batch", 1)) if isinstance(section, dict) else 1


def _sampling(row: Mapping[str, Any]) -> str:
    parts = [f"seed {row['seed']}"]
    if row.get("temperature") is not None:
        parts += [f"temperature {row['temperature']:g}", f"at most {_count(row['max_tokens'], 'token')}"]
    return ", ".join(parts)


def _fork(row: Mapping[str, Any]) -> str:
    if not row.get("parent"):
        return "none: it begins with the prompt"
    return f"of {row['parent']}, after {_count(row['forked_at'], 'token')} of its completion"


def _forks(found: Found) -> list[str]:
    """The rollouts that continue it, by where and what for."""
    counts: dict[tuple[int, str], int] = {}
    for row in found.forks:
        place = (row["forked_at"], row["role"])
        counts[place] = counts.get(place, 0) + 1
    return [f"{count} of role {role} after token {at}" for (at, role), count in sorted(counts.items())]


def _reward_facts(row: Mapping[str, Any]) -> Facts:
    errors = json.loads(row.get("reward_errors") or "{}")
    versions = json.loads(row.get("reward_versions") or "{}")
    facts = [("reward", "none" if row["reward"] is None else _number(row["reward"]))]
    for name in [key.removeprefix("reward/") for key in row if key.startswith("reward/")]:
        value = row[f"reward/{name}"]
        text = errors.get(name) or ("does not apply" if value is None else _number(value))
        if value is None and name not in errors and name not in versions:
            continue  # a reward of other rollouts of the step
        facts.append((f"  {name}", text + (f" (version {versions[name]})" if name in versions else "")))
    return facts


def _channel_facts(row: Mapping[str, Any]) -> Facts:
    weights = json.loads(row.get("channel_weights") or "{}")
    facts = []
    for name, values in channels_of(row).items():
        low, high = min(values), max(values)
        text = _number(low) if low == high else f"from {_number(low)} to {_number(high)}"
        facts.append(
            (
                f"channel {name}",
                f"advantage {text}" + (f", weight {weights[name]:.6g}" if name in weights else ""),
            )
        )
    return facts or [("channels", "none")]


def _status(row: Mapping[str, Any]) -> str:
    if row.get("status"):
        return str(row["status"])
    judged = {True: ", correct", False: ", wrong", None: ""}
    return f"evaluated{judged[row.get('correct')]}"


def _indented(text: str) -> list[str]:
    return [f"  | {line}" for line in text.split("\n")]


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
