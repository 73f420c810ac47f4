"""Rollouts with tools on their way through the trainer, a checkpoint and the run folder."""

import json
from concurrent.futures import Future

import pyarrow.parquet as pq
import pytest
from helpers import make_tiny_model
from policy_training import make_stage, make_trainer

from posttrain.recipe.schema import ModelConfig
from posttrain.recipe.tools_schema import ToolsConfig
from posttrain.rollout.build import load_model, load_tokenizer
from posttrain.rollout.tools_engine import prompts_of, with_tools
from posttrain.rollout.transformers import TransformersEngine
from posttrain.rollout.types import (
    Completion,
    Example,
    Rollout,
    RolloutBatch,
    RolloutRequest,
    Sampling,
    ToolCall,
    Turn,
)
from posttrain.training.buffer import PendingBatch
from posttrain.training.collect import Collected
from posttrain.training.record import rollout_rows, write_rollouts
from posttrain.training.tally import Tally

COMPLETION = Completion(
    (5, 6, 7, 8),
    (-1.0, -0.5, 0.0, -2.0),
    "stop",
    "1+1[2]2",
    (1, 1, 0, 1),
    (Turn(0, 2, "1+1"), Turn(3, 4, "2")),
    (ToolCall("calculator", "1+1", "2", 0.25), ToolCall("", "1+", "Error: …", 0.0, "malformed")),
)
ROLLOUT = Rollout(RolloutRequest((3, 4), Example("e", "1+1="), "0.0", Sampling(8)), COMPLETION, 0, 1)


def test_a_checkpoint_keeps_turns_and_calls():
    future: Future = Future()
    future.set_result(Collected(RolloutBatch([ROLLOUT])))
    state = PendingBatch(0, 1, [], Tally(), future, extended=True).state()
    again = PendingBatch.from_state(json.loads(json.dumps(state)), Tally(), [])
    assert again.future.result().batch.rollouts == [ROLLOUT]


def test_the_run_folder_keeps_turns_and_calls(tmp_path):
    write_rollouts(tmp_path / "rollouts.parquet", rollout_rows([ROLLOUT], step=1, prompt_text={"e": "1+1="}))
    (row,) = pq.read_table(tmp_path / "rollouts.parquet").to_pylist()
    assert json.loads(row["turns"]) == [[0, 2], [3, 4]]
    assert [call["error"] for call in json.loads(row["tool_calls"])] == [None, "malformed"]
    assert row["loss_mask"] == [1, 1, 0, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tools") / "model")


def test_what_tools_say_is_not_trained(folder, tmp_path):
    tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
    model = load_model(ModelConfig(path=str(folder)))
    # An end that is written often, as the weights are random; every call is malformed and answered.
    tools = ToolsConfig(
        use=["calculator"], close="e", workers=1, protocol="text", result=("[", "]"), output_cap=16
    )
    lines = []
    engine = with_tools(TransformersEngine(model, tokenizer), tools, prompts_of(tools, tokenizer, "text"))
    records = []
    trainer = make_trainer(
        folder,
        tmp_path,
        model=model,
        engine=engine,
        stage=make_stage(),
        on_rollouts=records.append,
        on_log=lambda step, steps, metrics: lines.append(metrics),
    )
    trainer.collector.sampling = Sampling(max_tokens=60, n=4)
    try:
        trainer.train()
    finally:
        engine.close()
    completions = [rollout.completion for record in records for rollout in record.collected.batch]
    masked = [completion for completion in completions if completion.loss_mask is not None]
    assert masked
    assert sum(line["tokens/trained"] for line in lines) == sum(c.sampled_tokens for c in completions)
    assert sum(line["tokens/sampled"] for line in lines) == sum(c.sampled_tokens for c in completions)
    assert all(line["sampling/logprob_difference"] < 1e-4 for line in lines)
    malformed = sum(len(completion.tool_calls) for completion in completions)
    assert sum(line.get("tools/errors/malformed", 0) for line in lines) == malformed > 0
