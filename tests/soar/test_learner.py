"""Students learn as the policy trainer does; weights come back bit for bit."""

from __future__ import annotations

import pytest
import torch
from helpers import make_tiny_model
from policy_training import PROMPTS, EvenTokens, assert_same_weights, make_trainer, weights_of

from posttrain.errors import TrainingError
from posttrain.recipe.schema import (
    CorrectConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyStage,
    RewardOptions,
    RolloutConfig,
)
from posttrain.rollout.build import load_model, load_tokenizer
from posttrain.rollout.transformers import TransformersEngine
from posttrain.rollout.types import Example
from posttrain.soar.learner import Forward, optimizer_settings
from posttrain.soar.snapshots import References, SharedModel, checksum
from posttrain.soar.student import Students, Workbench
from posttrain.training.forward import Reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def load(folder):
    return load_model(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_a_student_is_trained_as_by_the_policy_trainer(folder, tmp_path, kl):
    """The same prompts, completions, advantages, clipping, schedule and weights, with and without KL."""
    stage = PolicyStage(
        steps=3,
        prompts_per_step=3,
        group_size=4,
        micro_batch_tokens=120,
        loss=LossConfig(kind="rloo", kl=kl),
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="linear", max_grad_norm=0.5),
    )
    trainer = make_trainer(
        folder, tmp_path, stage=stage, reference=Reference(load(folder).eval()) if kl else None
    )
    trainer.train()

    model, tokenizer = load(folder), load_tokenizer(ModelConfig(path=str(folder)))
    shared = SharedModel(model)
    start = shared.capture()
    students = Students(
        Workbench(
            shared,
            TransformersEngine(model, tokenizer),
            Forward(model, torch.float32, temperature=1.0, micro_batch_tokens=120),
        ),
        stage=stage,
        arguments=optimizer_settings(stage.optimizer, str(tmp_path)),
        rollout=RolloutConfig(max_tokens=12),
        rewards=RewardOptions(),
        scorer=EvenTokens(),
        correct=CorrectConfig(),
        references=References(model, load(folder).eval()) if kl else None,
        tokenizer=tokenizer,
    )
    asked = [
        (Example(id=prompt, prompt=prompt, answer="0"), tuple(tokenizer(prompt)["input_ids"]))
        for prompt in PROMPTS
    ]
    spent = students.train(start, asked, 3, seed=0)
    assert (spent.updates, spent.completions) == (3, 36)
    ours = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    assert_same_weights(ours, weights_of(trainer))
    assert checksum(start.tensors) != shared.checksum()

    students.train(start, asked, 3, seed=0)  # another one in between leaves nothing behind
    students.train(start, asked, 1, seed=1)
    students.train(start, asked, 3, seed=0)
    assert all(torch.equal(ours[name], tensor) for name, tensor in model.state_dict().items())
    shared.restore(start)
    assert all(torch.equal(tensor, load(folder).state_dict()[name]) for name, tensor in start.tensors.items())


def test_a_restore_that_goes_wrong_is_noticed(folder):
    shared = SharedModel(load(folder))
    snapshot = shared.capture()
    next(iter(snapshot.tensors.values())).view(torch.int32).view(-1)[5] ^= 1  # one bit
    with pytest.raises(TrainingError, match="checksum"):
        shared.restore(snapshot)


def test_the_checksum_sees_names_places_and_signs_of_zero():
    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.0])}
    others = (
        {"a": torch.tensor([2.0, 1.0]), "b": torch.tensor([0.0])},
        {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([-0.0])},
        {"a": torch.tensor([1.0, 2.0]), "c": torch.tensor([0.0])},
        {"a": torch.tensor([1.0, 2.0])},
    )
    assert checksum(one) == checksum({name: tensor.clone() for name, tensor in reversed(one.items())})
    assert len({checksum(one), *map(checksum, others)}) == 5
