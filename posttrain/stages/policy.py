"""Reinforcement learning from rewards, by `posttrain.training.policy.PolicyTrainer`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import TrainingArguments, set_seed

from posttrain.data.prompts import Prompts, check_lengths
from posttrain.data.sources import load_examples
from posttrain.methods.base import load_methods
from posttrain.recipe.schema import PolicyStage
from posttrain.rewards.shared import SharedEngine
from posttrain.rollout.build import build_engine, load_tokenizer
from posttrain.rollout.tokens import decode_texts
from posttrain.rollout.tools_engine import prompts_of, with_tools
from posttrain.rollout.tools_format import ToolFormat
from posttrain.rollout.types import Example
from posttrain.stages.context import StageContext, StageResult
from posttrain.training.arguments import optimizer_arguments
from posttrain.training.collect import Collector
from posttrain.training.distributed import splits_weights
from posttrain.training.load import compute_dtype, load_policy, load_reference
from posttrain.training.policy import PolicyTrainer
from posttrain.training.prompts import PromptOrder
from posttrain.training.provenance import StepRecord, glimpses, step_rows, supervised_records
from posttrain.training.record import write_rollouts

Decode = Callable[[list[list[int]]], list[str]]

VERIFY_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Mean absolute log-prob difference in nats; rounding alone gives 1e-6 in float32, about 0.01 in bfloat16."""


def run(stage: PolicyStage, context: StageContext) -> StageResult:
    """Run the stage: build the parts, train, save the policy."""
    recipe = context.recipe
    source = context.data(stage.data or recipe.data.train)
    methods = [spec.kind(spec.config) for spec in load_methods(stage.methods)]
    tokenizer = load_tokenizer(context.model)
    formatted = prompts_of(recipe.tools, tokenizer, source.format)
    examples = load_examples(source)
    set_seed(recipe.seed)
    model = load_policy(context.model, reference_adapter=stage.loss.kl > 0)
    dtype = compute_dtype(context.model)
    checkpointer = context.checkpointer(stage, stage.updates_per_batch)
    arguments = _arguments(stage, context, dtype, checkpointer.output_dir)
    split = splits_weights()
    if not split:  # else every part is put on its device when it is cut off
        model.to(arguments.device)
    engine = build_engine(
        recipe.rollout,
        context.model,
        tokenizer,
        model=model,
        own_weights=split or stage.overlap > 0,
        seed=recipe.seed,
    )
    engine = with_tools(engine, recipe.tools, formatted)
    try:
        with context.scorer(recipe.rewards_of(stage), SharedEngine(engine, tokenizer)) as scorer:
            room = engine.max_model_len - recipe.rollout.max_tokens
            prompts = _fitting(examples, formatted, stage, room)
            ids_of = {example.id: ids for example, ids in prompts}
            collector = Collector(
                engine=engine,
                scorer=scorer,
                order=PromptOrder([example for example, _ in prompts], recipe.seed),
                encode=lambda example: ids_of[example.id],
                stage=stage,
                rollout=recipe.rollout,
                rewards=recipe.reward_options,
                methods=methods,
                seed=recipe.seed,
            )
            trainer = PolicyTrainer(
                model=model,
                tokenizer=tokenizer,
                arguments=arguments,
                collector=collector,
                stage=stage,
                rollout=recipe.rollout,
                methods=methods,
                reference=load_reference(context.model, arguments.device) if stage.loss.kl else None,
                seed=recipe.seed,
                verify_tolerance=stage.verify_tolerance or VERIFY_TOLERANCE[dtype],
                bad_batches=context.run_dir / "bad_batches" / context.name,
                on_rollouts=lambda record: _write(
                    record, stage, context, formatted, partial(decode_texts, tokenizer)
                ),
                on_log=context.log_step,
            )
            try:
                checkpointer.train(trainer, trainer)
            finally:
                trainer.close()
    finally:
        engine.close()
    return context.hand_over(trainer, trainer.totals.values())


def _arguments(
    stage: PolicyStage, context: StageContext, dtype: torch.dtype, output_dir: str
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=output_dir,
        max_steps=stage.steps * stage.updates_per_batch,
        gradient_checkpointing=stage.gradient_checkpointing,
        logging_steps=1,
        save_strategy="no",  # the checkpointer asks for them
        seed=context.recipe.seed,
        disable_tqdm=True,
        **context.track(),
        remove_unused_columns=False,
        **optimizer_arguments(stage.optimizer, dtype=dtype),
    )


def _fitting(
    examples: Sequence[Example], formatted: Prompts | ToolFormat, stage: PolicyStage, room: int
) -> list[tuple[Example, tuple[int, ...]]]:
    """The prompts of at most `room` tokens (`max_tokens` are left for the answer), with their token ids."""
    prompts = [(example, formatted.encode(example)) for example in examples]
    kept, dropped = check_lengths(prompts, room, stage.on_long_prompt)
    if dropped:
        print(f"{dropped} of {len(examples)} prompts do not fit and are left out (on_long_prompt: drop)")
    return kept


def _write(
    record: StepRecord,
    stage: PolicyStage,
    context: StageContext,
    formatted: Prompts | ToolFormat,
    decode: Decode,
) -> None:
    """Show some rollouts of a step, and write all to the run folder; every rank writes its own part."""
    examples = {rollout.request.example.id: rollout.request.example for rollout in record.rollouts}
    prompt_text = {key: formatted.render(example) for key, example in examples.items()}
    context.show(record.step - 1, stage.steps * stage.updates_per_batch, glimpses(record, prompt_text))
    batch = (record.step - 1) // stage.updates_per_batch
    if not stage.log_rollouts or batch % stage.log_rollouts:
        return
    part = "" if context.world == 1 else f"-{context.rank}"
    name = f"{record.step:06d}{part}.parquet"
    # A method may plan a step without any rollouts, and most steps have no supervised texts.
    if rows := step_rows(record, prompt_text):
        write_rollouts(context.folder("rollouts") / f"step-{name}", rows)
    if rows := supervised_records(record, decode, context.rank):
        write_rollouts(context.folder("rollouts") / f"supervised-{name}", rows)
