"""Methods together in one stage: every pair trains, both do their part, and both go on exactly."""

from __future__ import annotations

import itertools
import math
import re
import string
from dataclasses import replace

import pytest
from helpers import make_tiny_model
from policy_training import assert_same_weights, make_trainer, weights_of

from posttrain.data.error_analysis import SHORT
from posttrain.data.self_predictions import Prediction, write_prediction
from posttrain.errors import RecipeError
from posttrain.methods.base import Channel, LossTerm, Method, load_methods
from posttrain.recipe.check_methods import method_problems
from posttrain.recipe.load import load_recipe
from posttrain.recipe.meta_schema import MetaFormat
from posttrain.recipe.run import run_recipe
from posttrain.recipe.schema import LossConfig, ModelConfig, OptimizerConfig, PolicyStage, Recipe
from posttrain.rewards.scorer import ScoreReport
from posttrain.rollout import probes
from posttrain.rollout.build import load_model, load_tokenizer
from posttrain.rollout.tokens import decode_texts
from posttrain.rollout.transformers import TransformersEngine
from posttrain.rollout.types import Completion
from posttrain.training.checkpoint import Checkpointer
from posttrain.training.record import Clock
from posttrain.training.stop import StopSignals

STEPS, SAVED = 5, 3
STOPS = (*string.ascii_uppercase, *"!#$%&()*,./:;<>?@")
"""An untrained model hardly ever ends a completion by itself, and lengths have to differ."""
TERMS = {"min_terms": 2, "max_terms": 2, "max_term": 9}
QUESTION = {"system": None, "template": "? {problem}"}
OPTIONS = {
    "hdpo": {"cost": "tokens", "unit": 4, "weight": 0.5},
    "masa": {"group_size": 3, "question": QUESTION},
    "mrt": {
        "mode": "implicit_group",
        "probes": {
            "episodes": {"separator": "e", "markers": [""], "min_gap": 1},
            "branches": 2,
            "cue": "!z",
            "open": "",
            "close": "z",
            "max_tokens": 2,
        },
    },
    "amft": {
        "demonstrations": {
            "task": "arithmetic", "size": 12, "split": "train", "args": TERMS, "format": "text"
        },
        "batch_size": 3,
        "held_out": {
            "data": {
                "task": "arithmetic", "size": 6, "split": "validation", "args": TERMS, "format": "text"
            },
            "prompts": 2,
            "group_size": 4,
            "evidence": 1,
        },
        "first": 0,
        "interval": 2,
    },
    "mel": {"prompts": SHORT.model_dump(), "max_tokens": 24},
}  # fmt: skip
MODES = {("masa", "mrt"): "online", ("amft", "mrt"): "explicit", ("mel", "mrt"): "termination_baseline"}
"""Of MRT in the pairs in which it is not `implicit_group`."""
KINDS = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "gspo", "rloo", "reinforce_pp")
PAIRS = [
    (*sorted(pair), KINDS[number % len(KINDS)])
    for number, pair in enumerate(itertools.combinations(OPTIONS, 2))
]
WORKED = {
    "hdpo": lambda log: any(line["hdpo/active_groups"] > 0 for line in log),
    "masa": lambda log: all(line["masa/tokens/meta"] > 0 for line in log),
    "mrt": lambda log: any(line.get("mrt/progress") for line in log),
    "amft": lambda log: len({line["amft/mu"] for line in log}) > 1,
    "mel": lambda log: any(line["mel/kept"] > 0 for line in log),
}
"""What the log of a run shows where a method had something to do."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def letters_end_episodes(monkeypatch):
    """A random model writes no words: lower-case letters end episodes, the first digit the thinking."""

    def decode(tokenizer, rows):
        return [re.sub("[0-9]", "z", re.sub("[a-z]", "e", text)) for text in decode_texts(tokenizer, rows)]

    monkeypatch.setattr(probes, "decode_texts", decode)


class Speaker(TransformersEngine):
    """Samples from the model, but writes self-predictions and analyses itself: those have a form."""

    def __init__(self, folder):
        config = ModelConfig(path=str(folder))
        self.tokenizer = load_tokenizer(config)
        super().__init__(load_model(config), self.tokenizer, own_weights=True)

    def generate(self, requests):
        sampled = [request for request in requests if request.role not in ("meta", "analysis")]
        answers = iter(super().generate(sampled) if sampled else [])
        return [
            [self.written(request, index) for index in range(request.sampling.n)]
            if request.role in ("meta", "analysis")
            else next(answers)
            for request in requests
        ]

    def written(self, request, index):
        number = request.sampling.seed % 7 + index
        text = f"at {number};why ones;rule {number}"
        if request.role == "meta":
            text = write_prediction(
                Prediction(("=",), number % 9, 1 + number), MetaFormat.model_validate(QUESTION)
            )
        ids = tuple(self.tokenizer(text)["input_ids"])
        return Completion(ids, (-1.0,) * len(ids), "stop", text)


class Parity:
    """Right is a completion whose first token is even."""

    def score(self, rollouts, step=None):
        for rollout in rollouts:
            rollout.completion = replace(rollout.completion, finish_reason="stop")
            rollout.reward = float(rollout.completion.token_ids[0] % 2 == 0)
            rollout.rewards, rollout.reward_errors = {"right": rollout.reward}, {}
        return ScoreReport(len(rollouts), 0, {})


def entries_of(*names):
    mode = MODES.get(names, "online" if len(names) > 2 else "implicit_group")
    return [{name: OPTIONS[name] | ({"mode": mode} if name == "mrt" else {})} for name in names]


def stage_of(entries, kind="dapo"):
    return PolicyStage(
        steps=STEPS,
        prompts_per_step=3,
        group_size=6,
        loss=LossConfig(kind=kind),
        methods=entries,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        verify_syncs=0,
    )


def train(folder, run, stage):
    """Train from the newest checkpoint in a folder: the trainer, the log and the rollouts of its steps."""
    methods = [spec.kind(spec.config) for spec in load_methods(stage.methods)]
    checkpointer = Checkpointer(
        run, stage="policy", every=SAVED, keep=2, stop=StopSignals(), clock=Clock(), say=print
    )
    log, records = [], []
    trainer = make_trainer(
        folder,
        checkpointer.output_dir,
        stage=stage,
        methods=methods,
        engine=Speaker(folder),
        scorer=Parity(),
        stop=STOPS,
        on_log=lambda step, steps, metrics: log.append(metrics),
        on_rollouts=lambda record: records.append(
            [(r.id, r.completion.token_ids, r.reward) for r in record.collected.batch]
        ),
    )
    checkpointer.train(trainer, trainer)
    return trainer, log, records


def without_times(log):
    skipped = ("epoch", "seconds/")  # the helper has the Trainer not skip data, which it does not have
    return [{key: value for key, value in line.items() if not key.startswith(skipped)} for line in log]


CASES = [*PAIRS, (*sorted(OPTIONS), "dapo")]


@pytest.mark.parametrize("case", CASES, ids=["-".join(case) for case in CASES])
def test_methods_train_together_and_go_on_exactly(model_folder, tmp_path, case):
    *names, kind = case
    stage = stage_of(entries_of(*names), kind)
    recipe = Recipe(
        name="together",
        model={"path": str(model_folder)},
        data={"train": {"task": "arithmetic", "size": 40, "args": TERMS}},
        rewards=["exact_match"],
        stages=[{"policy": stage.model_dump()}],
    )
    assert list(method_problems(recipe, stage, "policy")) == []

    whole, log, records = train(model_folder, tmp_path, stage)
    assert len(log) == STEPS
    assert all(math.isfinite(line[key]) for line in log for key in ("loss", "grad_norm"))
    assert [name for name in names if not WORKED[name](log)] == []

    resumed, later, again = train(model_folder, tmp_path, stage)
    assert len(later) == STEPS - SAVED
    for found, expected in zip(without_times(later), without_times(log[SAVED:]), strict=True):
        assert {key: value for key, value in expected.items() if found.get(key) != value} == {}
    assert again == records[SAVED:]
    assert_same_weights(weights_of(resumed), weights_of(whole), tolerance=0)
    assert [m.state_dict() for m in resumed.methods] == [m.state_dict() for m in whole.methods]


class Extra(Method):
    """A channel and a supervised term that change nothing, as they are 0 everywhere."""

    name = "extra"

    def channels(self, batch, context):
        return [Channel("extra", {rollout.id: 0.0 for rollout in batch if rollout.reward is not None})]

    def auxiliary(self, context):
        return [LossTerm("nothing", [((1, 2), (3, 4, 5))], weight=0.0)]


def test_a_term_more_does_not_change_what_the_others_learn(model_folder, tmp_path):
    """Each channel and term has a denominator of its own."""
    weights = []
    for number, extra in enumerate(([], [Extra(None)])):
        plain = OptimizerConfig(name="sgd", learning_rate=0.1, max_grad_norm=0.0)
        stage = stage_of(entries_of("hdpo", "masa")).model_copy(update={"steps": 1, "optimizer": plain})
        methods = [spec.kind(spec.config) for spec in load_methods(stage.methods)]
        trainer = make_trainer(
            model_folder,
            tmp_path / str(number),
            stage=stage,
            methods=[*methods, *extra],
            engine=Speaker(model_folder),
            scorer=Parity(),
            stop=STOPS,
        )
        trainer.train()
        weights.append(weights_of(trainer))
    assert_same_weights(*weights, tolerance=1e-6)


OWN = """
from posttrain.methods.base import Method


class Alone(Method):
    name = "alone"
    conflicts = {"other": "both own the batch"}


class Other(Method):
    name = "other"
"""


def test_methods_of_ones_own_are_refused_before_the_first_stage(tmp_path, model_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "r.yaml").write_text(
        f"name: r\nmodel: {{path: {model_folder}}}\nrewards: [exact_match]\n"
        "rollout: {max_tokens: 8}\n"
        "data: {train: {task: arithmetic, size: 9}, eval: {task: arithmetic, size: 9, split: test}}\n"
        "stages:\n"
        "  - evaluate: {}\n"
        '  - policy: {steps: 1, prompts_per_step: 2, methods: ["own.py:Other", "own.py:Alone"]}\n'
    )
    with pytest.raises(RecipeError, match="alone cannot be combined with other: both own the batch"):
        run_recipe(load_recipe("r.yaml"))
    assert not (tmp_path / "runs").exists()


def test_a_method_twice_is_refused():
    with pytest.raises(RecipeError, match="masa is listed twice"):
        load_methods(["masa", {"masa": {"group_size": 4}}])
