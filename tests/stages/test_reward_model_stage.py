"""Training of reward models on a tiny language model: the loss, scores, resuming, what is saved."""

from __future__ import annotations

import json
import math
import signal

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import make_tiny_model
from transformers import AutoModelForSequenceClassification, set_seed
from trl import RewardConfig, RewardTrainer

from posttrain.errors import DataError, RecipeError, Stopped
from posttrain.recipe.schema import ModelConfig, Recipe, RewardModelConfig, RewardModelStage
from posttrain.rewards.model import RewardModel
from posttrain.rollout.build import load_tokenizer
from posttrain.stages import reward_model
from posttrain.stages.context import StageContext
from posttrain.stages.reward_model import held_out_metrics, save_reward_model, train_reward_model
from posttrain.training.checkpoint import Checkpointer
from posttrain.training.load import load_scalar_model
from posttrain.training.means import StepMeans
from posttrain.training.record import Clock, MetricsFile
from posttrain.training.stop import StopSignals

ROWS = [{"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": "no" * (1 + n % 3)} for n in range(12)]
OPTIMIZER = {"learning_rate": 1e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, `model`, and the pairs in `pairs.jsonl`."""
    folder = tmp_path_factory.mktemp("reward-model")
    make_tiny_model(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def stage_of(folder, **options):
    values = {"max_steps": 4, "batch_size": 4, "optimizer": OPTIMIZER, **options}
    return RewardModelStage(data={"jsonl": str(folder / "pairs.jsonl"), "shuffle": False}, **values)


def rows_of(tokenizer, **numbers):
    """The pairs as the trainer takes them, with one list of numbers for each keyword."""
    filled = {"margin": [0.0] * 12, "target": [1.0] * 12, "weight": [1.0] * 12, **numbers}
    return [
        {
            "chosen_ids": tokenizer(row["prompt"] + row["chosen"])["input_ids"],
            "rejected_ids": tokenizer(row["prompt"] + row["rejected"])["input_ids"],
            **{name: values[index] for name, values in filled.items()},
        }
        for index, row in enumerate(ROWS)
    ]


def train(folder, tmp_path, rows=None, lora=None, tokenizer=None, checkpointer=None, metrics=None, **options):
    config = ModelConfig(path=str(folder / "model"))
    tokenizer = tokenizer or load_tokenizer(config)
    set_seed(0)
    stage = stage_of(folder, lora=lora, **options)
    return train_reward_model(
        load_scalar_model(config, stage.lora),
        tokenizer,
        rows or rows_of(tokenizer),
        stage,
        output_dir=checkpointer.output_dir if checkpointer else tmp_path / "trainer",
        seed=0,
        metrics=metrics,
        checkpointer=checkpointer,
    )


def weights_of(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_the_loss_is_that_of_trl(folder, tmp_path):
    """Theirs knows plain pairs and margins; the same batch in the same model."""
    margins = [0.1 * n - 0.5 for n in range(12)]
    ours = train(folder, tmp_path, max_steps=1)
    tokenizer = ours.processing_class
    arguments = RewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    for numbers in ({}, {"margin": margins}):
        rows = rows_of(tokenizer, **numbers)
        plain = [
            {k: v for k, v in row.items() if k in ("chosen_ids", "rejected_ids", *numbers)} for row in rows
        ]
        theirs = RewardTrainer(
            model=ours.model,
            args=arguments,
            train_dataset=Dataset.from_list(plain),
            processing_class=tokenizer,
        )
        expected = theirs.compute_loss(ours.model, theirs.data_collator(plain))
        torch.testing.assert_close(ours.compute_loss(ours.model, ours.data_collator(rows)), expected)


def test_target_weight_and_margin_reach_the_loss(folder, tmp_path):
    trainer = train(folder, tmp_path, max_steps=1)
    numbers = {
        "margin": [0.3] * 12,
        "target": [n / 11 for n in range(12)],
        "weight": [float(n % 2) for n in range(12)],
    }
    rows = rows_of(trainer.processing_class, **numbers)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item()
    expected = 0.0
    for row, (chosen, rejected) in zip(rows, trainer.rewards(rows), strict=True):
        odds = math.exp(-(chosen - rejected - 0.3))
        right, wrong = 1 / (1 + odds), odds / (1 + odds)
        expected -= row["weight"] * (row["target"] * math.log(right) + (1 - row["target"]) * math.log(wrong))
    assert loss == pytest.approx(expected / 12, abs=1e-5)


def test_it_learns_and_says_so(folder, tmp_path):
    lines = []
    metrics = StepMeans(2, lambda step, steps, values: lines.append((step, steps, values)))
    trainer = train(folder, tmp_path, metrics=metrics, max_steps=10)
    assert [line[:2] for line in lines] == [(2, 10), (4, 10), (6, 10), (8, 10), (10, 10)]
    first, last = lines[0][2], lines[-1][2]
    assert {"loss", "accuracy", "gap", "reward", "grad_norm", "learning_rate"} <= first.keys()
    assert last["loss"] < first["loss"] / 2
    assert last["gap"] > first["gap"] + 1
    assert last["accuracy"] == 1.0
    scores = trainer.rewards(rows_of(trainer.processing_class))
    assert (scores[:, 0] > scores[:, 1]).all()


def test_the_metrics_of_a_step_are_those_of_its_pairs(folder, tmp_path):
    """All pairs are one batch, in two micro-batches: before the first update they have the first weights."""
    lines = []
    metrics = StepMeans(1, lambda step, steps, values: lines.append(values))
    config = ModelConfig(path=str(folder / "model"))
    options = {"batch_size": 12, "micro_batch_size": 6, "max_steps": 1, "optimizer": {"learning_rate": 1e-12}}
    trainer = train(folder, tmp_path, metrics=metrics, **options)
    scores = trainer.rewards(rows_of(load_tokenizer(config)))
    gap = scores[:, 0] - scores[:, 1]
    assert lines[0]["gap"] == pytest.approx(gap.mean(), abs=1e-5)
    assert lines[0]["reward"] == pytest.approx(scores.mean(), abs=1e-5)
    assert lines[0]["accuracy"] == pytest.approx((gap > 0).mean())
    assert lines[0]["loss"] == pytest.approx(np.log1p(np.exp(-gap)).mean(), abs=1e-4)


def test_the_cut_into_micro_batches_does_not_change_the_result(folder, tmp_path):
    """Also with weights: a pair of weight 0 counts in the mean."""
    rows = rows_of(load_tokenizer(ModelConfig(path=str(folder / "model"))), weight=[0.0, 1.0, 2.0] * 4)
    whole = weights_of(train(folder, tmp_path, rows, max_steps=2))
    cut = weights_of(train(folder, tmp_path, rows, max_steps=2, micro_batch_size=1))
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=0, atol=2e-5)


@pytest.mark.parametrize("pad", [True, False])
def test_scores_do_not_depend_on_the_batch(folder, tmp_path, pad):
    """Answers of different lengths, together and alone; also where the padding is the end of the text."""
    tokenizer = load_tokenizer(ModelConfig(path=str(folder / "model")))
    rows = rows_of(tokenizer)
    if not pad:
        tokenizer.pad_token = None
        for row in rows:
            row["rejected_ids"] = [*row["rejected_ids"], tokenizer.eos_token_id]
    trainer = train(folder, tmp_path, rows, tokenizer=tokenizer, max_steps=1)
    assert trainer.model.config.pad_token_id == tokenizer.pad_token_id is not None
    together = trainer.rewards(rows)
    alone = np.concatenate([trainer.rewards([row]) for row in rows])
    np.testing.assert_allclose(together, alone, atol=1e-5)


class Stop:
    """Writes down the lines of the log, and asks to stop after a step."""

    def __init__(self, signals, after=None):
        self.signals, self.after, self.lines = signals, after, []

    def __call__(self, step, steps, values):
        self.lines.append((step, values))
        if step == self.after:
            self.signals.received = signal.SIGTERM


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["full", "lora"])
def test_stopped_and_resumed(folder, tmp_path, lora):
    """The weights are those of a training that was not stopped, and so are the lines of the log."""

    def attempt(name, after=None):
        signals = StopSignals()
        options = {"every": None, "keep": 2, "clock": Clock(), "say": print}
        checkpointer = Checkpointer(tmp_path / name, stage="reward_model", stop=signals, **options)
        log = Stop(signals, after)
        trainer = train(
            folder, tmp_path, lora=lora, checkpointer=checkpointer, metrics=StepMeans(1, log), max_steps=5
        )
        return weights_of(trainer), log.lines

    expected, lines = attempt("straight")
    with pytest.raises(Stopped):
        attempt("stopped", after=2)
    weights, rest = attempt("stopped")
    assert [step for step, _ in rest] == [4, 5]  # a step's line is written after the look for signals
    assert rest == lines[3:]
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["full", "lora"])
def test_what_is_saved_is_an_ordinary_checkpoint(folder, tmp_path, lora):
    """Adapters merged; it scores as the trainer does, and so it does as a reward."""
    trainer = train(folder, tmp_path, lora=lora)
    save_reward_model(trainer, tmp_path / "models", "03-taste", keep=True)
    saved = tmp_path / "models" / "03-taste"
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["03-taste"]
    tokenizer = load_tokenizer(ModelConfig(path=str(saved)))
    model = AutoModelForSequenceClassification.from_pretrained(saved)
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == tokenizer.pad_token_id
    scores = trainer.rewards(rows_of(tokenizer))
    ids = torch.tensor([tokenizer(ROWS[3]["prompt"] + ROWS[3]["chosen"])["input_ids"]])
    assert model(ids).logits.item() == pytest.approx(scores[3, 0], abs=1e-4)
    plain = RewardModel(RewardModelConfig(path=str(saved), template="{prompt}{completion}"))
    values = [score.value for score in plain.score([(row["prompt"], row["chosen"]) for row in ROWS])]
    np.testing.assert_allclose(values, scores[:, 0], atol=1e-4)


def context_of(folder, run, stage):
    recipe = Recipe(name="run", model={"path": str(folder / "model")}, stages=[{"reward_model": stage}])
    run.mkdir(exist_ok=True)
    return StageContext(
        recipe=recipe,
        run_dir=run,
        name="01-reward_model",
        kind="reward_model",
        model=recipe.model,
        metrics=MetricsFile(run / "metrics.jsonl"),
        show=lambda step, steps, metrics: None,
        say=print,
        stop=StopSignals(),
    )


def test_the_stage(folder, tmp_path, capsys):
    """Pairs of weight 0 are left out, held-out pairs are scored, and the policy is handed on as it was."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({**row, "weight": n % 2}) + "\n" for n, row in enumerate(ROWS)))
    held_out = tmp_path / "test.jsonl"
    held_out.write_text("".join(json.dumps({**row, "flipped": n < 3}) + "\n" for n, row in enumerate(ROWS)))
    stage = stage_of(folder, eval={"jsonl": str(held_out), "shuffle": False}).model_dump()
    stage["data"] = {"jsonl": str(pairs)}
    context = context_of(folder, tmp_path / "run", stage)
    result = reward_model.run(context.recipe.stages[0].config, context)
    assert result.model == context.recipe.model
    assert "6 of 12 pairs have weight 0 and are left out" in capsys.readouterr().out
    summary = result.summary["reward_model"]
    assert (summary["pairs"], summary["trained_on"]) == (12, 6)
    written = json.loads((tmp_path / "run/evaluations/01-reward_model/metrics.json").read_text())
    assert written == {"stage": "01-reward_model", **summary["held_out"]}
    assert context.reward_models == {}  # of the stages before this one
    scorer = RewardModel(RewardModelConfig(path=str(tmp_path / "run/models/01-reward_model")))
    chosen = [score.value for score in scorer.score([(row["prompt"], row["chosen"]) for row in ROWS])]
    rejected = [score.value for score in scorer.score([(row["prompt"], row["rejected"]) for row in ROWS])]
    gaps = np.array(chosen) - np.array(rejected)
    assert written["gap"] == pytest.approx(gaps.mean(), abs=1e-4)  # the same texts, by the chat template
    assert written["accuracy"]["value"] == pytest.approx((gaps > 0).mean())


def test_held_out_metrics():
    """Of four labels the model agrees with three; the other one is wrong, and so is one of the three."""
    rewards = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [5.0, 1.0]])
    metrics = held_out_metrics(rewards, [False, True, True, None])
    assert metrics["accuracy"]["value"] == 0.75
    assert metrics["clean_accuracy"]["value"] == pytest.approx(2 / 3)
    assert (metrics["clean_accuracy"]["n"], metrics["clean_accuracy"]["left_out"]) == (3, 1)
    assert (metrics["gap"], metrics["reward"]) == (0.75, 1.625)
    assert "clean_accuracy" not in held_out_metrics(rewards, [None] * 4)


def test_refused(folder, tmp_path):
    with pytest.raises(RecipeError, match=r"reward_model.batch_size 4 does not divide into 1 devices"):
        train(folder, tmp_path, micro_batch_size=3)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({**ROWS[0], "weight": 0}) + "\n")
    stage = {"data": {"jsonl": str(pairs)}, "max_steps": 1}
    context = context_of(folder, tmp_path / "run", stage)
    with pytest.raises(DataError, match="01-reward_model: every pair has weight 0"):
        reward_model.run(context.recipe.stages[0].config, context)
    with pytest.raises(DataError, match="cannot be loaded as a sequence-classification model"):
        load_scalar_model(ModelConfig(path=str(tmp_path)), None)
