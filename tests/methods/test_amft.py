"""AMFT in the trainer: what is compared, what is trained, what a checkpoint keeps, and on the table."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import make_tiny_model, make_tokenizer
from policy_training import assert_same_weights, make_stage, make_trainer, weights_of
from pydantic import ValidationError
from reproductions.amft_table import ARMS, CHECKPOINTS, slopes, train

from posttrain.data.demonstrations import demonstration_ids
from posttrain.data.sources import load_examples
from posttrain.errors import DataError, TrainingError
from posttrain.methods.amft import Amft, share, surprisal
from posttrain.methods.base import Channel, Compared, StepContext, load_methods
from posttrain.recipe.amft_schema import AmftConfig, problems
from posttrain.recipe.schema import ModelConfig, PolicyStage, Recipe
from posttrain.rollout.build import load_model
from posttrain.rollout.types import Completion, Example, Rollout, RolloutBatch, RolloutRequest, Sampling
from posttrain.training import gradients
from posttrain.training.prompts import PromptOrder

TERMS = {"min_terms": 2, "max_terms": 2, "max_term": 9}
DEMONSTRATIONS = {"task": "arithmetic", "size": 12, "split": "train", "args": TERMS, "format": "text"}
HELD_OUT = {"task": "arithmetic", "size": 6, "split": "validation", "args": TERMS, "format": "text"}


def options(**changes):
    return {
        "demonstrations": DEMONSTRATIONS,
        "batch_size": 5,
        "held_out": {"data": HELD_OUT, "prompts": 3, "group_size": 4, "evidence": 1},
        "first": 0,
        "interval": 2,
        **changes,
    }


def method(kind=Amft, **changes):
    return kind(AmftConfig.model_validate(options(**changes)))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


class Run:
    """A trained trainer with what it logged, the batches of its steps, and its method."""

    def __init__(self, folder, tmp_path, amft, **stage):
        self.metrics, self.records, self.amft = [], [], amft
        self.trainer = make_trainer(
            folder,
            tmp_path,
            stage=make_stage(**stage),
            methods=[amft] if amft else [],
            on_rollouts=self.records.append,
            on_log=lambda step, steps, metrics: self.metrics.append(metrics),
        )
        self.trainer.train()


def gradient_of(loss, model):
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return torch.cat([gradient.flatten() for gradient in gradients])


def logprobs_of(model, rows):
    """Log-probs of the completions of (prompt, completion) pairs, one tensor each."""
    for prompt, completion in rows:
        ids = torch.tensor([[*prompt, *completion]])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        yield logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).squeeze(-1)


class Checked(Amft):
    """Works out by separate backward passes what it is told of gradients."""

    def __init__(self, config):
        super().__init__(config)
        self.pairs = []

    def auxiliary(self, context):
        terms = super().auxiliary(context)
        self.rows = [row for term in terms for row in term.rows]
        return terms

    def compare(self, batch, context):
        asked = super().compare(batch, context)
        self.asked, self.batch = asked, {rollout.id: rollout for rollout in batch}
        return asked

    def compared(self, result, context):
        model, mu = context.model, self.weight(context.step)
        answers = [self.batch[key] for key in self.asked.advantages]
        climb = sum(
            advantage * own.sum() / len(answers)
            for advantage, own in zip(
                self.asked.advantages.values(),
                logprobs_of(model, [(r.request.prompt_ids, r.completion.token_ids) for r in answers]),
                strict=True,
            )
        )
        v = gradient_of(climb, model)
        imitation = gradient_of(-torch.cat(list(logprobs_of(model, self.rows))).mean(), model)
        both = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        policy = (both - mu * imitation) / (1 - mu)
        expected = Compared(
            norm=float(v.norm()),
            products={"channels": float(v @ policy) * (1 - mu), "demonstrations": float(v @ imitation) * mu},
            combined_norm=float((imitation - policy).norm()),
            learning_rate=0.1,
        )
        self.pairs.append((result, expected))
        super().compared(result, context)


@pytest.fixture(scope="module")
def checked(model_folder, tmp_path_factory):
    return Run(model_folder, tmp_path_factory.mktemp("run"), method(Checked), micro_batch_tokens=150)


def test_products_are_those_of_separate_gradients(checked):
    assert len(checked.amft.pairs) == 2  # steps 0 and 2
    for found, expected in checked.amft.pairs:
        assert found.norm == pytest.approx(expected.norm, rel=1e-4)
        assert found.combined_norm == pytest.approx(expected.combined_norm, rel=1e-4)
        assert found.learning_rate == expected.learning_rate
        scale = found.norm * found.combined_norm
        for part, product in expected.products.items():
            assert found.products[part] == pytest.approx(product, abs=1e-4 * scale), part


def test_the_weight_follows_the_measurements(checked):
    first, second, third = checked.metrics
    assert [line["amft/mu"] for line in checked.metrics[:1]] == [0.5]
    assert second["amft/mu"] == pytest.approx(0.5 + 0.1 * first["amft/meta_gradient"])
    assert third["amft/mu"] == second["amft/mu"]  # nothing was measured
    assert "amft/meta_gradient" not in second
    assert checked.amft.mu == pytest.approx(third["amft/mu"] + 0.1 * third["amft/meta_gradient"])
    assert first["amft/climb/imitation"] - first["amft/climb/policy"] == pytest.approx(
        first["amft/meta_gradient"] * first["amft/norm/difference"]
    )
    answers = [r for r in checked.records[0].collected.batch if r.request.role == "held_out"]
    assert first["amft/utility"] == pytest.approx(np.mean([r.reward for r in answers]))
    assert first["amft/entropy"] == pytest.approx(first["entropy"], rel=0.2)  # of few tokens


def test_being_measured_changes_nothing_else(model_folder, tmp_path, checked):
    """The same mixture without a measurement; held-out answers are sampled, and not trained on."""
    mus = [line["amft/mu"] for line in checked.metrics]
    plain = Run(model_folder, tmp_path, method(schedule=dict(enumerate(mus)), held_out=None))
    assert_same_weights(weights_of(plain.trainer), weights_of(checked.trainer), tolerance=2e-6)
    assert plain.metrics[0]["tokens/trained"] == checked.metrics[0]["tokens/trained"]
    roles = {r.request.role for r in checked.records[0].collected.batch}
    assert roles == {"solution", "held_out"}
    assert {r.request.role for r in checked.records[1].collected.batch} == {"solution"}


def test_no_imitation_is_the_policy_gradient_bit_for_bit(model_folder, tmp_path):
    alone = Run(model_folder, tmp_path, None)
    mixed = Run(model_folder, tmp_path, method(schedule={0: 0.0}))
    for name, weight in weights_of(alone.trainer).items():
        assert torch.equal(weight, weights_of(mixed.trainer)[name]), name


class Shown(Amft):
    """Keeps the rows of every step."""

    seen: list

    def auxiliary(self, context):
        terms = super().auxiliary(context)
        self.seen = [*getattr(self, "seen", []), [row for term in terms for row in term.rows]]
        return terms


def test_imitation_alone_samples_nothing_and_is_gradient_descent_on_the_demonstrations(
    model_folder, tmp_path
):
    run = Run(model_folder, tmp_path, method(Shown, schedule={0: 1.0}))
    assert all(line["tokens/sampled"] == 0 for line in run.metrics if "tokens/sampled" in line)
    assert not any(record.collected.batch.rollouts for record in run.records)
    model = load_model(ModelConfig(path=str(model_folder)))
    for rows in run.amft.seen:
        assert len(rows) == 5
        loss = -torch.cat(list(logprobs_of(model, rows))).mean()
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight -= 0.1 * weight.grad
    assert_same_weights(weights_of(run.trainer), model.state_dict(), tolerance=1e-5)


def test_a_warm_up_comes_first_and_the_target_is_measured_after_it(model_folder, tmp_path):
    run = Run(model_folder, tmp_path, method(warmup_steps=1, entropy_rate=0.5, rate=0.0, held_out=None))
    first, second, third = run.metrics
    assert first["amft/mu"] == 1.0
    assert first.get("tokens/sampled", 0) == 0
    assert second["amft/mu"] == 0.5
    assert second["amft/entropy"] == second["amft/target_entropy"] == third["amft/target_entropy"]
    gap = third["amft/target_entropy"] - third["amft/entropy"]
    assert third["amft/mu"] == pytest.approx(0.5 + 0.5 * gap)
    assert abs(gap) > 1e-3


def test_a_run_goes_on_from_its_state(model_folder, tmp_path, checked):
    """Stopped after the step that was measured first, it samples, measures and moves the weight as ever."""
    stage = {"stage": make_stage(micro_batch_tokens=150)}
    first = make_trainer(model_folder, tmp_path, methods=[method()], **stage)

    def stop(step, steps, metrics):
        first.control.should_save = first.control.should_training_stop = True

    first.on_log = stop
    first.train()
    state, tensors = first.state_dict()
    assert state["methods"]["amft"] == {"mu": checked.metrics[1]["amft/mu"], "target": None}
    resumed = make_trainer(model_folder, tmp_path, methods=[method()], **stage)
    resumed.load_state_dict(json.loads(json.dumps(state)), tensors)
    later = []
    resumed.on_log = lambda step, steps, metrics: later.append(metrics)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for left, right in zip(checked.metrics[1:], later, strict=True):
        names = {name for name in left if name.startswith("amft/")}
        assert names == {name for name in right if name.startswith("amft/")}
        assert all(right[name] == left[name] for name in {*names, "loss", "grad_norm"})
    assert_same_weights(weights_of(resumed), weights_of(checked.trainer), tolerance=0)


def test_when_the_meta_gradient_is_measured():
    amft = method(first=3, warmup_steps=2)
    assert [step for step in range(9) if amft.measures(step)] == [3, 5, 7]
    assert [step for step in range(9) if method(first=1, warmup_steps=4).measures(step)] == [4, 6, 8]


def context(rank=0, world=1, step=0, gather=lambda value: [value], engine=None, **changes):
    return StepContext(
        step=step,
        engine=engine,
        tokenizer=make_tokenizer(),
        model=None,
        rng=np.random.default_rng(0),
        log=lambda name, value: None,
        score=lambda rollouts: None,
        gather=gather,
        rank=rank,
        world=world,
        **changes,
    )


def test_all_policy_channels_have_what_imitation_leaves():
    amft = method(mu=0.2)
    weighed = amft.weigh([Channel("outcome", {}), Channel("efficiency", {}, 0.5, "outcome")], context())
    assert [(c.name, c.weight, c.pool) for c in weighed] == [
        ("outcome", 0.8, ""),
        ("efficiency", 0.4, "outcome"),
    ]


def test_without_evidence_the_weight_stays():
    amft = method(mu=0.3)
    nothing = Compared(0.0, {"demonstrations": 0.0, "channels": 0.0}, 1.0, 0.1)
    amft.compared(nothing, context())
    amft.compared(Compared(float("nan"), {"demonstrations": 0.1, "channels": 0.0}, 1.0, 0.1), context())
    assert amft.mu == 0.3
    amft.compared(Compared(1.0, {"demonstrations": -0.3, "channels": 0.0}, 1.0, 0.1), context())
    assert amft.mu == pytest.approx(0.3 + 0.1)  # imitation climbs: cosine 1


def test_a_few_answers_that_differ_are_no_evidence():
    answers = [rollout((-1.0,), None, f"0.held_out.{i}", "held_out") for i in (0, 0, 1, 1, 2, 2)]
    for index, (answer, reward) in enumerate(zip(answers, (1, 0, 1, 1, 0, 1), strict=True)):
        answer.index, answer.reward = index, float(reward)
    held_out = {"data": HELD_OUT, "evidence": 3}
    batch = RolloutBatch(answers)
    assert method(held_out=held_out).compare(batch, context()) is None
    asked = method(held_out=held_out).compare(batch, context(gather=lambda value: [value, 1]))
    assert list(asked.advantages.values()) == [1, -1, 0, 0, -1, 1]
    assert asked.combination == {"demonstrations": 2.0, "channels": -2.0}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_demonstrations_of_a_step(world):
    places = [list(share(5, context(rank, world))) for rank in range(world)]
    assert [place for own in places for place in own] == [0, 1, 2, 3, 4]


def rollout(logprobs, mask=None, group="0.0", role="solution"):
    request = RolloutRequest((1,), Example("a", "1+1=", "2"), group, Sampling(8), role)
    return Rollout(request, Completion((5,) * len(logprobs), logprobs, "stop", "", mask), 0, 0)


def test_entropy_is_that_of_what_the_policy_wrote_on_all_ranks():
    own = [rollout((-1.0, -2.0)), rollout((-0.5, 0.0), (1, 0))]
    assert surprisal(own) == (3.5, 3)
    amft = method(entropy_rate=0.1, target_entropy=1.0)
    amft.channels(RolloutBatch(own), context(gather=lambda value: [value, (4.5, 1)]))
    assert amft.mu == pytest.approx(0.5 + 0.1 * (1.0 - 8.0 / 4))


def test_demonstrations_as_the_policy_would_sample_them():
    tokenizer = make_tokenizer()
    example = Example("a", "1+1=", "2", {"completion": "<think>2</think>2"})
    prompt, answer = demonstration_ids(example, tokenizer, "text")
    assert tokenizer.decode(prompt) == "1+1="
    assert answer[-1] == tokenizer.eos_token_id
    assert answer.count(tokenizer.eos_token_id) == 1
    chat, told = demonstration_ids(example, tokenizer)
    assert tokenizer.decode(chat).endswith("<|im_start|>assistant\n")
    assert told == answer


def test_a_held_out_prompt_must_not_be_trained_on(model_folder, tmp_path):
    amft = method()
    trainer = make_trainer(model_folder, tmp_path, stage=make_stage(), methods=[amft])
    trainer.collector.order = PromptOrder(load_examples(amft.config.held_out.data), 0)
    trainer.collector.encode = lambda example: (5, 6)
    with pytest.raises(DataError, match="is held out and trained on, too"):
        trainer.train()


def test_a_held_out_prompt_must_not_be_demonstrated():
    same = {"data": {**HELD_OUT, "split": "train"}}
    own = context(engine=SimpleNamespace(max_model_len=64), sampling=Sampling(8))
    with pytest.raises(DataError, match="is held out and demonstrated, too"):
        method(held_out=same).auxiliary(own)
    assert len(method().auxiliary(own)[0].rows) == 5
    assert len(method(held_out=same, schedule={0: 0.5}).auxiliary(own)[0].rows) == 5  # nothing is fitted


def test_split_weights_are_refused_before_anything_is_trained(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(gradients, "splits_weights", lambda: True)
    with pytest.raises(TrainingError, match=r"train an adapter \(model.lora\)"):
        make_trainer(model_folder, tmp_path, methods=[method(warmup_steps=50)])
    make_trainer(model_folder, tmp_path, methods=[method(schedule={0: 0.5})])  # compares nothing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": None}, "needs held_out"),
        ({"mu": 0.99}, "mu 0.99 is not between low 0.05 and high 0.95"),
        ({"schedule": {5: 0.5}}, "a schedule begins at step 0"),
        ({"schedule": {0: 1.5}}, "weights between 0 and 1"),
        ({"interval": 0}, "greater than or equal to 1"),
        ({"intervall": 5}, "Extra inputs"),
    ],
)
def test_options_that_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        AmftConfig.model_validate(options(**changes))


def test_plan_refuses_what_cannot_work():
    [spec] = load_methods([{"amft": options()}])
    assert spec.kind is Amft
    recipe = Recipe.model_validate(
        {
            "name": "r",
            "model": {"path": "m"},
            "tools": {"use": ["calculator"]},
            "data": {"train": HELD_OUT, "eval": HELD_OUT},
            "stages": [
                {
                    "policy": {
                        "steps": 3,
                        "prompts_per_step": 2,
                        "methods": [{"amft": options(demonstrations={"jsonl": "x.jsonl"}, warmup_steps=3)}],
                    }
                }
            ],
        }
    )
    stage = recipe.stages[0].policy
    assert isinstance(stage, PolicyStage)
    assert [key.removeprefix("methods[0].amft.") for key, _ in problems(recipe, stage)] == [
        "tools",
        "demonstrations.columns",
        "warmup_steps",
        "held_out.data",
        "held_out.data",
    ]


# --- where everything can be computed ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def table():
    names = (
        "imitation",
        "policy gradient",
        "fixed 0.1",
        "switch at 150",
        "amft, rate 0.1",
        "turned around",
        "likelihood of demonstrations",
        "likelihood of demonstrations, turned around",
        "amft, interval 20",
        "amft raw, rate 0.0001",
        "amft and entropy",
        "amft and entropy, other sign",
    )
    return {name: train(ARMS[name], seed=0) for name in names}


@pytest.mark.parametrize(
    ("arm", "final"),
    [
        ("imitation", 0.677),
        ("policy gradient", 0.019),
        ("fixed 0.1", 0.894),
        ("switch at 150", 0.927),
        ("amft, rate 0.1", 0.905),
        ("turned around", 0.682),
        ("likelihood of demonstrations", 0.684),
        ("likelihood of demonstrations, turned around", 0.904),
        ("amft, interval 20", 0.727),
        ("amft raw, rate 0.0001", 0.701),
        ("amft and entropy", 0.682),
        ("amft and entropy, other sign", 0.918),
    ],
)
def test_table(table, arm, final):
    assert table[arm].final == pytest.approx(final, abs=0.02)


def test_the_weight_rises_while_imitation_pays_and_falls_after_it(table):
    mu = table["amft, rate 0.1"].mu[40:]
    assert max(mu) == 0.95
    assert mu[-1] == 0.05
    assert mu.index(max(mu)) < 150 < mu.index(min(mu))
    turned = table["turned around"].mu[40:]
    assert min(turned[:200]) < 0.7
    assert turned[-1] == 0.95
    blindly = table["likelihood of demonstrations, turned around"].mu[40:]
    assert set(table["amft raw, rate 0.0001"].mu[40:]) != {0.8}
    assert np.allclose(table["amft raw, rate 0.0001"].mu[40:], 0.8, atol=1e-3)  # moves nothing to be seen
    assert table["amft and entropy"].mu[100] == 0.95  # both losses lower entropy: neither sign regulates
    assert table["amft and entropy, other sign"].mu[-1] == 0.05
    assert max(blindly) < 0.82  # decays from the first step on, whatever imitation is worth


def test_the_meta_gradient_sees_one_step_far():
    early, late = slopes(CHECKPOINTS[0], (1,), draws=4), slopes(CHECKPOINTS[3], (1, 10), draws=2)
    assert early["utility"] == pytest.approx(0.082, abs=0.01)
    assert early["estimate"] == pytest.approx(0.0028, abs=0.0004)
    assert early["after 1"] == pytest.approx(0.003, abs=0.001)
    assert late["positive"] <= 0.2
    assert late["after 10"] < 0
