"""Stage zip_rc as a whole on a tiny model: interrupted and resumed, what it saves, and what can follow it."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from helpers import make_tiny_model
from policy_training import EvenTokens, make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.errors import Stopped, TrainingError
from posttrain.recipe.schema import PolicyStage, Recipe
from posttrain.rollout.build import build_engine
from posttrain.rollout.types import Example, RolloutRequest, Sampling
from posttrain.stages import evaluate, zip_rc
from posttrain.stages.context import StageContext
from posttrain.training.record import MetricsFile
from posttrain.training.stop import StopSignals
from posttrain.zip_rc.grid import grid_of

STOPS = [*"abcdefghijkABCD+="]  # an untrained model hardly ever ends a completion by itself
STAGE = {
    "samples": 2,
    "correct": {"threshold": -0.45},
    "reward_bins": 4,
    "length_bins": 3,
    "value_tokens": 2,
    "max_steps": 4,
    "batch_size": 8,
    "micro_batch_tokens": 256,
    "save_steps": 3,
    "log_every": 1,
    "optimizer": {"learning_rate": 1e-3},
    "critic": {"optimizer": {"learning_rate": 1e-3}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("zip-rc-stage") / "tiny")


def context_of(model, run, stages, number=0, stop_after=None):
    """`stop_after` the so many steps of all trainings a signal comes."""
    task = {"task": "arithmetic", "args": {"max_terms": 3, "min_terms": 3}}
    recipe = Recipe(
        name="run",
        model={"path": str(model)},
        data={"train": {**task, "size": 20, "split": "train"}, "eval": {**task, "size": 6, "split": "test"}},
        rollout={"max_tokens": 24, "stop": STOPS},
        rewards=[{"name": "length_penalty", "args": {"max_tokens": 24, "buffer": 24}}],
        stages=stages,
    )
    stop = StopSignals()

    def show(step, steps, metrics):
        if step == stop_after:
            stop.received = signal.SIGTERM

    run.mkdir(exist_ok=True)
    return StageContext(
        recipe=recipe,
        run_dir=run,
        name=recipe.stage_folder(number),
        kind=recipe.stages[number].kind,
        model=recipe.model,
        metrics=MetricsFile(run / "metrics.jsonl"),
        show=show,
        say=print,
        stop=stop,
    )


def run_stage(model, run, stop_after=None, **options):
    context = context_of(model, run, [{"zip_rc": {**STAGE, **options}}], stop_after=stop_after)
    return zip_rc.run(context.recipe.stages[0].config, context)


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory):
    """A run without interruption: its folder and result."""
    run = tmp_path_factory.mktemp("zip-rc-run") / "straight"
    return run, run_stage(folder, run)


def test_interrupted_in_both_trainings_it_ends_as_if_it_had_not_been(folder, straight, tmp_path):
    run, expected = straight
    for stop_after in (1, 5):  # in the throw-away head, and in the final one
        with pytest.raises(Stopped):
            run_stage(folder, tmp_path / "run", stop_after)
    # Values there are, but not this far apart; what is there is gone on with once less is asked for.
    strict = {**STAGE["critic"], "separation": 0.99}
    with pytest.raises(
        TrainingError, match=r"^01-zip_rc: the throw-away head's values .* critic\.separation 0\.99"
    ):
        run_stage(folder, tmp_path / "run", critic=strict)
    result = run_stage(folder, tmp_path / "run")
    assert result.summary == expected.summary
    ours, theirs = (AutoModelForCausalLM.from_pretrained(r.model.path) for r in (result, expected))
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
    assert lines_of(tmp_path / "run") == lines_of(run)


def lines_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def test_what_the_stage_says(straight):
    run, result = straight
    summary = result.summary["zip_rc"]
    assert summary["rollouts"] == 40
    assert 0 < summary["correct"] < 1
    assert summary["value_if_right"] > summary["value_if_wrong"]
    assert summary["steps"] == 8
    lines = lines_of(run)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert "critic/cross_entropy" in lines[0]
    assert lines[-1]["cross_entropy"] < lines[4]["cross_entropy"]
    assert lines[4]["kl"] < 1e-6 < lines[-1]["kl"]


def test_what_is_saved_is_an_ordinary_checkpoint_that_foresees(straight, folder):
    """Read in the pass that samples, its forecasts are those of a separate forward pass."""
    _, result = straight
    model = AutoModelForCausalLM.from_pretrained(result.model.path)
    tokenizer = AutoTokenizer.from_pretrained(result.model.path)
    grid = grid_of(model.config)
    assert grid is not None
    assert (grid.reward_values, grid.length_bins) == ((0.0, 1 / 3, 2 / 3, 1.0), 3)
    assert grid.first_id == max(tokenizer.get_vocab().values()) + 1
    assert len(model.lm_head.weight) == 256
    recipe = context_of(folder, folder.parent, [{"evaluate": {}}]).recipe
    engine = build_engine(recipe.rollout, result.model, tokenizer)
    sampling = Sampling(30, n=3, seed=1, scored_ids=grid.ids)
    (answers,) = engine.generate([RolloutRequest((5, 6, 7), Example("a", "b"), "a", sampling)])
    for answer in answers:
        assert not set(answer.token_ids) & set(grid.ids)
        with torch.no_grad():
            logits = model(torch.tensor([(5, 6, 7, *answer.token_ids)])).logits[0, 2:-1]
        expected = grid.joint(logits[:, list(grid.ids)].numpy())
        torch.testing.assert_close(
            torch.tensor(grid.joint(answer.scored)), torch.tensor(expected), atol=1e-4, rtol=0
        )


def test_an_evaluation_says_how_good_the_forecasts_are(straight, tmp_path):
    _, result = straight
    stages = [{"evaluate": {"samples": 4, "metrics": ["forecasts"], "correct": {"threshold": -0.45}}}]
    context = context_of(result.model.path, tmp_path / "run", stages)
    summary = evaluate.run(context.recipe.stages[0].config, context).summary["evaluation"]
    forecasts = summary["forecasts"]
    assert forecasts["rollouts"] > 12
    assert forecasts["joint"]["problems"] == 6
    assert 0 < forecasts["joint"]["tv_floor"] < forecasts["joint"]["tv"] < 1
    assert forecasts["positions"][0]["tokens"] == 0


def test_a_policy_stage_goes_on_with_it(straight, tmp_path):
    """The slice has no part in the policy: engine and trainer agree, and its rows do not move."""
    _, result = straight
    lines = []
    trainer = make_trainer(
        result.model.path,
        tmp_path,
        scorer=EvenTokens(),
        stage=PolicyStage(steps=1, prompts_per_step=2, group_size=4, loss={"kind": "dr_grpo"}),
        on_log=lambda step, steps, metrics: lines.append(metrics),
    )
    grid = grid_of(trainer.policy.config)
    before = trainer.policy.lm_head.weight.detach()[list(grid.ids)].clone()
    trainer.train()
    assert lines[0]["sampling/logprob_difference"] < 1e-5
    assert torch.equal(trainer.policy.lm_head.weight[list(grid.ids)], before)


def test_a_lite_head_learns_the_values_of_a_full_critic(folder, tmp_path):
    """As in the official code; its KL term is of the throw-away model alone."""
    critic = {**STAGE["critic"], "kl": 5.0}
    result = run_stage(folder, tmp_path / "run", variant="lite", max_steps=2, critic=critic)
    start = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    trained = AutoModelForCausalLM.from_pretrained(result.model.path).state_dict()
    lines = lines_of(tmp_path / "run")
    assert [line.get("critic/kl", 0) > 0 for line in lines] == [False, True, False, False]
    assert [line.get("kl") for line in lines] == [None, None, 0, 0]
    assert all(torch.equal(trained[name], start[name]) for name in start if "layers" in name)


def test_lite_and_outcomes(folder, tmp_path):
    result = run_stage(folder, tmp_path / "run", variant="lite", label="outcome", length_edges=[0, 4, 24])
    trained, start = (AutoModelForCausalLM.from_pretrained(path) for path in (result.model.path, folder))
    grid = grid_of(trained.config)
    assert (grid.reward_values, grid.length_edges) == ((0.0, 1.0), (0, 4, 24))
    assert result.summary["zip_rc"]["steps"] == 4
    outside = [token for token in range(256) if token not in grid.ids]
    for name, weight in start.state_dict().items():
        ours = trained.state_dict()[name]
        if len(weight) == 256:
            ours, weight = ours[outside], weight[outside]
        assert torch.equal(ours, weight), name
