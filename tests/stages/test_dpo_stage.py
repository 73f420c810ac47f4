"""Training on preferences on a tiny model: the loss, its reference, resuming, what pairs it takes."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace

import pytest
import torch
from helpers import make_tiny_model
from transformers import AutoModelForCausalLM

from posttrain.data.preferences import load_pairs
from posttrain.errors import DataError, Stopped
from posttrain.recipe.schema import DpoStage, ModelConfig, Recipe
from posttrain.rollout.build import load_model, load_tokenizer
from posttrain.stages import dpo
from posttrain.stages.context import StageContext
from posttrain.stages.dpo import prefer
from posttrain.training.load import load_policy
from posttrain.training.record import MetricsFile
from posttrain.training.stop import StopSignals

ROWS = [{"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": "no" * (1 + n % 3)} for n in range(8)]
OPTIMIZER = {"learning_rate": 1e-3, "warmup_steps": 0}
LORA = {"r": 4, "alpha": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, `model`, and the pairs in `pairs.jsonl`."""
    folder = tmp_path_factory.mktemp("dpo")
    make_tiny_model(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def stage_of(folder, **options):
    values = {"max_steps": 4, "batch_size": 4, "log_every": 1, "optimizer": OPTIMIZER, **options}
    columns = {"answer": None}
    return DpoStage(
        data={"jsonl": str(folder / "pairs.jsonl"), "shuffle": False, "format": "text", "columns": columns},
        **values,
    )


def logprob(model, tokenizer, prompt, answer):
    """Of an answer and its end of sequence after a prompt."""
    ids = tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id]
    start = len(tokenizer(prompt)["input_ids"])
    logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[start:])[:, None]).sum().item()


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_loss_is_the_papers_and_the_reference_is_the_start(folder, tmp_path, lora):
    """Of two steps on all pairs: log 2 first, then what two separate models say."""
    config = ModelConfig(path=str(folder / "model"), lora=lora)
    tokenizer, start = load_tokenizer(config), load_model(ModelConfig(path=str(folder / "model")))
    stage, lines = stage_of(folder, max_steps=2, batch_size=8, beta=0.5), []
    pairs = load_pairs(stage.data)
    weights = []

    def log(step, of, metrics):
        lines.append(metrics)
        policy = trainer_model
        policy.eval()
        weights.append([
            logprob(policy, tokenizer, row["prompt"], row["chosen"])
            - logprob(start, tokenizer, row["prompt"], row["chosen"])
            - logprob(policy, tokenizer, row["prompt"], row["rejected"])
            + logprob(start, tokenizer, row["prompt"], row["rejected"])
            for row in ROWS
        ])  # fmt: skip
        policy.train()

    trainer_model = load_policy(config)
    reference = None if lora else load_model(config).requires_grad_(False)
    prefer(
        trainer_model, reference, tokenizer, pairs, stage,
        output_dir=tmp_path, seed=0, format="text", log=log,
    )  # fmt: skip
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    # The line of a step has the loss before its update, the second that of the weights after the first.
    expected = [math.log1p(math.exp(-0.5 * value)) for value in weights[0]]
    assert lines[1]["loss"] == pytest.approx(sum(expected) / len(expected), abs=1e-4)
    assert lines[1]["rewards/margins"] == pytest.approx(0.5 * sum(weights[0]) / len(ROWS), abs=1e-3)
    assert lines[1]["loss"] < lines[0]["loss"]


def run_stage(folder, run, stop_after=None, **options):
    stop = StopSignals()
    recipe = Recipe(
        name="run",
        model={"path": str(folder / "model")},
        stages=[{"dpo": stage_of(folder, **options).model_dump()}],
    )

    def show(step, steps, metrics):
        if step == stop_after:
            stop.received = signal.SIGTERM

    run.mkdir(exist_ok=True)
    context = StageContext(
        recipe=recipe,
        run_dir=run,
        name=recipe.stage_folder(0),
        kind="dpo",
        model=recipe.model,
        metrics=MetricsFile(run / "metrics.jsonl"),
        show=show,
        say=print,
        stop=stop,
    )
    return dpo.run(recipe.stages[0].config, context)


def test_an_interrupted_stage_ends_as_if_it_had_not_been(folder, tmp_path):
    expected = run_stage(folder, tmp_path / "straight")
    with pytest.raises(Stopped):
        run_stage(folder, tmp_path / "run", stop_after=2)
    result = run_stage(folder, tmp_path / "run")
    assert result.summary == expected.summary == {"dpo": {"pairs": 8, "trained_on": 8}}
    ours, theirs = (AutoModelForCausalLM.from_pretrained(r.model.path) for r in (result, expected))
    before = load_model(ModelConfig(path=str(folder / "model"))).state_dict()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
    assert any(not torch.equal(before[name], weight) for name, weight in theirs.state_dict().items())
    lines = [
        [
            {key: value for key, value in json.loads(line).items() if key != "time"}
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("run", "straight")
    ]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == [1, 2, 3, 4]


def test_pairs_are_turned_round_or_refused(folder):
    tokenizer = load_tokenizer(ModelConfig(path=str(folder / "model")))
    pair = load_pairs(stage_of(folder).data)[0]
    row = {"prompt": "0+1=", "chosen": "1", "rejected": "no"}
    assert dpo.preference_row(pair, tokenizer, "text") == row
    turned = dpo.preference_row(replace(pair, target=0.0), tokenizer, "chat")
    assert turned["chosen"] == [{"role": "assistant", "content": "no"}]
    assert turned["prompt"] == [{"role": "user", "content": "0+1="}]
    for change, text in (
        ({"target": 0.5}, "the target is 0.5, and dpo knows only 0 and 1"),
        ({"margin": 1.0}, "the margin is 1, and dpo knows only 0"),
    ):
        with pytest.raises(DataError, match=text):
            prefer(Small, None, tokenizer, [replace(pair, **change)], stage_of(folder), output_dir="", seed=0)
    with pytest.raises(DataError, match=r"chosen has 5 tokens with its prompt; 4 fit"):
        prefer(
            Small, None, tokenizer, [pair], stage_of(folder, max_length=5),
            output_dir="", seed=0, format="text",
        )  # fmt: skip


class Small:
    """What is looked at before a model is needed."""

    class config:
        max_position_embeddings = 256
