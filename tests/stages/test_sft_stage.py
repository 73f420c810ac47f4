"""Supervised fine-tuning on a tiny model."""

from __future__ import annotations

import pytest
import torch
from helpers import make_tiny_model

from posttrain.recipe.schema import ModelConfig, SftStage
from posttrain.rollout.build import load_model, load_tokenizer
from posttrain.rollout.types import Example
from posttrain.stages.sft import finetune


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return ModelConfig(path=str(make_tiny_model(tmp_path_factory.mktemp("model"))))


def test_gradient_checkpointing_changes_no_weight(config, tmp_path):
    examples = [
        Example(f"{n}", prompt=f"{n}+1=", answer=None, columns={"completion": str(n + 1)}) for n in range(4)
    ]
    trained = []
    for checkpointing in (False, True):
        stage = SftStage(
            batch_size=2,
            max_steps=2,
            optimizer={"learning_rate": 1e-3},
            gradient_checkpointing=checkpointing,
        )
        model = load_model(config)
        trainer = finetune(model, load_tokenizer(config), examples, stage, output_dir=tmp_path, seed=0)
        assert model.is_gradient_checkpointing == checkpointing
        trained.append(trainer.model.state_dict())
    assert all(torch.allclose(trained[0][name], after, atol=1e-6) for name, after in trained[1].items())
    before = load_model(config).state_dict()
    assert any(not torch.equal(before[name], after) for name, after in trained[1].items())
