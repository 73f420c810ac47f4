"""Reward models from preference pairs (Bradley–Terry), by TRL's RewardTrainer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import reduce
from datasets import Dataset
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoConfig, PrinterCallback, set_seed
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from posttrain.data.preferences import NUMBERS, PreferencePair, encode_pair, load_pairs
from posttrain.errors import DataError
from posttrain.evaluation.metrics import estimate
from posttrain.recipe.preference_schema import PreferenceStage
from posttrain.recipe.schema import ModelConfig, RewardModelStage
from posttrain.rollout.build import load_tokenizer
from posttrain.rollout.weights import named_weights
from posttrain.stages.context import StageContext, StageResult
from posttrain.training.arguments import batch_arguments, optimizer_arguments
from posttrain.training.checkpoint import Checkpointer
from posttrain.training.distributed import check_backend
from posttrain.training.load import compute_dtype, load_scalar_model
from posttrain.training.manifest import STAGING, publish
from posttrain.training.means import StepMeans
from posttrain.training.preferences import preference_loss
from posttrain.training.ranks import on_first_rank
from posttrain.training.record import write_json
from posttrain.training.trackers import OFF

CONFIDENCE = 0.95
EncodedPair = dict[str, Any]
"""`chosen_ids`, `rejected_ids`, and the numbers `margin`, `target` and `weight`."""


class _Collator(DataCollatorForPreference):
    """TRL's, with targets and weights beside the margins."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        for name in NUMBERS:
            batch[name] = torch.tensor([example[name] for example in examples], dtype=torch.float32)
        return batch


class PreferenceTrainer(RewardTrainer):
    """TRL's trainer with the loss of `posttrain.training.preferences`.

    Its log has, besides the loss, the means over all devices of `accuracy` (chosen above rejected), `gap`
    (chosen minus rejected) and `reward` (the level). Levels drift without meaning anything: only gaps count.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._noted = torch.zeros(4)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over pairs: a pair of weight 0 counts as one, so that no cut into batches changes it."""
        numbers = {name: inputs[name] for name in NUMBERS}
        tokens = {name: value for name, value in inputs.items() if name not in NUMBERS}
        outputs = model(**tokens, use_cache=False)
        chosen, rejected = outputs.logits.squeeze(-1).float().chunk(2)
        loss = preference_loss(chosen, rejected, **numbers).mean()
        if model.training:
            gap = (chosen - rejected).detach()
            level = torch.cat([chosen, rejected]).detach().mean() * len(gap)
            self._noted += torch.stack([gap.new_tensor(len(gap)), (gap > 0).sum(), gap.sum(), level]).cpu()
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """Predictions are the rewards of a pair's answers, shape [B, 2]."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss, torch.stack(outputs.logits.squeeze(-1).float().chunk(2), dim=1), None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the steps since the last line noted."""
        if "loss" in logs:
            pairs, right, gap, level = reduce(self._noted.to(self.accelerator.device), "sum").tolist()
            self._noted.zero_()
            logs |= {"accuracy": right / pairs, "gap": gap / pairs, "reward": level / pairs}
        super().log(logs, start_time)

    def rewards(self, pairs: Sequence[EncodedPair]) -> NDArray[np.float64]:
        """Rewards of chosen and rejected answers, shape [N, 2]. Every process calls this and gets all."""
        predictions = self.predict(Dataset.from_list(list(pairs))).predictions
        return np.asarray(predictions, dtype=np.float64)


def encode_pairs(
    pairs: Sequence[PreferencePair], tokenizer: Any, prompt_format: Any, limit: int | None
) -> list[EncodedPair]:
    """Pairs as the trainer takes them.

    Raises:
        DataError: a pair does not fit the format or has more than `limit` tokens.
    """
    rows = []
    for pair in pairs:
        chosen, rejected = encode_pair(pair, tokenizer, prompt_format, limit)
        numbers = {name: getattr(pair, name) for name in NUMBERS}
        rows.append({"chosen_ids": chosen, "rejected_ids": rejected, **numbers})
    return rows


def train_reward_model(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[EncodedPair],
    stage: PreferenceStage,
    *,
    output_dir: Path | str,
    seed: int,
    dtype: torch.dtype = torch.float32,
    tracking: Mapping[str, Any] = OFF,
    metrics: StepMeans | None = None,
    checkpointer: Checkpointer | None = None,
) -> PreferenceTrainer:
    """Train `model`, which has one output, in place; returns its trainer.

    `metrics` gets the lines of the log. With a `checkpointer`, whose `output_dir` is to be given too,
    training goes on from its newest checkpoint. The tokenizer gets a padding token if it has none: a model
    that finds the last token by what is not padding could else not take two answers at once.

    Raises:
        RecipeError: the batch size does not divide over the devices.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    arguments = RewardConfig(
        output_dir=str(output_dir),
        **batch_arguments(stage.batch_size, stage.micro_batch_size, "reward_model"),
        num_train_epochs=stage.epochs,
        max_steps=stage.max_steps or -1,
        max_length=None,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        seed=seed,
        disable_tqdm=True,
        remove_unused_columns=False,  # the trainer would take target and weight away
        **tracking,
        **optimizer_arguments(stage.optimizer, dtype=dtype),
    )
    trainer = PreferenceTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(list(pairs)),
        processing_class=tokenizer,
        data_collator=_Collator(pad_token_id=tokenizer.pad_token_id),
        callbacks=[metrics] if metrics is not None else None,
    )
    trainer.remove_callback(PrinterCallback)
    check_backend(trainer.accelerator)
    if checkpointer is None:
        trainer.train()
    else:
        checkpointer.train(trainer, metrics)
    return trainer


def start_model(stage: PreferenceStage, context: StageContext) -> ModelConfig:
    """The model that a stage starts from: its own, or the policy."""
    return stage.model or context.model


def token_limit(stage: PreferenceStage, model: ModelConfig) -> int | None:
    """Tokens that an answer and its prompt may have: the stage's limit, or the model's context."""
    if stage.max_length is not None:
        return stage.max_length
    config = AutoConfig.from_pretrained(
        model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def held_out_metrics(rewards: NDArray[np.float64], flipped: Sequence[bool | None]) -> dict[str, Any]:
    """What rewards of held-out pairs, shape [N, 2], say about a reward model.

    `accuracy` is the share with the chosen answer above the rejected one. Where rows say which labels are
    wrong, `clean_accuracy` is the same against the right ones: the noisy one ranks a model first that has
    learnt the noise.
    """
    gaps = rewards[:, 0] - rewards[:, 1]
    metrics: dict[str, Any] = {"accuracy": estimate((gaps > 0).astype(float), CONFIDENCE).to_dict()}
    known = np.array([value is not None for value in flipped])
    wrong = np.array([bool(value) for value in flipped])
    if wrong.any():
        clean = np.where(known, np.where(wrong, gaps < 0, gaps > 0).astype(float), np.nan)
        metrics["clean_accuracy"] = estimate(clean, CONFIDENCE).to_dict()
    return {**metrics, "gap": float(gaps.mean()), "reward": float(rewards.mean())}


def run(stage: RewardModelStage, context: StageContext) -> StageResult:
    """Run the stage: load, train, score the held-out pairs, save. The policy is handed on as it is."""
    source = context.data(stage.data)
    start = start_model(stage, context)
    tokenizer = load_tokenizer(start)
    pairs = load_pairs(source)
    used = [pair for pair in pairs if pair.weight > 0.0]
    if not used:
        raise DataError(f"{context.name}: every pair has weight 0, so there is nothing to train on")
    set_seed(context.recipe.seed)
    model = load_scalar_model(start, stage.lora)
    limit = token_limit(stage, start)
    rows = encode_pairs(used, tokenizer, source.format, limit)
    held_out = None if stage.eval is None else context.data(stage.eval)
    tests = [] if held_out is None else load_pairs(held_out)
    test_rows = [] if held_out is None else encode_pairs(tests, tokenizer, held_out.format, limit)
    if len(used) < len(pairs):
        context.say(f"   {len(pairs) - len(used)} of {len(pairs)} pairs have weight 0 and are left out")
    checkpointer = context.checkpointer(stage)
    trainer = train_reward_model(
        model,
        tokenizer,
        rows,
        stage,
        output_dir=checkpointer.output_dir,
        seed=context.recipe.seed,
        dtype=compute_dtype(start),
        tracking=context.track(),
        metrics=StepMeans(stage.log_every, context.log_step),
        checkpointer=checkpointer,
    )
    summary: dict[str, Any] = {"pairs": len(pairs), "trained_on": len(used)}
    if tests:
        flipped = [pair.columns.get("flipped") for pair in tests]
        summary["held_out"] = {"pairs": len(tests), **held_out_metrics(trainer.rewards(test_rows), flipped)}
        _report(summary["held_out"], context)
    save_reward_model(trainer, context.run_dir / "models", context.name, keep=context.rank == 0)
    return StageResult(context.model, {"reward_model": summary})


def _report(held_out: Mapping[str, Any], context: StageContext) -> None:
    for name in ("accuracy", "clean_accuracy"):
        if name in held_out:
            value = held_out[name]
            words = name.replace("_", " ")
            context.say(f"   held-out {words} {value['value']:.1%} of {value['n']} pairs")
    context.say(f"   held-out gap {held_out['gap']:.3f}")
    if context.rank == 0:
        write_json(context.folder("evaluations") / "metrics.json", {"stage": context.name, **held_out})


def save_reward_model(trainer: PreferenceTrainer, models: Path, name: str, *, keep: bool) -> None:
    """Save a sequence-classification checkpoint, adapters merged, and its tokenizer under `models/name`.

    Every process calls this: the model may be split over them. `keep` is true on the one that writes.
    """
    trained = trainer.accelerator.unwrap_model(trainer.model)
    wholes = ((weight_name, weight.cpu() if keep else None) for weight_name, weight in named_weights(trained))
    weights = {weight_name: weight for weight_name, weight in wholes if weight is not None}
    plain = trained.get_base_model() if isinstance(trained, PeftModel) else trained

    def finish() -> None:
        staged = models / STAGING / name
        plain.save_pretrained(staged, state_dict=weights)
        trainer.processing_class.save_pretrained(staged)
        publish(staged, models / name)
        shutil.rmtree(models / STAGING)

    on_first_rank(finish)
