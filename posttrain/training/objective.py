"""The loss of a micro-batch: Σ weight · channel + Σ weight · term, each over its own denominator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from posttrain.methods.base import Channel, LossTerm
from posttrain.recipe.schema import LossConfig
from posttrain.training.batch import MicroBatch, TrainRow
from posttrain.training.buffer import UpdateBatch
from posttrain.training.losses import Stats, nll_loss, policy_loss

CLIPPED = ("tokens", "clipped_low", "clipped_high")
"""What is known of every channel."""


def member_counts(
    rows: Sequence[TrainRow], channels: Sequence[Channel], terms: Sequence[LossTerm]
) -> dict[str, tuple[int, float]]:
    """Sequences and trained tokens that belong to every channel's pool and supervised term, by name.

    A term that has a `total` has that in place of its tokens.
    """
    members = {}
    for channel in channels:
        pool = channel.pool or channel.name
        names = {other.name for other in channels if (other.pool or other.name) == pool}
        members[channel.name] = [row for row in rows if names & row.advantages.keys()]
    members |= {term.name: [row for row in rows if term.name in row.nll_weights] for term in terms}
    totals = {term.name: term.total for term in terms if term.total is not None}
    return {
        name: (len(own), totals.get(name, sum(len(row.positions) for row in own)))
        for name, own in members.items()
    }


def objective(
    batch: UpdateBatch,
    micro: MicroBatch,
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    *,
    loss: LossConfig,
    several_updates: bool,
) -> tuple[torch.Tensor, Stats]:
    """The loss of one micro-batch, a sum whose denominators are global, and its stats: those of the first
    channel, and how many tokens of the others the clip took out, as `CHANNEL/clipped_low` and so on.

    Args:
        batch: channels, terms and denominators of the whole update.
        micro: the rows, N trained tokens.
        logprobs: of the tokens under the policy, with gradient [N].
        entropy: of the next-token distributions [N].
        loss: of the stage.
        several_updates: whether the batch serves several optimiser steps, so that the ratio needs the
            log-probs from before the first.
    """
    total = logprobs.sum() * 0.0  # keeps every weight in the graph when a micro-batch trains no channel
    stats: Stats = {}
    for index, (name, weight) in enumerate(batch.channels.items()):
        member, advantages = micro.select("advantages", name)
        if index > 0 and not member.any():
            continue
        # KL and entropy are terms of the whole loss: only the first channel carries them.
        config = loss if index == 0 else loss.model_copy(update={"kl": 0.0, "entropy": 0.0})
        part, found = policy_loss(
            config,
            logprobs=logprobs[member],
            advantages=advantages,
            sequence=micro.row[member],
            denominators=batch.denominators[name],
            entropy=(entropy if config.entropy else entropy.detach())[member],
            **_fixed_logprobs(micro, member, kl=bool(config.kl), several_updates=several_updates),
        )
        total = total + weight * part
        stats |= found if index == 0 else {f"{name}/{key}": found[key] for key in CLIPPED}
    for name, weight in batch.terms.items():
        member, weights = micro.select("nll_weights", name)
        total = total + weight * nll_loss(logprobs[member], weights, batch.denominators[name].tokens)
    return total, stats


def _fixed_logprobs(
    micro: MicroBatch, member: torch.Tensor, *, kl: bool, several_updates: bool
) -> dict[str, Any]:
    """The [N] log-probs of a channel's tokens that do not depend on the weights."""
    names = ["sampling_logprobs"]
    if several_updates:
        names.append("old_logprobs")
    if kl:
        names.append("reference_logprobs")
    rollouts = [row for row in micro.rows if row.is_rollout]
    is_rollout = torch.tensor([row.is_rollout for row in micro.rows], device=micro.row.device)[micro.row]
    part = replace(micro, rows=rollouts)
    return {name: part.flat(name)[member[is_rollout]] for name in names}
