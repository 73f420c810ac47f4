"""The method on a tiny model: what is asked, trained, gated and kept."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers import make_tiny_model
from policy_training import EvenTokens, assert_same_weights, make_stage, make_trainer, weights_of

from posttrain.data.self_predictions import Prediction, write_prediction
from posttrain.errors import RecipeError
from posttrain.methods.base import Channel, Method, load_methods
from posttrain.methods.masa import Controls, Masa
from posttrain.recipe.masa_schema import EfficientConfig, ExpertConfig, GuardConfig, MasaConfig
from posttrain.recipe.meta_schema import MetaFormat
from posttrain.recipe.schema import ModelConfig, OptimizerConfig
from posttrain.recipe.stage_schema import CorrectConfig
from posttrain.rewards.scorer import ScoreReport
from posttrain.rollout.build import load_model, load_tokenizer
from posttrain.rollout.transformers import TransformersEngine
from posttrain.rollout.types import Completion

QUESTION = MetaFormat(system=None, template="? {problem}")
PAPER = EfficientConfig(start=1, guard=None, min_limit=1)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


class Oracle(TransformersEngine):
    """Answers with a self-prediction where one is asked for: `predict(problem, index)` says which."""

    def __init__(self, folder, predict):
        config = ModelConfig(path=str(folder))
        self.tokenizer = load_tokenizer(config)
        super().__init__(load_model(config), self.tokenizer, own_weights=True)
        self.predict = predict
        self.calls = []

    def generate(self, requests):
        self.calls.append(list(requests))
        asked = [request for request in requests if request.role != "meta"]
        answers = iter(super().generate(asked) if asked else [])
        return [self._meta(request) if request.role == "meta" else next(answers) for request in requests]

    def _meta(self, request):
        problem = request.example.prompt.removeprefix("? ")
        return [self._answer(self.predict(problem, index)) for index in range(request.sampling.n)]

    def _answer(self, prediction):
        text = write_prediction(prediction, QUESTION)
        ids = tuple(self.tokenizer(text)["input_ids"])
        return Completion(ids, (-1.0,) * len(ids), "stop", text)

    def solutions(self):
        """Solution requests of every step."""
        return [[r for r in call if r.role == "solution"] for call in self.calls if any(
            r.role == "solution" for r in call)]  # fmt: skip


class Outcomes:
    """A stand-in for the scorer: what `right` says of a rollout, which counts as finished."""

    def __init__(self, right):
        self.right = right

    def score(self, rollouts, step=None):
        assert all(rollout.request.role == "solution" for rollout in rollouts)
        for rollout in rollouts:
            rollout.completion = replace(rollout.completion, finish_reason="stop")
            rollout.reward = float(self.right(rollout))
            rollout.rewards, rollout.reward_errors = {"right": rollout.reward}, {}
        return ScoreReport(len(rollouts), 0, {})


def by_problem(rollout):
    return int(rollout.request.example.prompt[0]) % 2 == 0


def by_tokens(rollout):
    return rollout.completion.token_ids[0] % 2 == 0


def masa(**changes):
    correct = CorrectConfig(threshold=0.5)
    return Masa(MasaConfig(group_size=3, question=QUESTION, correct=correct, **changes))


def run(trainer):
    """Trains; the log and, for every batch, its record."""
    log, records = [], []
    trainer.on_log = lambda step, steps, metrics: log.append(metrics)
    trainer.on_rollouts = records.append
    trainer.train()
    trainer.close()
    return log, records


def channel(record, name):
    return next(channel for channel in record.channels if channel.name == name)


def stage(steps=3, **changes):
    built = make_stage(**changes).model_copy(update={"steps": steps})
    return built.model_copy(update={"optimizer": OptimizerConfig(learning_rate=1e-3)})


def true_rate(problem, index):
    return Prediction(("=",), 8 if int(problem[0]) % 2 == 0 else 0, 6 + index)


@pytest.fixture(scope="module")
def parallel(model_folder, tmp_path_factory):
    """Two steps of the parallel phase, and the same without the method."""
    folder = tmp_path_factory.mktemp("parallel")
    trainer = make_trainer(model_folder, folder, stage=stage(2), methods=[masa()])
    plain = make_trainer(model_folder, folder, stage=stage(2))
    return run(trainer), run(plain), trainer


def test_self_predictions_are_groups_of_the_same_batch(parallel):
    (log, records), (_, plain), _ = parallel
    batch = records[0].collected.batch
    assert {role: len(batch.with_role(role)) for role in ("solution", "meta")} == {"solution": 12, "meta": 9}
    assert {len(own) for own in batch.with_role("meta").groups().values()} == {3}
    assert all(r.request.prompt_ids[:1] != () and r.reward is not None for r in batch.with_role("meta"))
    assert len({rollout.id for rollout in batch}) == 21
    # the solutions and their advantages are what they are without the method
    assert channel(records[0], "outcome").advantages == channel(plain[0], "outcome").advantages
    assert [r.completion.token_ids for r in batch.with_role("solution")] == [
        r.completion.token_ids for r in plain[0].collected.batch
    ]
    assert log[0]["rewards/unscored"] == 0
    assert log[0]["masa/tokens/meta_share"] == pytest.approx(
        sum(len(r.completion.token_ids) for r in batch.with_role("meta"))
        / sum(len(r.completion.token_ids) for r in batch)
    )


def test_one_loss_over_the_union(parallel):
    """Both kinds are divided by the number of all tokens: no weight between the two."""
    _, _, trainer = parallel
    denominators = trainer._batch.denominators
    assert denominators["outcome"] == denominators["meta"]
    assert denominators["meta"].tokens == sum(len(row.positions) for row in trainer._batch.rows)


def test_rewards_come_from_the_solutions_of_the_same_problem(model_folder, tmp_path):
    engine = Oracle(model_folder, true_rate)
    trainer = make_trainer(
        model_folder,
        tmp_path,
        stage=stage(1, verify_syncs=0),
        methods=[masa()],
        engine=engine,
        scorer=Outcomes(by_problem),
    )
    log, records = run(trainer)
    for rollout in records[0].collected.batch.with_role("meta"):
        solved = int(rollout.request.example.prompt[2]) % 2 == 0
        assert rollout.rewards["meta_difficulty"] == 1
        assert rollout.rewards["meta_notion"] == 0  # the problem has the sign already
        assert rollout.reward == pytest.approx((1 + rollout.rewards["meta_length"]) / 3)
        assert solved or rollout.reward == pytest.approx(1 / 3)  # the most there is without a solution
    assert log[0]["masa/rate_mae"] == 0
    assert log[0]["masa/rate_spearman"] == pytest.approx(1)
    assert log[0]["masa/gate/would"] == 3
    assert log[0]["masa/gate/precision"] == 1
    truths = {key: value for key, value in log[0].items() if key.startswith("masa/level/")}
    assert truths["masa/level/8/truth"] == 1
    assert truths["masa/level/0/truth"] == 0


def test_gated_problems_cost_no_solutions_and_stay_gated(model_folder, tmp_path):
    """Odd problems are said to be unsolvable, even ones to be solved half of the time."""
    engine = Oracle(model_folder, lambda p, i: Prediction((), 4 if int(p[0]) % 2 == 0 else 0, 3))
    method = masa(efficient=PAPER)
    trainer = make_trainer(
        model_folder,
        tmp_path,
        stage=stage(12, verify_syncs=0),
        methods=[method],
        engine=engine,
        scorer=EvenTokens(),
    )
    log, records = run(trainer)
    steps = engine.solutions()
    assert len(steps[0]) == 3
    sampled = [request for step in steps[1:] for request in step]
    assert sampled
    assert all(int(request.example.prompt[0]) % 2 == 0 for request in sampled)
    assert {request.sampling.max_tokens for request in sampled} == {6}  # twice the predicted length
    completions = [r for record in records[1:] for r in record.collected.batch.with_role("solution")]
    assert max(len(rollout.completion.token_ids) for rollout in completions) <= 6
    assert {r.request.sampling.max_tokens for r in records[0].collected.batch.with_role("solution")} == {12}
    gated = [r for r in records[2].collected.batch.with_role("meta") if r.reward is None]
    assert not {r.id for r in gated} & channel(records[2], "meta").advantages.keys()
    # 12 steps of 3 are 36 of 16 problems: gated ones came again, and were not asked again
    asked = [r.example.prompt for call in engine.calls[2:] for r in call if r.role == "meta"]
    assert len(method.gated) == 8
    assert all(asked.count(f"? {name}") == 1 for name in list(method.gated)[:2])
    assert 0 < log[3]["masa/gate/share"] <= 1
    assert log[-1]["masa/cutoff/open"] == 1


def test_a_step_in_which_everything_is_gated(model_folder, tmp_path):
    engine = Oracle(model_folder, lambda p, i: Prediction((), 0, 3))
    method = masa(efficient=PAPER.model_copy(update={"regate": "reevaluate"}))
    trainer = make_trainer(
        model_folder, tmp_path, stage=stage(3, verify_syncs=0), methods=[method], engine=engine
    )
    log, records = run(trainer)
    assert [len(record.collected.batch.with_role("solution")) for record in records] == [12, 0, 0]
    assert log[2]["masa/gate/share"] == 1
    assert log[2]["tokens/with_advantage"] == 0
    assert method.gated == {}


def test_the_guard_keeps_the_parallel_phase_while_the_gate_would_be_wrong(model_folder, tmp_path):
    """All problems are said to be unsolvable, and each is solved now and then."""
    engine = Oracle(model_folder, lambda p, i: Prediction((), 0, 3))
    guard = GuardConfig(evidence=3, window=2)
    method = masa(efficient=EfficientConfig(start=1, guard=guard, min_limit=1))
    trainer = make_trainer(
        model_folder,
        tmp_path,
        stage=stage(3, verify_syncs=0),
        methods=[method],
        engine=engine,
        scorer=Outcomes(lambda rollout: rollout.index % 2),
    )
    log, _ = run(trainer)
    assert all(len(step) == 3 for step in engine.solutions())
    assert log[-1]["masa/gate/open"] == 0
    assert log[-1]["masa/gate/precision"] < 0.8
    assert len(method.controls.gate_window) == 2


def test_the_guard_audits_and_never_gates_all(model_folder, tmp_path):
    engine = Oracle(model_folder, true_rate)
    guard = GuardConfig(evidence=3, audit=0.3, max_fraction=0.5)
    method = masa(efficient=EfficientConfig(start=1, guard=guard, cutoff=False, regate="reevaluate"))
    trainer = make_trainer(
        model_folder,
        tmp_path,
        stage=stage(4, verify_syncs=0).model_copy(update={"prompts_per_step": 8}),
        methods=[method],
        engine=engine,
        scorer=Outcomes(by_problem),
    )
    log, records = run(trainer)
    sizes = [len(step) for step in engine.solutions()]
    assert sizes[0] == 8
    assert all(4 <= size <= 8 for size in sizes[1:])
    assert log[-1]["masa/gate/open"] == 1
    assert log[-1]["masa/gate/would"] == sizes[-1]  # those that were kept all the same, and audited ones
    assert all(r.reward is not None for r in records[-1].collected.batch.with_role("solution"))


def test_decisions_of_the_guard():
    config = EfficientConfig(start=5, guard=GuardConfig(evidence=20))

    def after(step, gate, cut=(0, 0), gating=False):
        controls = Controls(gating, False, [gate], [cut])
        controls.decide(step, config)
        return controls.gating, controls.cutting

    assert after(5, (20, 16)) == (True, False)
    assert after(4, (20, 20)) == (False, False)
    assert after(5, (19, 19)) == (False, False)
    assert after(5, (20, 15)) == (False, False)
    assert after(5, (20, 14), gating=True) == (True, False)
    assert after(5, (20, 13), gating=True) == (False, False)
    assert after(5, (9, 0), gating=True) == (True, False)
    assert after(5, (0, 0), (100, 2)) == (False, True)
    assert after(5, (0, 0), (100, 3)) == (False, False)
    assert after(5, (0, 0), (19, 0)) == (False, False)
    controls = Controls(False, False, [], [])
    controls.decide(5, EfficientConfig(start=5, guard=None, cutoff=False))
    assert (controls.gating, controls.cutting) == (True, False)


def test_the_efficient_phase_after_the_last_step_changes_nothing(parallel, model_folder, tmp_path):
    (log, _), _, trainer = parallel
    late = make_trainer(
        model_folder, tmp_path, stage=stage(2), methods=[masa(efficient=EfficientConfig(start=2))]
    )
    late_log, _ = run(late)
    assert [metrics["loss"] for metrics in late_log] == [metrics["loss"] for metrics in log]
    assert_same_weights(weights_of(late), weights_of(trainer), tolerance=0)


def test_hints_are_drawn_for_each_solution(model_folder, tmp_path):
    engine = Oracle(model_folder, lambda p, i: Prediction((f"n{i}",), 4, 3))
    efficient = EfficientConfig(start=0, gate=False, cutoff=False, hints=True, guard=None)
    trainer = make_trainer(
        model_folder,
        tmp_path,
        stage=stage(1, verify_syncs=0),
        methods=[masa(efficient=efficient)],
        engine=engine,
    )
    _, records = run(trainer)
    solutions = records[0].collected.batch.with_role("solution")
    assert len({rollout.id for rollout in solutions}) == 12
    assert all(len(own) == 4 for own in solutions.groups().values())
    prompts = {engine.tokenizer.decode(rollout.request.prompt_ids) for rollout in solutions}
    assert len(prompts) > 3
    assert all("following notions: n" in prompt for prompt in prompts)


def test_experts_carry_the_truth(model_folder, tmp_path):
    engine = Oracle(model_folder, lambda p, i: Prediction((str(i), "#"), 1, 99))
    method = masa(experts=ExpertConfig(min_notion=0.01, batch=1, updates=2))
    trainer = make_trainer(
        model_folder,
        tmp_path,
        stage=stage(1, verify_syncs=0).model_copy(update={"prompts_per_step": 8}),
        methods=[method],
        engine=engine,
        scorer=Outcomes(by_problem),
    )
    _, records = run(trainer)
    groups = records[0].collected.batch.with_role("solution").groups()
    assert method.clone_steps == 1
    assert method.experts == []
    assert method.cloned
    for prompt, answer in method.cloned:
        assert answer[-1] == engine.tokenizer.eos_token_id
        told = json.loads(engine.tokenizer.decode(answer[:-1]))
        problem = engine.tokenizer.decode(prompt).partition("? ")[2].partition("<")[0]
        own = next(own for own in groups.values() if own[0].request.example.prompt == problem)
        mean = np.mean([len(rollout.completion.token_ids) for rollout in own])
        assert (told["pass_rate"], told["solution_length"]) == (8, round(mean))
        assert "#" in told["math_notion"]
    assert trainer._batch.terms == {"experts": 1.0}
    assert trainer._batch.denominators["experts"].tokens == sum(len(answer) for _, answer in method.cloned)


class Extra(Method):
    """A further channel on the solutions."""

    name = "extra"

    def channels(self, batch, context):
        return [Channel("extra", {rollout.id: 0.1 for rollout in batch.with_role("solution")})]


@pytest.mark.parametrize("overlap", [0, 1])
def test_goes_on_exactly_where_it_stopped(model_folder, tmp_path, overlap):
    """With a second method, replaced prompts, an open gate and experts."""
    guard = GuardConfig(evidence=2, audit=0.4, leave_below=0.0, precision=0.0)
    options = {
        "efficient": EfficientConfig(start=1, guard=guard, min_limit=1, tolerance=0.5, sigma=10.0),
        "experts": ExpertConfig(min_notion=0.01, batch=3, updates=2),
    }

    def trainer():
        engine = Oracle(model_folder, lambda p, i: Prediction((str(i), "e"), (i + int(p[0])) % 9, 9 + i))
        return make_trainer(
            model_folder,
            tmp_path,
            stage=stage(4, verify_syncs=0, overlap=overlap, dynamic_sampling=1),
            methods=[Extra(None), masa(**options)],
            engine=engine,
            scorer=Outcomes(by_tokens),
        )

    whole = trainer()
    log, records = run(whole)
    assert {channel.name for channel in records[0].channels} == {"outcome", "extra", "meta"}
    assert log[-1]["masa/gate/open"] == 1

    first = trainer()

    def stop(step, steps, metrics):
        first.control.should_save = first.control.should_training_stop = step == 2

    first.on_log = stop
    first.train()
    state, tensors = first.state_dict()
    first.close()
    resumed = trainer()
    resumed.load_state_dict(json.loads(json.dumps(state)), tensors)
    later = []
    resumed.on_log = lambda step, steps, metrics: later.append(metrics)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    resumed.close()
    named = [key for key in log[-1] if key.startswith("masa/")] + ["loss", "grad_norm"]
    assert [{key: metrics.get(key) for key in named} for metrics in later] == [
        {key: metrics.get(key) for key in named} for metrics in log[2:]
    ]
    assert_same_weights(weights_of(whole), weights_of(resumed), tolerance=0)
    assert resumed.methods[1].state_dict() == whole.methods[1].state_dict()


def test_options_are_checked():
    (spec,) = load_methods([{"masa": {"group_size": 4, "efficient": {"start": 3, "guard": None}}}])
    assert spec.config.efficient.guard is None
    assert spec.config.efficient.sigma == 0.1
    with pytest.raises(RecipeError, match=r"methods: masa\.efficient\.sigmas"):
        load_methods([{"masa": {"efficient": {"sigmas": 1}}}])


def test_a_reward_that_is_not_there(model_folder, tmp_path):
    config = MasaConfig(group_size=2, question=QUESTION, correct=CorrectConfig(reward="other"))
    trainer = make_trainer(model_folder, tmp_path, stage=stage(1), methods=[Masa(config)])
    with pytest.raises(RecipeError, match="no reward 'other'; there are even"):
        trainer.train()
