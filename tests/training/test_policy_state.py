"""Steps that cannot be taken, overlap, and what a checkpoint keeps of the trainer."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import make_tiny_model
from policy_training import EvenTokens, assert_same_weights, make_stage, make_trainer, weights_of
from safetensors.torch import load_file

from posttrain.errors import TrainingError
from posttrain.methods.base import Channel, Method
from posttrain.recipe.schema import ModelConfig, OptimizerConfig
from posttrain.rollout.build import load_model, load_tokenizer
from posttrain.rollout.transformers import TransformersEngine
from posttrain.training.buffer import UpdateBatch


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


class Poison(Method):
    """A channel whose advantages are not finite at some steps; logs the updates it hears of."""

    name = "poison"

    def __init__(self, steps, value=float("nan")):
        self.steps, self.value = steps, value
        self.updates = []

    def channels(self, batch, context):
        value = self.value if context.step in self.steps else 0.0
        return [Channel("poison", {rollout.id: value for rollout in batch})]

    def after_update(self, context):
        self.updates.append(context.step)


class BreakGradient(Method):
    """Lets the backward pass of some steps give infinite gradients though the loss is finite."""

    name = "break"

    def __init__(self, steps):
        self.steps = steps

    def channels(self, batch, context):
        if context.step in self.steps:
            parameter = next(iter(context.model.parameters()))

            def explode(gradient):
                handle.remove()
                return gradient + float("inf")

            handle = parameter.register_hook(explode)
        return []


def steps_of(trainer, checkpoint=None):
    """Runs the trainer, from a checkpoint if one is given; the weights after every step and the log."""
    weights, log = [], []
    trainer.on_log = lambda step, steps, metrics: (weights.append(weights_of(trainer)), log.append(metrics))
    error = None
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except TrainingError as raised:
        error = raised
    return weights, log, error


def adam(**changes):
    return make_stage(**changes).model_copy(update={"optimizer": OptimizerConfig(learning_rate=1e-3)})


@pytest.mark.parametrize("method", [Poison([1]), Poison([1], float("inf")), BreakGradient([1])])
def test_a_step_that_is_not_finite_is_skipped_kept_and_logged(model_folder, tmp_path, method):
    before = weights_of(make_trainer(model_folder, tmp_path))
    trainer = make_trainer(
        model_folder, tmp_path, stage=adam(), methods=[method], bad_batches=tmp_path / "bad"
    )
    weights, log, error = steps_of(trainer)
    assert error is None
    assert any(not torch.equal(before[name], weights[0][name]) for name in before)
    assert_same_weights(weights[0], weights[1], tolerance=0)
    assert any(not torch.equal(weights[1][name], weights[2][name]) for name in before)
    assert [metrics.get("bad_steps") for metrics in log] == [None, 1, None]
    finite = [torch.isfinite(torch.tensor(metrics["loss"])).item() for metrics in log]
    assert finite == [True, isinstance(method, BreakGradient), True]
    assert not torch.isfinite(torch.tensor(log[1]["grad_norm"]))
    assert all(state["step"] == 2 for state in trainer.optimizer.state.values())  # Adam saw two of three
    if isinstance(method, Poison):
        assert method.updates == [0, 2]

    kept = tmp_path / "bad" / "step-000002"
    assert [path.name for path in (tmp_path / "bad").iterdir()] == ["step-000002"]
    state = json.loads((kept / "batch-0.json").read_text())
    assert state["why"]["step"] == 2
    batch = UpdateBatch.from_state({**state, "rngs": []}, load_file(kept / "rows-0.safetensors"), contexts=[])
    assert len(batch.rows) == 12
    assert all(len(row.sampling_logprobs) == len(row.positions) for row in batch.rows)


def test_the_run_stops_after_too_many_bad_steps_in_a_row(model_folder, tmp_path):
    def run(steps):
        stage = adam(max_bad_steps=2).model_copy(update={"steps": 6})
        return steps_of(make_trainer(model_folder, tmp_path, stage=stage, methods=[Poison(steps)]))

    _, log, error = run([1, 3, 5])
    assert error is None
    assert len(log) == 6
    weights, log, error = run([2, 3])
    assert len(log) == 4
    assert "2 steps in a row, up to step 4" in str(error)
    assert_same_weights(weights[1], weights[3], tolerance=0)


def test_log_probs_of_the_engine_that_are_not_finite_skip_the_step(model_folder, tmp_path):
    class Broken(TransformersEngine):
        def generate(self, requests):
            answers = super().generate(requests)
            if self.version == 1:
                first = answers[0][0]
                answers[0][0] = type(first)(
                    first.token_ids, (float("nan"), *first.logprobs[1:]), first.finish_reason, first.text
                )
            return answers

    config = ModelConfig(path=str(model_folder))
    model = load_model(config)
    trainer = make_trainer(
        model_folder, tmp_path, stage=adam(), model=model, engine=Broken(model, load_tokenizer(config))
    )
    weights, log, error = steps_of(trainer)
    assert error is None
    assert [metrics.get("bad_steps") for metrics in log] == [None, 1, None]
    assert_same_weights(weights[0], weights[1], tolerance=0)


class Counting(Method):
    """State, random numbers and a follow-up rollout: all that a checkpoint must keep of a method."""

    name = "counting"

    def __init__(self):
        self.seen = 0
        self.drawn = []

    def extend(self, batch, context):
        again = batch.rollouts[0].request
        more = context.generate([again])
        context.score(more.rollouts)
        self.drawn.append(float(context.rng.random()))
        return batch

    def after_update(self, context):
        self.seen += 1
        self.drawn.append(float(context.rng.random()))

    def state_dict(self):
        return {"seen": self.seen, "drawn": self.drawn}

    def load_state_dict(self, state):
        self.seen, self.drawn = state["seen"], list(state["drawn"])


def own_engine(folder):
    config = ModelConfig(path=str(folder))
    return TransformersEngine(load_model(config), load_tokenizer(config), own_weights=True)


def recording_trainer(model_folder, folder, overlap):
    """Of three batches with two updates each; `records` has what was in the batches."""
    stage = adam(updates_per_batch=2).model_copy(update={"steps": 3, "overlap": overlap})
    trainer = make_trainer(
        model_folder,
        folder,
        stage=stage,
        methods=[Counting()],
        scorer=EvenTokens(),
        engine=own_engine(model_folder) if overlap else None,
    )
    trainer.records = []
    trainer.on_rollouts = lambda record: trainer.records.append(
        [(r.id, r.policy_version, r.completion.token_ids) for r in record.collected.batch]
    )
    return trainer


@pytest.fixture(scope="module", params=[0, 1])
def whole(request, model_folder, tmp_path_factory):
    """A trainer that nobody stopped, with overlap or without; the weights after every step and the log."""
    trainer = recording_trainer(model_folder, tmp_path_factory.mktemp("whole"), request.param)
    weights, log, error = steps_of(trainer)
    trainer.close()
    assert error is None
    assert len(log) == 6
    return trainer, weights, log


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_trainer_goes_on_from_its_state(model_folder, tmp_path, whole, stop):
    """Two updates a batch: after steps 1 and 3 the batch is half used; overlap samples one ahead."""
    through, weights, log = whole
    overlap = through.stage.overlap
    first = recording_trainer(model_folder, tmp_path, overlap)

    def save_and_stop(step, steps, metrics):
        first.control.should_save = first.control.should_training_stop = step == stop

    first.on_log = save_and_stop
    first.train()
    state, tensors = first.state_dict()
    state = json.loads(json.dumps(state))
    first.close()

    resumed = recording_trainer(model_folder, tmp_path, overlap)
    resumed.load_state_dict(state, tensors)
    checkpoint = str(tmp_path / f"checkpoint-{stop}")
    later_weights, later_log, error = steps_of(resumed, checkpoint)
    resumed.close()
    assert error is None
    assert [metrics["loss"] for metrics in later_log] == [metrics["loss"] for metrics in log[stop:]]
    assert [metrics["grad_norm"] for metrics in later_log] == [metrics["grad_norm"] for metrics in log[stop:]]
    assert_same_weights(weights[-1], later_weights[-1], tolerance=0)
    batches = (stop + 1) // 2
    assert resumed.records == through.records[batches:]
    assert resumed.methods[0].state_dict() == through.methods[0].state_dict()
    assert resumed.totals.values() == through.totals.values()


def test_overlap_samples_with_weights_one_step_old(model_folder, tmp_path):
    stage = adam(overlap=1).model_copy(update={"steps": 4})
    engine = own_engine(model_folder)
    trainer = make_trainer(model_folder, tmp_path, stage=stage, engine=engine)
    versions = []
    trainer.on_rollouts = lambda record: versions.append({r.policy_version for r in record.collected.batch})
    _, log, error = steps_of(trainer)
    trainer.close()
    assert error is None
    assert versions == [{0}, {0}, {1}, {2}]
    assert log[0]["sampling/logprob_difference"] < 1e-5
    assert all(metrics["sampling/logprob_difference"] > 1e-5 for metrics in log[1:])
