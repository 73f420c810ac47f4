"""What the run folder keeps of a step's tokens: where each comes from, and what it was trained with.

Three kinds of records. A rollout that was trained on has its policy version, seed, fork, rewards with the
versions of their code, its advantage in every channel with the channel's weight, and its loss mask. A rollout
that was not says why. A supervised text says which term of the loss it was in, with what weight, and which
rollout it is of if it is of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.methods.base import Channel, LossTerm
from posttrain.rollout.types import Rollout
from posttrain.training.collect import Collected
from posttrain.training.record import rollout_rows

TRAINED = "trained"
Ids = tuple[int, ...]


@dataclass(frozen=True)
class StepRecord:
    """What a step leaves for the run folder. `step` is the first optimiser step on its rollouts."""

    step: int
    collected: Collected
    channels: list[Channel]
    terms: list[LossTerm]

    @property
    def rollouts(self) -> list[Rollout]:
        """All that were sampled: those that may be trained on, the dropped ones, those drawn again."""
        return [*self.collected.batch, *self.collected.dropped, *self.collected.redrawn]


def step_rows(record: StepRecord, prompt_text: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row for every rollout of a step; `prompt_text` maps example ids to rendered prompts."""
    rollouts = record.rollouts
    advantages = {
        channel.name: {
            rollout.id: _per_token(channel.advantages[rollout.id], len(rollout.completion.token_ids))
            for rollout in rollouts
            if rollout.id in channel.advantages
        }
        for channel in record.channels
    }
    return rollout_rows(
        rollouts,
        step=record.step,
        prompt_text=prompt_text,
        status=statuses(record),
        advantages=advantages,
        weights={channel.name: channel.weight for channel in record.channels},
    )


def statuses(record: StepRecord) -> dict[str, str]:
    """By rollout id: `trained`, `dropped: why`, or `unused: why` for one that only served a method."""
    collected, learned = record.collected, _learned_texts(record)
    found = {}
    for rollout in record.rollouts:
        completion = rollout.completion
        in_channel = any(rollout.id in channel.advantages for channel in record.channels)
        if rollout.id in collected.reasons:
            found[rollout.id] = f"dropped: {collected.reasons[rollout.id]}"
        elif in_channel and completion.sampled_tokens:
            found[rollout.id] = TRAINED
        elif completion.token_ids in learned:
            found[rollout.id] = f"{TRAINED}: as a text of term {learned[completion.token_ids]}"
        elif in_channel:
            found[rollout.id] = "unused: the policy wrote no token of it"
        else:
            found[rollout.id] = "unused: in no channel of the loss"
    return found


def supervised_records(
    record: StepRecord, decode: Callable[[list[list[int]]], list[str]], rank: int = 0
) -> list[dict[str, Any]]:
    """A row for every supervised text of a step on this rank; `decode` gives texts of token ids.

    `weight` is the term's in the loss, `token_weight` the row's in the term. `source` is the rollout whose
    completion the text is, None where it is no rollout of the step.
    """
    sources = {rollout.completion.token_ids: rollout.id for rollout in record.rollouts}
    rows = []
    for term in record.terms:
        weights = term.row_weights or [1.0] * len(term.rows)
        prompts = decode([list(prompt) for prompt, _ in term.rows])
        texts = decode([list(completion) for _, completion in term.rows])
        for index, ((prompt, completion), weight) in enumerate(zip(term.rows, weights, strict=True)):
            rows.append(
                {
                    "step": record.step,
                    "rollout_id": f"{term.name}/{record.step}.{rank}.{index}",
                    "term": term.name,
                    "weight": float(term.weight),
                    "token_weight": float(weight),
                    "source": sources.get(tuple(completion)),
                    "prompt": prompts[index],
                    "completion": texts[index],
                    "prompt_ids": list(prompt),
                    "completion_ids": list(completion),
                }
            )
    return rows


def glimpses(record: StepRecord, prompt_text: Mapping[str, str]) -> dict[str, Any]:
    """What a display shows of a step's rollouts: the best and the worst of a group that tells them apart."""
    scored = [rollout for rollout in record.collected.batch if rollout.reward is not None]
    groups: dict[str, list[Rollout]] = {}
    for rollout in scored:
        groups.setdefault(rollout.request.group, []).append(rollout)
    for group in groups.values():
        group.sort(key=lambda rollout: -(rollout.reward or 0.0))
    differing = [group for group in groups.values() if group[0].reward != group[-1].reward]
    chosen = next(iter(differing or groups.values()), [])
    return {
        "rollouts": [
            {
                "reward": rollout.reward,
                "tokens": rollout.completion.sampled_tokens,
                "truncated": rollout.truncated,
                "prompt": prompt_text[rollout.request.example.id] + rollout.request.given,
                "completion": rollout.completion.text,
            }
            for rollout in (chosen[:1] + chosen[1:][-1:])
        ]
    }


def _learned_texts(record: StepRecord) -> dict[Ids, str]:
    """Names of the supervised terms by the texts they train on."""
    return {tuple(completion): term.name for term in record.terms for _, completion in term.rows}


def _per_token(value: float | Sequence[float], length: int) -> list[float]:
    return [float(value)] * length if isinstance(value, int | float) else [float(v) for v in value]
