"""GRPO on posttrain's parts and without its trainer: one step, written out, from prompts to new weights.

    python examples/grpo_from_scratch.py                          # the tiny reasoner, a few minutes on a CPU
    python examples/grpo_from_scratch.py --model FOLDER --steps 5

The trainer does the same in the same order, and besides: several devices, adapters, checkpoints, methods,
metrics, and checks of everything that can go wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from posttrain.data.prompts import Prompts
from posttrain.data.sources import load_examples
from posttrain.methods.base import Channel
from posttrain.recipe.schema import DataSource, LossConfig, ModelConfig, RewardOptions, RewardSpec
from posttrain.rewards.scorer import Scorer
from posttrain.rollout.build import load_model, load_tokenizer
from posttrain.rollout.engine import RolloutEngine
from posttrain.rollout.transformers import TransformersEngine
from posttrain.rollout.types import (
    Example,
    Rollout,
    RolloutRequest,
    Sampling,
    derive_seed,
    make_rollouts,
)
from posttrain.training.advantages import compute_advantages
from posttrain.training.batch import TrainRow, rollout_row
from posttrain.training.forward import choose_packing, policy_logprobs, prepare_model
from posttrain.training.losses import Denominators, policy_loss


@dataclass(frozen=True)
class Settings:
    """What may be changed."""

    model: str = "data/tiny-reasoner"
    steps: int = 50
    prompts: int = 16
    """Prompts of a step."""
    group: int = 8
    """Completions of a prompt."""
    max_tokens: int = 48
    learning_rate: float = 2e-4
    micro_batch_tokens: int = 8192
    """Distinct tokens of one forward and backward pass; sets the memory, never the result."""
    seed: int = 0


LOSS = LossConfig(kind="grpo", clip_high=0.28)
"""With one update a batch the ratio is 1 and nothing is clipped; `importance` corrects for the engine's
rounding."""


def plan(
    settings: Settings, step: int, examples: Sequence[Example], prompts: Prompts
) -> list[RolloutRequest]:
    """The requests of a step: the next prompts, each with a seed of its own."""
    first = step * settings.prompts
    chosen = [examples[index % len(examples)] for index in range(first, first + settings.prompts)]
    return [
        RolloutRequest(
            prompt_ids=prompts.encode(example),
            example=example,
            group=f"{step}.{slot}",
            sampling=Sampling(
                settings.max_tokens, n=settings.group, seed=derive_seed(settings.seed, step, slot)
            ),
        )
        for slot, example in enumerate(chosen)
    ]


def rows_of(rollouts: Sequence[Rollout]) -> list[TrainRow]:
    """Group-relative advantages, and the sequences to train on with them.

    A rollout that no reward could score has `reward` None: it is left out, it is not a zero.
    """
    scored = [rollout for rollout in rollouts if rollout.reward is not None]
    advantages = compute_advantages(
        LOSS.kind,
        LOSS.scale,
        np.array([rollout.reward for rollout in scored], dtype=np.float64),
        [rollout.request.group for rollout in scored],
    )
    by_id = {rollout.id: float(value) for rollout, value in zip(scored, advantages, strict=True)}
    channel = Channel("outcome", by_id)
    return [row for rollout in scored if (row := rollout_row(rollout, [channel])) is not None]


class Learner:
    """The policy's weights and the step that changes them."""

    def __init__(self, model: Any, settings: Settings):
        prepare_model(model)  # the output head gives log-probs of chosen tokens, never all logits
        self.model = model
        self.packing = choose_packing(model)
        self.optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, betas=(0.9, 0.99))
        self.settings = settings

    def update(self, rows: Sequence[TrainRow]) -> float:
        """One optimiser step on all rows. Returns the loss."""
        counts = Denominators(
            sequences=len(rows),
            tokens=sum(len(row.positions) for row in rows),
            max_tokens=self.settings.max_tokens,
        )
        total = 0.0
        # Rows of a micro-batch share their prompt, and whatever else they have in common: a tree.
        for micro_rows in self.packing.split(rows, self.settings.micro_batch_tokens):
            micro = self.packing.collate(micro_rows, self.model.device)
            logprobs, _ = policy_logprobs(self.model, self.model, micro, temperature=1.0)
            _, advantages = micro.select("advantages", "outcome")
            loss, _ = policy_loss(
                LOSS,
                logprobs=logprobs,
                advantages=advantages,
                sequence=micro.row,
                denominators=counts,  # of the whole batch: how it is cut does not matter
                sampling_logprobs=micro.flat("sampling_logprobs"),
            )
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def train(settings: Settings, engine: RolloutEngine | None = None) -> Iterator[dict[str, float]]:
    """Train, giving what every step came to. `engine` samples in place of the embedded one."""
    model_config = ModelConfig(path=settings.model)
    tokenizer, model = load_tokenizer(model_config), load_model(model_config)
    prompts = Prompts(tokenizer)
    examples = load_examples(DataSource(task="arithmetic", size=2000, args={"max_term": 6}))
    learner = Learner(model, settings)
    engine = engine or TransformersEngine(model, tokenizer)
    with Scorer([RewardSpec(name="math_answer")], RewardOptions()) as scorer:
        for step in range(settings.steps):
            engine.sync(model)
            requests = plan(settings, step, examples, prompts)
            rollouts = make_rollouts(requests, engine.generate(requests), engine.version).rollouts
            scorer.score(rollouts, step)
            rows = rows_of(rollouts)
            loss = learner.update(rows) if rows else 0.0
            rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
            lengths = [len(rollout.completion.token_ids) for rollout in rollouts]
            yield {
                "step": step + 1,
                "loss": loss,
                "reward": float(np.mean(rewards)) if rewards else float("nan"),
                "length": float(np.mean(lengths)),
                "unscored": len(rollouts) - len(rewards),
            }
    engine.close()


def main() -> None:
    """Train with the settings of the command line."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in vars(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    for line in train(Settings(**vars(parser.parse_args()))):
        print("  ".join(f"{name} {value:.4g}" for name, value in line.items()), flush=True)


if __name__ == "__main__":
    main()
