"""MRT in the trainer: what is asked for, what is trained, what a checkpoint keeps."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from helpers import make_tiny_model
from policy_training import EvenTokens, assert_same_weights, make_trainer, weights_of

from posttrain.methods.base import load_methods
from posttrain.methods.mrt import MRT
from posttrain.recipe.schema import ModelConfig, OptimizerConfig, PolicyStage
from posttrain.rollout import probes
from posttrain.rollout.build import load_model, load_tokenizer
from posttrain.rollout.tokens import decode_texts
from posttrain.rollout.transformers import TransformersEngine
from posttrain.training.advantages import group_advantages

# A random model writes no words: every lower-case letter ends an episode, the first digit the thinking.
EPISODES = {"separator": "e", "markers": [""], "min_gap": 1}
PROBES = {"episodes": EPISODES, "branches": 3, "cue": "!z", "open": "", "close": "z", "max_tokens": 2}
CUE = 2
PROMPT = 4


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def letters_end_episodes(monkeypatch):
    def decode(tokenizer, rows):
        return [re.sub("[0-9]", "z", re.sub("[a-z]", "e", text)) for text in decode_texts(tokenizer, rows)]

    monkeypatch.setattr(probes, "decode_texts", decode)


def method(mode, **options):
    [spec] = load_methods([{"mrt": {"mode": mode, "probes": PROBES, **options}}])
    assert spec.kind is MRT
    return spec.kind(spec.config)


class Run:
    """A trained trainer with the records and the metrics of its steps."""

    def __init__(self, folder, tmp_path, mode, steps=2, scorer=None, **options):
        self.records, self.metrics = [], []
        stage = PolicyStage(
            steps=steps, prompts_per_step=3, group_size=4, optimizer=OptimizerConfig(learning_rate=1e-3)
        )
        self.trainer = make_trainer(
            folder,
            tmp_path,
            stage=stage,
            methods=[method(mode, **options)],
            scorer=scorer or Thirds(),
            on_rollouts=self.records.append,
            on_log=lambda step, steps, metrics: self.metrics.append(metrics),
        )
        self.trainer.train()

    def groups(self):
        """Rollouts of each prompt's group by role, and the channels, of every step."""
        for record in self.records:
            for key, group in record.collected.batch.groups().items():
                if "/" not in key:
                    by_role = {}
                    for rollout in group:
                        by_role.setdefault(rollout.request.role, []).append(rollout)
                    yield by_role, {channel.name: channel for channel in record.channels}


class Thirds(EvenTokens):
    """Scores 0 or 1, so that forced answers and rollouts are often right and often wrong."""

    def score(self, rollouts, step=None):
        report = super().score(rollouts, step)
        for rollout in rollouts:
            if rollout.reward is not None:
                rollout.reward = float(sum(rollout.completion.token_ids) % 3 == 0)
        return report


def rewards(rollouts):
    return np.array([rollout.reward for rollout in rollouts])


def test_implicit_group_splits_every_group(model_folder, tmp_path):
    run = Run(model_folder, tmp_path, "implicit_group")
    lengths = set()
    for roles, channels in run.groups():
        going_on, forced = roles["solution"], roles["terminate"]
        assert (len(going_on), len(forced)) == (2, 2)
        prompt = going_on[0].request.prompt_ids
        lengths.add(len(prompt) - PROMPT)
        assert forced[0].request.prompt_ids[:-CUE] == prompt
        assert forced[0].request.given == going_on[0].request.given + "!z"
        assert going_on[0].request.sampling.max_tokens == 12 - (len(prompt) - PROMPT)
        expected = group_advantages(rewards(going_on + forced), [0] * 4)
        found = [channels["outcome"].advantages[rollout.id] for rollout in going_on + forced]
        np.testing.assert_allclose(found, expected)
    assert len(lengths) > 1  # some prefixes are not empty
    assert {"mrt/progress", "mrt/trace_tokens", "mrt/probe_share"} <= run.metrics[0].keys()


def test_terminations_may_be_left_out_of_the_training(model_folder, tmp_path):
    run = Run(model_folder, tmp_path, "implicit_group", train_on_terminations=False)
    for roles, channels in run.groups():
        assert not {r.id for r in roles["terminate"]} & channels["outcome"].advantages.keys()


def test_termination_baseline(model_folder, tmp_path):
    for roles, channels in Run(model_folder, tmp_path, "termination_baseline").groups():
        assert (len(roles["solution"]), len(roles["probe"])) == (4, 3)
        baseline = rewards(roles["probe"]).mean()
        for rollout in roles["solution"]:
            assert channels["outcome"].advantages[rollout.id] == pytest.approx(rollout.reward - baseline)
        assert not {r.id for r in roles["probe"]} & channels["outcome"].advantages.keys()


def test_explicit_pays_for_the_next_episode(model_folder, tmp_path):
    run = Run(model_folder, tmp_path, "explicit", alpha=2.0)
    probed = {
        rollout.request.group
        for record in run.records
        for rollout in record.collected.batch.with_role("probe")
    }
    measured = 0
    for roles, channels in run.groups():
        before = rewards(roles["probe"]).mean()
        after = np.array([rollout.info["mrt"]["values"][0] for rollout in roles["solution"]])
        for rollout, value in zip(roles["solution"], after, strict=True):
            own = [group for group in probed if group.startswith(f"{rollout.id}@")]
            measured += len(own)
            assert own or value == rollout.reward
        expected = group_advantages(rewards(roles["solution"]) + 2.0 * (after - before), [0] * 4)
        found = [channels["outcome"].advantages[rollout.id] for rollout in roles["solution"]]
        np.testing.assert_allclose(found, expected)
    assert measured > 0


@pytest.mark.parametrize("credit", ["local", "to_go"])
def test_online_pays_every_episode_on_its_tokens(model_folder, tmp_path, credit):
    run = Run(model_folder, tmp_path, "online", credit=credit)
    for record, metrics in zip(run.records, run.metrics, strict=True):
        outcome, bonus = record.channels
        solutions = record.collected.batch.with_role("solution").rollouts
        assert outcome.advantages.keys() == bonus.advantages.keys() == {r.id for r in solutions}
        steps = {r.id: np.diff(r.info["mrt"]["values"]) for r in solutions}
        if credit == "to_go":
            steps = {name: values[::-1].cumsum()[::-1] for name, values in steps.items()}
        every = np.concatenate([*steps.values()])
        for rollout in solutions:
            bounds = rollout.info["mrt"]["bounds"]
            expected = np.zeros(len(rollout.completion.token_ids))
            for value, start, end in zip(steps[rollout.id], bounds, bounds[1:], strict=False):
                expected[start:end] = (value - every.mean()) / (every.std(ddof=1) + 1e-4)
            np.testing.assert_allclose(bonus.advantages[rollout.id], expected, atol=1e-9)
        assert metrics["mrt/telescoping_error"] < 1e-6
        assert 0 < metrics["mrt/prefix_reuse"] < 1
        forced = record.collected.batch.with_role("probe").rollouts
        sampled = sum(len(r.completion.token_ids) for r in solutions)
        asked = sum(len(r.completion.token_ids) for r in forced)
        assert metrics["mrt/probe_share"] == pytest.approx(asked / sampled)
        assert metrics["tokens/sampled"] == asked + sampled
        assert metrics["tokens/trained"] == sampled  # neither probes nor cues


def test_answers_forced_before_the_thinking_are_shared_by_a_group(model_folder, tmp_path):
    run = Run(model_folder, tmp_path, "online", steps=1)
    batch = run.records[0].collected.batch
    solutions = batch.with_role("solution")
    cuts = sum(len(rollout.info["mrt"]["bounds"]) - 2 for rollout in solutions)
    assert len(batch.with_role("probe")) == (3 + cuts) * PROBES["branches"]
    first = {r.request.group: set() for r in solutions}
    for rollout in solutions:
        first[rollout.request.group].add(rollout.info["mrt"]["values"][0])
    assert all(len(values) == 1 for values in first.values())


def test_a_probe_without_a_score_is_no_wrong_answer(model_folder, tmp_path):
    """The value is unknown there: its episode goes with the next, and no J before means no progress."""
    scorer = Thirds(broken=lambda rollout: rollout.request.role == "probe" and rollout.index == 0)
    one = Run(model_folder, tmp_path, "online", steps=1, scorer=scorer)
    values = [
        v for r in one.records[0].collected.batch.with_role("solution") for v in r.info["mrt"]["values"]
    ]
    assert all(value in (0, 0.5, 1) for value in values)  # of two scored answers
    scorer = Thirds(broken=lambda rollout: rollout.request.role == "probe")
    none = Run(model_folder, tmp_path, "online", steps=1, scorer=scorer)
    assert none.records[0].channels[1].advantages == {}
    assert math.isfinite(none.metrics[0]["loss"])


def test_backtrack_is_paid_for_what_the_return_gains(model_folder, tmp_path):
    run = Run(model_folder, tmp_path, "backtrack", backtrack="[A-Z]")
    returned = 0
    for roles, channels in run.groups():
        values = [r.info["mrt"]["values"] if "mrt" in r.info else [0, 0] for r in roles["solution"]]
        returned += sum("mrt" in r.info for r in roles["solution"])
        gains = np.array([after - before for before, after in values])
        expected = group_advantages(rewards(roles["solution"]) + gains, [0] * 4)
        found = [channels["outcome"].advantages[rollout.id] for rollout in roles["solution"]]
        np.testing.assert_allclose(found, expected)
    assert returned > 0


@pytest.mark.parametrize(("mode", "overlap"), [("explicit", 0), ("online", 1)])
def test_resume_is_exact(model_folder, tmp_path, mode, overlap):
    """Stopped after two of three steps, with stored traces of 16 prompts and, overlapping, a batch ahead."""
    stage = PolicyStage(
        steps=3, prompts_per_step=8, group_size=2, overlap=overlap, optimizer={"learning_rate": 1e-3}
    )

    def trainer(log):
        config = ModelConfig(path=str(model_folder))
        engine = TransformersEngine(load_model(config), load_tokenizer(config), own_weights=True)
        return make_trainer(
            model_folder,
            tmp_path,
            stage=stage,
            methods=[method(mode)],
            scorer=Thirds(),
            engine=engine if overlap else None,
            on_log=lambda step, steps, metrics: log.append(metrics["loss"]),
        )

    losses = []
    whole = trainer(losses)
    whole.train()
    whole.close()

    first = trainer([])

    def save_and_stop(step, steps, metrics):
        first.control.should_save = first.control.should_training_stop = step == 2

    first.on_log = save_and_stop
    first.train()
    state, tensors = first.state_dict()
    first.close()
    state = json.loads(json.dumps(state))
    assert (len(state["methods"]["mrt"]["traces"]) == 16) == (mode == "explicit")

    later = []
    resumed = trainer(later)
    resumed.load_state_dict(state, tensors)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    resumed.close()
    assert later == losses[2:]
    assert_same_weights(weights_of(resumed), weights_of(whole), tolerance=0)
    assert resumed.methods[0].state_dict() == whole.methods[0].state_dict()


def test_a_trace_is_replaced_when_it_is_old(model_folder, tmp_path):
    """16 prompts, 8 a step: each comes again two steps later."""
    stage = PolicyStage(steps=4, prompts_per_step=8, group_size=2)
    asked = {}
    for refresh in (2, 4):
        metrics = []
        make_trainer(
            model_folder,
            tmp_path,
            stage=stage,
            methods=[method("explicit", refresh_steps=refresh)],
            scorer=Thirds(),
            on_log=lambda step, steps, found: metrics.append(found),  # noqa: B023
        ).train()
        asked[refresh] = ["mrt/trace_tokens" in found for found in metrics]
    assert asked == {2: [True] * 4, 4: [True, True, False, False]}
