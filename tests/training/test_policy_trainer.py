from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import make_tiny_model
from peft import LoraConfig, get_peft_model
from policy_training import (
    EvenTokens,
    assert_same_weights,
    make_stage,
    make_trainer,
    trained_weights,
    weights_of,
)

from posttrain.errors import RewardError, TrainingError
from posttrain.methods.base import Channel, LossTerm, Method
from posttrain.recipe.schema import (
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyStage,
)
from posttrain.rollout.build import load_model, load_tokenizer
from posttrain.rollout.transformers import TransformersEngine
from posttrain.rollout.types import Example, RolloutBatch
from posttrain.training.forward import Reference
from posttrain.training.prompts import PromptOrder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def test_training_raises_the_reward_and_changes_the_weights(model_folder, tmp_path):
    log = []
    stage = PolicyStage(
        steps=12, prompts_per_step=4, group_size=8, optimizer=OptimizerConfig(learning_rate=3e-3)
    )
    trainer = make_trainer(
        model_folder, tmp_path, stage=stage, on_log=lambda step, steps, metrics: log.append((step, metrics))
    )
    before = weights_of(trainer)
    trainer.train()
    assert any(not torch.equal(before[name], after) for name, after in weights_of(trainer).items())
    rewards = [metrics["reward"] for _, metrics in log]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3
    assert [step for step, _ in log] == list(range(1, 13))
    assert trainer.engine.version == 11  # a sync before every batch but the first
    for _, metrics in log:
        assert metrics["sampling/logprob_difference"] < 1e-5
        assert metrics["tokens/trained"] == metrics["tokens/sampled"] > 0


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo", "cispo", "gspo", "rloo", "reinforce_pp"])
def test_the_weights_do_not_depend_on_the_micro_batch_size(model_folder, tmp_path, kind):
    results = [
        trained_weights(
            model_folder,
            tmp_path,
            stage=make_stage(steps=2, loss=LossConfig(kind=kind), micro_batch_tokens=tokens),
        )
        for tokens in (1, 60, 10_000)
    ]
    start = load_model(ModelConfig(path=str(model_folder))).state_dict()
    assert max((results[0][name] - start[name]).abs().max() for name in start) > 1e-4
    assert_same_weights(results[0], results[1])
    assert_same_weights(results[0], results[2])


class Reverse(Method):
    name = "reverse"

    def extend(self, batch, context):
        return RolloutBatch(batch.rollouts[::-1])


def test_the_weights_do_not_depend_on_the_order_of_rows(model_folder, tmp_path):
    plain = trained_weights(model_folder, tmp_path, stage=make_stage())
    reversed_rows = trained_weights(model_folder, tmp_path, stage=make_stage(), methods=[Reverse(None)])
    assert_same_weights(plain, reversed_rows)


class RestartedEngine:
    """A new transformers engine at every sync, as after a crash of the old one."""

    def __init__(self, model, tokenizer):
        self.tokenizer = tokenizer
        self.inner = TransformersEngine(model, tokenizer)
        self.max_model_len = self.inner.max_model_len
        self.version = 0

    def generate(self, requests):
        return self.inner.generate(requests)

    def sync(self, model):
        self.inner.close()
        self.inner = TransformersEngine(model, self.tokenizer)
        self.version += 1

    def close(self):
        self.inner.close()


def test_the_weights_do_not_depend_on_engine_restarts(model_folder, tmp_path):
    plain = trained_weights(model_folder, tmp_path, stage=make_stage())
    model = load_model(ModelConfig(path=str(model_folder)))
    engine = RestartedEngine(model, load_tokenizer(ModelConfig(path=str(model_folder))))
    restarted = trained_weights(model_folder, tmp_path, stage=make_stage(), model=model, engine=engine)
    assert_same_weights(plain, restarted, tolerance=0)


def test_several_updates_per_batch_sample_once_and_clip(model_folder, tmp_path):
    log, scorer = [], EvenTokens()
    stage = make_stage(updates_per_batch=3, loss=LossConfig(clip_low=0.05))
    stage = stage.model_copy(update={"optimizer": OptimizerConfig(learning_rate=3e-3)})
    trainer = make_trainer(
        model_folder,
        tmp_path,
        stage=stage,
        scorer=scorer,
        on_log=lambda step, steps, metrics: log.append(metrics),
    )
    trainer.train()
    assert len(log) == 9
    assert scorer.calls == 3
    assert trainer.engine.version == 2
    assert log[2]["ratio/clipped_low"] + log[2]["ratio/clipped_high"] > 0


def test_an_engine_with_other_weights_stops_the_run(model_folder, tmp_path):
    class Stale(RestartedEngine):
        def sync(self, model):
            self.version += 1  # keeps the old weights

    model = load_model(ModelConfig(path=str(model_folder)))
    frozen = load_model(ModelConfig(path=str(model_folder)))
    engine = Stale(frozen, load_tokenizer(ModelConfig(path=str(model_folder))))
    trainer = make_trainer(model_folder, tmp_path, stage=make_stage(), model=model, engine=engine)
    with pytest.raises(TrainingError, match=r"step 2, after sync 1, the engine's log-probs differ"):
        trainer.train()


def test_a_frozen_model_is_an_error(model_folder, tmp_path):
    model = load_model(ModelConfig(path=str(model_folder))).requires_grad_(False)
    with pytest.raises(TrainingError, match="no parameter of the model is trainable"):
        make_trainer(model_folder, tmp_path, model=model)


def test_weights_that_do_not_move_are_an_error(model_folder, tmp_path):
    optimizer = OptimizerConfig(name="sgd", learning_rate=1e-30, max_grad_norm=0.0)
    stage = make_stage().model_copy(update={"optimizer": optimizer})
    model = load_model(ModelConfig(path=str(model_folder)))
    for parameter in model.parameters():
        parameter.data[parameter.data == 0] = 0.01  # nothing is too small to be added to zero
    trainer = make_trainer(model_folder, tmp_path, stage=stage, model=model)
    with pytest.raises(TrainingError, match="unchanged after step 1"):
        trainer.train()


def test_a_warm_up_begins_at_zero_which_is_no_error(model_folder, tmp_path):
    rates = []
    stage = PolicyStage(
        steps=3,
        prompts_per_step=2,
        group_size=4,
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_steps=2),
    )
    trainer = make_trainer(
        model_folder,
        tmp_path,
        stage=stage,
        on_log=lambda step, steps, metrics: rates.append(metrics["learning_rate"]),
    )
    before = weights_of(trainer)
    trainer.train()
    assert rates == [0.0, 5e-4, 1e-3]
    assert any(not torch.equal(before[name], after) for name, after in weights_of(trainer).items())


def test_unscored_rollouts_are_drawn_again_with_other_seeds(model_folder, tmp_path):
    seen = []
    records = []

    def first_try_of_index_1(rollout):
        key = (rollout.request.group, rollout.index)
        broken = rollout.index == 1 and key not in seen
        seen.append(key)
        return broken

    log = []
    trainer = make_trainer(
        model_folder,
        tmp_path,
        scorer=EvenTokens(first_try_of_index_1),
        on_log=lambda step, steps, metrics: log.append(metrics),
        on_rollouts=records.append,
    )
    trainer.train()
    for record in records:
        assert len(record.collected.batch) == 12
        assert not record.collected.dropped
        assert sum("/drawn-1" in name for name in record.collected.reasons) == 3
        assert {rollout.id for rollout in record.collected.redrawn} == record.collected.reasons.keys()
    assert log[0]["rewards/unscored"] == pytest.approx(3 / 15)


def test_rollouts_that_stay_unscored_are_dropped_and_never_trained(model_folder, tmp_path):
    records = []
    trainer = make_trainer(
        model_folder,
        tmp_path,
        scorer=EvenTokens(lambda rollout: rollout.index == 1),
        on_rollouts=records.append,
    )
    trainer.train()
    for record in records:
        assert {rollout.index for rollout in record.collected.dropped} == {1}
        trained = set(record.channels[0].advantages)
        assert len(trained) == 9
        assert not trained & {rollout.id for rollout in record.collected.dropped}


def test_on_error_fail_names_reward_and_example(model_folder, tmp_path):
    trainer = make_trainer(
        model_folder, tmp_path, scorer=EvenTokens(lambda rollout: rollout.index == 1), on_error="fail"
    )
    with pytest.raises(
        RewardError, match=r"reward 'even' failed on 3 of 12 .* example '\d\+\d=': exception: boom"
    ):
        trainer.train()


def test_a_step_without_a_single_score_stops_the_run(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, scorer=EvenTokens(lambda rollout: True), on_error="drop")
    with pytest.raises(TrainingError, match="none of the 12 rollouts of step 0 could be scored"):
        trainer.train()


def test_dynamic_sampling_replaces_groups_without_variance(model_folder, tmp_path):
    records = []

    class Flat(EvenTokens):
        def score(self, rollouts, step=None):
            report = super().score(rollouts, step)
            for rollout in rollouts:
                if rollout.request.group.count(".") == 1 and rollout.request.group.endswith(".0"):
                    rollout.reward = 0.5
            return report

    stage = make_stage(dynamic_sampling=2)
    make_trainer(model_folder, tmp_path, stage=stage, scorer=Flat(), on_rollouts=records.append).train()
    for index, record in enumerate(records):
        assert {rollout.request.group for rollout in record.collected.dropped} == {f"{index}.0"}
        groups = set(record.collected.batch.groups())
        assert groups == {f"{index}.0.1", f"{index}.1", f"{index}.2"}


def test_truncated_completions_can_be_left_out(model_folder, tmp_path):
    records = []
    stage = make_stage(mask_truncated=True)
    make_trainer(model_folder, tmp_path, stage=stage, on_rollouts=records.append).train()
    dropped = [rollout for record in records for rollout in record.collected.dropped]
    assert dropped
    assert all(rollout.truncated for rollout in dropped)
    assert not any(rollout.truncated for record in records for rollout in record.collected.batch)


class Double(Method):
    """The outcome channel once more, as a channel of its own."""

    name = "double"

    def channels(self, batch, context):
        rollouts = batch.rollouts
        mean = sum(rollout.reward for rollout in rollouts) / len(rollouts)
        return [Channel("centred", {rollout.id: rollout.reward - mean for rollout in rollouts}, weight=0.5)]


class Supervised(Method):
    """A supervised term and a record of the hooks that were called."""

    name = "supervised"

    def __init__(self, config):
        super().__init__(config)
        self.calls = []

    def plan(self, plan, context):
        self.calls.append("plan")
        plan.requests = plan.requests[:2]
        return plan

    def auxiliary(self, context):
        self.calls.append("auxiliary")
        return [LossTerm("copy", [((10, 11), (12, 13, 14))], weight=0.3)]

    def after_update(self, context):
        self.calls.append("after_update")


def test_method_hooks_shape_the_step(model_folder, tmp_path):
    method, log, records = Supervised(None), [], []
    trainer = make_trainer(
        model_folder,
        tmp_path,
        stage=make_stage(),
        methods=[method, Double(None)],
        on_log=lambda step, steps, metrics: log.append(metrics),
        on_rollouts=records.append,
    )
    trainer.train()
    assert method.calls == ["plan", "auxiliary", "after_update"] * 3
    assert all(len(record.collected.batch) == 8 for record in records)
    assert [channel.name for channel in records[0].channels] == ["outcome", "centred"]
    assert log[0]["tokens/trained"] == log[0]["tokens/sampled"] + 3


def test_a_second_channel_and_a_term_add_up_and_keep_their_denominators(model_folder, tmp_path):
    """Gradients are linear: the step with all terms is the sum of the steps with one each."""

    class Nothing(Double):
        def channels(self, batch, context):
            return [Channel("outcome", {})]

    def change(methods):
        stage = make_stage().model_copy(update={"steps": 1})
        after = trained_weights(model_folder, tmp_path, stage=stage, methods=methods)
        return {name: after[name] - start[name] for name in start}

    class Term(Method):
        name = "term"

        def auxiliary(self, context):
            return [LossTerm("copy", [((10, 11), (12, 13, 14))], weight=0.3)]

    start = load_model(ModelConfig(path=str(model_folder))).state_dict()
    outcome, channel = change([]), change([Nothing(None), Double(None)])
    term, together = change([Nothing(None), Term(None)]), change([Double(None), Term(None)])
    for name in start:
        total = outcome[name] + channel[name] + term[name]
        torch.testing.assert_close(total, together[name], rtol=1e-3, atol=2e-6, msg=name)


def test_lora_trains_the_adapter_alone_and_kl_uses_the_base(model_folder, tmp_path):
    base = load_model(ModelConfig(path=str(model_folder)))
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    log = []
    stage = make_stage(loss=LossConfig(kl=0.1))
    stage = stage.model_copy(update={"optimizer": OptimizerConfig(learning_rate=1e-2)})
    trainer = make_trainer(
        model_folder,
        tmp_path,
        stage=stage,
        model=model,
        reference=Reference(),
        on_log=lambda step, steps, metrics: log.append(metrics),
    )
    trainer.train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert changed
    assert all("lora_" in name for name in changed)
    assert log[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert log[2]["kl"] > 1e-5
    assert log[2]["sampling/logprob_difference"] < 1e-5


def test_kl_to_a_frozen_copy_holds_the_policy_back(model_folder, tmp_path):
    def last_kl(weight):
        log = []
        frozen = load_model(ModelConfig(path=str(model_folder))).eval().requires_grad_(False)
        stage = make_stage(loss=LossConfig(kl=weight)).model_copy(
            update={"steps": 10, "optimizer": OptimizerConfig(learning_rate=1e-3)}
        )
        make_trainer(
            model_folder,
            tmp_path,
            stage=stage,
            reference=Reference(frozen),
            on_log=lambda step, steps, metrics: log.append(metrics["kl"]),
        ).train()
        assert log[0] == pytest.approx(0.0, abs=1e-6)
        return log[-1]

    assert last_kl(1.0) < 0.7 * last_kl(1e-9)


def test_prompt_order_is_a_permutation_per_epoch_and_needs_no_state():
    examples = [Example(id=str(index), prompt="x") for index in range(7)]
    order = PromptOrder(examples, seed=3)
    first, second = ([order.at(epoch * 7 + index).id for index in range(7)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == sorted(example.id for example in examples)
    assert first != second
    assert PromptOrder(examples, seed=3).at(9).id == second[2]
    assert [PromptOrder(examples, seed=4).at(index).id for index in range(7)] != first


def test_seeds_do_not_depend_on_how_slots_are_spread(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path)
    context = [trainer._context(5, None, trainer.totals)]

    def sample(slots):
        return trainer.collector.sample(trainer.collector.plan(slots, context), step=5).batch

    whole = sample(range(3))
    parts = [sample(range(slot, slot + 1)) for slot in range(3)]
    assert [r.completion.token_ids for r in whole] == [r.completion.token_ids for part in parts for r in part]
    assert len({replace(r.request.sampling, n=1).seed for r in whole}) == 3
