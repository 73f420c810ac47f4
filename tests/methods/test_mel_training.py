"""MEL in the trainer: what is trained beside GRPO, that nothing else changes, and exact resumption."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers import make_tiny_model
from policy_training import assert_same_weights, make_stage, make_trainer, weights_of

from posttrain.data.error_analysis import SHORT
from posttrain.methods.mel import Mel
from posttrain.recipe.mel_schema import MelConfig
from posttrain.recipe.schema import ModelConfig, OptimizerConfig
from posttrain.rewards.scorer import ScoreReport
from posttrain.rollout.build import load_model, load_tokenizer
from posttrain.rollout.transformers import TransformersEngine
from posttrain.rollout.types import Completion


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


class Analyst(TransformersEngine):
    """Samples from the model, but for analyses, which it writes itself."""

    def __init__(self, folder):
        config = ModelConfig(path=str(folder))
        self.tokenizer = load_tokenizer(config)
        super().__init__(load_model(config), self.tokenizer, own_weights=True)

    def generate(self, requests):
        asked = [request for request in requests if request.role != "analysis"]
        answers = iter(super().generate(asked) if asked else [])
        return [[self.analysis(r)] if r.role == "analysis" else next(answers) for r in requests]

    def analysis(self, request):
        text = f"at {request.example.id[0]};why ones;rule {request.sampling.seed % 100}"
        ids = tuple(self.tokenizer(text)["input_ids"])
        return Completion(ids, (-1.0,) * len(ids), "stop", text)


class Parity:
    """Right is a completion whose first token is even, or of a problem in `always`; all count as finished."""

    def __init__(self, always=""):
        self.always = always

    def score(self, rollouts, step=None):
        for rollout in rollouts:
            rollout.completion = replace(rollout.completion, finish_reason="stop")
            sure = rollout.request.example.id[0] in self.always
            rollout.reward = float(sure or rollout.completion.token_ids[0] % 2 == 0)
            rollout.rewards, rollout.reward_errors = {"right": rollout.reward}, {}
        return ScoreReport(len(rollouts), 0, {})


def build(folder, path, methods, *, steps=2, scorer=None, **changes):
    stage = make_stage(verify_syncs=0, **changes).model_copy(update={"steps": steps})
    stage = stage.model_copy(update={"optimizer": OptimizerConfig(learning_rate=1e-3)})
    return make_trainer(
        folder, path, stage=stage, methods=methods, engine=Analyst(folder), scorer=scorer or Parity()
    )


def mel(**changes):
    return Mel(MelConfig(prompts=SHORT, **changes))


def run(trainer):
    log = []
    trainer.on_log = lambda step, steps, metrics: log.append(metrics)
    trainer.train()
    trainer.close()
    return log


@pytest.fixture(scope="module")
def plain(model_folder, tmp_path_factory):
    trainer = build(model_folder, tmp_path_factory.mktemp("plain"), [])
    log = run(trainer)
    return log, weights_of(trainer)


def test_with_weight_0_the_policy_is_that_of_grpo(model_folder, tmp_path, plain):
    trainer = build(model_folder, tmp_path, [mel(weight=0.0)])
    log = run(trainer)
    assert log[0]["mel/kept"] > 0
    assert log[0]["tokens/sampled"] > plain[0][0]["tokens/sampled"]
    assert [line["loss"] for line in log] == [line["loss"] for line in plain[0]]
    assert_same_weights(weights_of(trainer), plain[1], tolerance=0)


def test_without_mixed_problems_it_is_grpo(model_folder, tmp_path):
    sure = Parity(always="1234")
    weights = []
    for methods in ([], [mel()]):
        trainer = build(model_folder, tmp_path, methods, steps=1, scorer=sure)
        log = run(trainer)
        weights.append(weights_of(trainer))
    assert log[0]["mel/mixed"] == 0
    assert_same_weights(*weights, tolerance=0)


def test_the_term_is_on_the_texts_alone_and_has_its_own_denominator(model_folder, tmp_path, plain):
    trainer = build(model_folder, tmp_path, [mel(weight=0.5)], steps=1)
    log = run(trainer)
    batch = trainer._batch
    rows = [row for row in batch.rows if "experience" in row.nll_weights]
    assert log[0]["mel/kept"] == len(rows) > 0
    for row in rows:
        text = trainer.processing_class.decode([row.token_ids[place] for place in row.positions])
        assert text.startswith("at ") and "compare" not in text  # noqa: PT018
        assert row.positions[-1] == len(row.token_ids) - 1
        assert np.sum(row.nll_weights["experience"]) == pytest.approx(1.0)
    assert batch.terms == {"experience": 0.5}
    assert batch.denominators["experience"].tokens == 3  # the problems of the step
    # the policy gradient has the denominators that it has without
    assert batch.denominators["outcome"].sequences == 12
    assert log[0]["loss"] > plain[0][0]["loss"]


@pytest.mark.parametrize("overlap", [0, 1])
def test_goes_on_exactly_where_it_stopped(model_folder, tmp_path, overlap):
    def trainer(store):
        methods = [mel(target="distill", replays=2, store=str(tmp_path / store))]
        return build(model_folder, tmp_path, methods, steps=4, overlap=overlap)

    whole = trainer("whole")
    log = run(whole)
    first = trainer("parts")

    def stop(step, steps, metrics):
        first.control.should_save = first.control.should_training_stop = step == 2

    first.on_log = stop
    first.train()
    state, tensors = first.state_dict()
    first.close()
    resumed = trainer("parts")
    resumed.load_state_dict(json.loads(json.dumps(state)), tensors)
    later = []
    resumed.on_log = lambda step, steps, metrics: later.append(metrics)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    resumed.close()
    named = [key for key in log[-1] if key.startswith("mel/")] + ["loss", "grad_norm"]
    assert [{key: line.get(key) for key in named} for line in later] == [
        {key: line.get(key) for key in named} for line in log[2:]
    ]
    assert any(line["mel/kept"] for line in later)
    assert_same_weights(weights_of(whole), weights_of(resumed), tolerance=0)
    assert resumed.methods[0].state_dict() == whole.methods[0].state_dict()
    files = [sorted(path.name for path in (tmp_path / store).iterdir()) for store in ("whole", "parts")]
    assert files[0] == files[1] != []
