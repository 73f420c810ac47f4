"""Supervised fine-tuning on demonstrations, by TRL's SFTTrainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, set_seed
from trl import SFTConfig, SFTTrainer

from posttrain.data.prompts import encode_demonstration
from posttrain.data.sources import load_examples
from posttrain.errors import DataError
from posttrain.recipe.schema import SftStage
from posttrain.rollout.build import load_tokenizer
from posttrain.rollout.tools_engine import prompts_of
from posttrain.rollout.tools_format import ToolFormat
from posttrain.rollout.types import Example
from posttrain.stages.context import StageContext, StageResult
from posttrain.training.arguments import batch_arguments, optimizer_arguments
from posttrain.training.batching import sorted_batches
from posttrain.training.checkpoint import Checkpointer
from posttrain.training.distributed import check_backend
from posttrain.training.load import compute_dtype, load_policy
from posttrain.training.means import StepMeans
from posttrain.training.trackers import OFF


def finetune(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    stage: SftStage,
    *,
    output_dir: Path | str,
    seed: int,
    dtype: torch.dtype = torch.float32,
    encode: Callable[[Example], Mapping[str, Any]] | None = None,
    tracking: Mapping[str, Any] = OFF,
    log: Callable[[int, int, dict[str, Any]], None] = lambda step, of, metrics: None,
    checkpointer: Checkpointer | None = None,
) -> SFTTrainer:
    """Train `model` in place on `examples` (demonstrations in `columns["completion"]`); returns its trainer.

    The loss is on completion tokens alone. `encode` makes a row of TRL's format of an example; None is
    `encode_demonstration`, and `ToolFormat.encode_trace` knows tools. `log` is called with (step, number of
    steps, metrics). With a `checkpointer`, whose `output_dir` is to be given too, training goes on from its
    newest checkpoint.

    Raises:
        DataError: a row has no demonstration, or is longer than `stage.max_length`; rows are never cut.
        RecipeError: the batch size does not divide over the devices.
    """
    encode = encode or partial(encode_demonstration, tokenizer=tokenizer)
    rows = [dict(encode(example)) for example in examples]
    limit = stage.max_length or model.config.max_position_embeddings
    lengths = [_length(row, tokenizer) for row in rows]
    for example, length in zip(examples, lengths, strict=True):
        if length > limit:
            raise DataError(f"demonstration {example.id!r} has {length} tokens; max_length is {limit}")
    steps = stage.max_steps or math.ceil(stage.epochs * len(rows) / stage.batch_size)
    dataset = Dataset.from_list(rows)
    if stage.sort_batches:
        dataset = dataset.select(sorted_batches(lengths, stage.batch_size, steps * stage.batch_size, seed))

    arguments = SFTConfig(
        output_dir=str(output_dir),
        **batch_arguments(stage.batch_size, stage.micro_batch_size, "sft"),
        num_train_epochs=stage.epochs,
        max_steps=steps if stage.sort_batches else stage.max_steps or -1,
        train_sampling_strategy="sequential" if stage.sort_batches else "random",
        max_length=None,
        completion_only_loss=True,
        gradient_checkpointing=stage.gradient_checkpointing,
        logging_steps=1,
        save_strategy="no",
        seed=seed,
        disable_tqdm=True,
        **tracking,
        **optimizer_arguments(stage.optimizer, dtype=dtype),
    )
    metrics = StepMeans(stage.log_every, log)
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[metrics],
    )
    trainer.remove_callback(PrinterCallback)
    check_backend(trainer.accelerator)
    if checkpointer is None:
        trainer.train()
    else:
        checkpointer.train(trainer, metrics)
    return trainer


def _length(row: dict[str, Any], tokenizer: Any) -> int:
    """Tokens of a demonstration with its prompt, as TRL will see it."""
    if "input_ids" in row:
        return len(row["input_ids"])
    if isinstance(row["completion"], str):
        return len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1  # the end of sequence
    messages = [*row["prompt"], *row["completion"]]
    return len(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))


def run(stage: SftStage, context: StageContext) -> StageResult:
    """Run the stage: load, train, save."""
    source = context.data(stage.data or context.recipe.data.train)
    tokenizer = load_tokenizer(context.model)
    prompts = prompts_of(context.recipe.tools, tokenizer, source.format)
    plain = partial(encode_demonstration, tokenizer=tokenizer, format=source.format)
    set_seed(context.recipe.seed)
    model = load_policy(context.model)
    checkpointer = context.checkpointer(stage)
    trainer = finetune(
        model,
        tokenizer,
        load_examples(source),
        stage,
        output_dir=checkpointer.output_dir,
        seed=context.recipe.seed,
        dtype=compute_dtype(context.model),
        encode=prompts.encode_trace if isinstance(prompts, ToolFormat) else plain,
        tracking=context.track(),
        log=context.log_step,
        checkpointer=checkpointer,
    )
    return context.hand_over(trainer)
