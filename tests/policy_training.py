"""A policy trainer on a tiny model, and what tests look at in it."""

from __future__ import annotations

import torch
from transformers import TrainingArguments

from posttrain.recipe.schema import (
    ModelConfig,
    OptimizerConfig,
    PolicyStage,
    RewardOptions,
    RolloutConfig,
)
from posttrain.rewards.scorer import ScoreReport
from posttrain.rollout.build import load_model, load_tokenizer
from posttrain.rollout.transformers import TransformersEngine
from posttrain.rollout.types import Example
from posttrain.training.arguments import optimizer_arguments
from posttrain.training.collect import Collector
from posttrain.training.policy import PolicyTrainer
from posttrain.training.prompts import PromptOrder
from posttrain.training.trackers import OFF

PROMPTS = [f"{a}+{b}=" for a in range(1, 5) for b in range(1, 5)]


class EvenTokens:
    """A stand-in for the scorer: the share of even token ids; `broken` names what it cannot score."""

    def __init__(self, broken=lambda rollout: False):
        self.broken = broken
        self.calls = 0

    def score(self, rollouts, step=None):
        self.calls += 1
        for rollout in rollouts:
            ids = rollout.completion.token_ids
            if self.broken(rollout):
                rollout.rewards, rollout.reward = {"even": None}, None
                rollout.reward_errors = {"even": "exception: boom"}
            else:
                rollout.reward = sum(token % 2 == 0 for token in ids) / len(ids)
                rollout.rewards, rollout.reward_errors = {"even": rollout.reward}, {}
        return ScoreReport(len(rollouts), sum(map(self.broken, rollouts)), {})


def make_trainer(
    folder,
    tmp_path,
    *,
    stage=None,
    scorer=None,
    methods=(),
    model=None,
    reference=None,
    on_error="redraw",
    combine="sum_then_normalize",
    engine=None,
    stop=(),
    tracking=OFF,
    **hooks,
):
    stage = stage or PolicyStage(steps=3, prompts_per_step=3, group_size=4)
    rollout = RolloutConfig(max_tokens=12, stop=list(stop))
    tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
    model = model if model is not None else load_model(ModelConfig(path=str(folder)))
    examples = [Example(id=prompt, prompt=prompt, answer="0") for prompt in PROMPTS]
    collector = Collector(
        engine=engine or TransformersEngine(model, tokenizer),
        scorer=scorer or EvenTokens(),
        order=PromptOrder(examples, seed=0),
        encode=lambda example: tuple(tokenizer(example.prompt)["input_ids"]),
        stage=stage,
        rollout=rollout,
        rewards=RewardOptions(on_error=on_error, combine=combine),
        methods=methods,
        seed=0,
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=stage.steps * stage.updates_per_batch,
        logging_steps=1,
        save_strategy="no",
        ignore_data_skip=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        **tracking,
        **optimizer_arguments(stage.optimizer, dtype=torch.float32),
    )
    return PolicyTrainer(
        model=model,
        tokenizer=tokenizer,
        arguments=arguments,
        collector=collector,
        stage=stage,
        rollout=rollout,
        methods=methods,
        reference=reference,
        **hooks,
    )


def make_stage(steps=3, **changes):
    return PolicyStage(
        steps=steps,
        prompts_per_step=3,
        group_size=4,
        optimizer=OptimizerConfig(name="sgd", learning_rate=0.1, max_grad_norm=0.0),
        **changes,
    )


def weights_of(trainer):
    return {name: tensor.detach().clone() for name, tensor in trainer.policy.state_dict().items()}


def trained_weights(folder, tmp_path, **options):
    trainer = make_trainer(folder, tmp_path, **options)
    trainer.train()
    return weights_of(trainer)


def assert_same_weights(one, other, tolerance=1e-6):
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance, msg=name)
