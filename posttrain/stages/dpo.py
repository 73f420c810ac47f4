"""Direct preference optimisation (Rafailov et al., arXiv:2305.18290), by TRL's DPOTrainer.

    loss = -log sigmoid(beta · (log pi(chosen)/ref(chosen) - log pi(rejected)/ref(rejected)))

The reference is the policy that the stage starts from: a frozen copy of its weights, the model without its
new adapter, or a frozen copy of the adapter that is trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, set_seed
from trl import DPOConfig, DPOTrainer

from posttrain.data.preferences import PreferencePair, encode_pair, load_pairs, preference_row
from posttrain.data.prompts import PromptFormat, uses_chat
from posttrain.errors import DataError
from posttrain.recipe.schema import DpoStage
from posttrain.rollout.build import load_model, load_tokenizer
from posttrain.stages.context import StageContext, StageResult
from posttrain.training.arguments import batch_arguments, optimizer_arguments
from posttrain.training.checkpoint import Checkpointer
from posttrain.training.distributed import check_backend
from posttrain.training.load import compute_dtype, load_policy
from posttrain.training.means import StepMeans
from posttrain.training.trackers import OFF


def prefer(
    model: Any,
    reference: Any | None,
    tokenizer: Any,
    pairs: Sequence[PreferencePair],
    stage: DpoStage,
    *,
    output_dir: Path | str,
    seed: int,
    format: PromptFormat = "auto",
    dtype: torch.dtype = torch.float32,
    tracking: Mapping[str, Any] = OFF,
    log: Callable[[int, int, dict[str, Any]], None] = lambda step, of, metrics: None,
    checkpointer: Checkpointer | None = None,
) -> DPOTrainer:
    """Train `model` in place on preference pairs; returns its trainer.

    `reference` is a frozen model of its own, or None for a model with an adapter. `log` is called with (step,
    number of steps, metrics): TRL's, of which `rewards/margins` is beta times the difference of log-ratios,
    and `rewards/accuracies` the share of pairs in which it is positive. With a `checkpointer`, whose
    `output_dir` is to be given too, training goes on from its newest checkpoint.

    Raises:
        DataError: a pair has a margin or a soft target, does not fit the format, or is longer than
            `stage.max_length`; pairs are never cut.
        RecipeError: the batch size does not divide over the devices.
    """
    limit = stage.max_length or model.config.max_position_embeddings
    end = 0 if uses_chat(tokenizer, format) else 1  # what TRL puts behind an answer that is plain text
    for pair in pairs:
        _require_plain(pair)
        encode_pair(pair, tokenizer, format, limit - end)
    arguments = DPOConfig(
        output_dir=str(output_dir),
        **batch_arguments(stage.batch_size, stage.micro_batch_size, "dpo"),
        num_train_epochs=stage.epochs,
        max_steps=stage.max_steps or -1,
        max_length=None,
        beta=stage.beta,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        seed=seed,
        disable_tqdm=True,
        **tracking,
        **optimizer_arguments(stage.optimizer, dtype=dtype),
    )
    metrics = StepMeans(stage.log_every, log)
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=arguments,
        train_dataset=Dataset.from_list([preference_row(pair, tokenizer, format) for pair in pairs]),
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


def _require_plain(pair: PreferencePair) -> None:
    for name, known in (("margin", (0.0,)), ("target", (0.0, 1.0)), ("weight", (1.0,))):
        if getattr(pair, name) not in known:
            raise DataError(
                f"{pair.where}: the {name} is {getattr(pair, name):g}, and dpo knows only "
                f"{' and '.join(f'{value:g}' for value in known)}"
            )


def run(stage: DpoStage, context: StageContext) -> StageResult:
    """Run the stage: load, train, save."""
    source = context.data(stage.data)
    tokenizer = load_tokenizer(context.model)
    pairs = load_pairs(source)
    used = [pair for pair in pairs if pair.weight > 0.0]
    if not used:
        raise DataError(f"{context.name}: every pair has weight 0, so there is nothing to train on")
    if len(used) < len(pairs):
        context.say(f"   {len(pairs) - len(used)} of {len(pairs)} pairs have weight 0 and are left out")
    set_seed(context.recipe.seed)
    model = load_policy(context.model)
    adapted = context.model.lora is not None or context.model.adapter is not None
    checkpointer = context.checkpointer(stage)
    trainer = prefer(
        model,
        None if adapted else load_model(context.model).eval().requires_grad_(False),
        tokenizer,
        used,
        stage,
        output_dir=checkpointer.output_dir,
        seed=context.recipe.seed,
        format=source.format,
        dtype=compute_dtype(context.model),
        tracking=context.track(),
        log=context.log_step,
        checkpointer=checkpointer,
    )
    return context.hand_over(trainer, {"dpo": {"pairs": len(pairs), "trained_on": len(used)}})
