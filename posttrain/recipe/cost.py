"""What a recipe's stages cost in tokens and floating-point operations, at most; never in time.

Operations are those of the matrix products: two for every weight and token of a forward pass (the input
embedding is looked up and costs none), and attention over what comes before. A backward pass takes twice a
forward pass; with adapters once, since the frozen weights get no gradients; with gradient checkpointing the
forward pass is repeated.
"""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.recipe.lengths import SourceLengths
from posttrain.recipe.memory import Stage
from posttrain.recipe.method_cost import extras
from posttrain.recipe.model_info import ModelInfo
from posttrain.recipe.preference_schema import PairStage
from posttrain.recipe.schema import LoraConfig, PolicyStage, Recipe, SftStage


@dataclass(frozen=True)
class Cost:
    """Of one step of a stage and of all its steps: tokens at most, operations of generating and of training.

    Completions count with their cap, prompts where they are known. Operations are None where the model's
    shape is not known.
    """

    steps: int
    sampled: int
    trained: int
    generate: float | None
    update: float | None


def cost_of(
    stage: Stage, recipe: Recipe, info: ModelInfo | None, steps: int | None, data: SourceLengths
) -> Cost | None:
    """Cost of a step of a training stage; None where rows or lengths are not known."""
    if not steps:
        return None
    lora = recipe.model.lora
    if isinstance(stage, PolicyStage):
        return _policy(stage, recipe, info, data)
    if not isinstance(stage, SftStage | PairStage):
        return None
    pairs = isinstance(stage, PairStage)
    lengths = data.of(stage.data or recipe.data.train, pairs=pairs)
    if lengths is None or not lengths.exact:
        return None
    tokens = stage.batch_size * lengths.both * (2 if pairs else 1)
    lora = getattr(stage, "lora", lora)
    passes = _training(lora, getattr(stage, "gradient_checkpointing", False))
    update = None if info is None else tokens * passes * forward(info, lengths.both)
    return Cost(steps, 0, tokens, 0.0, update)


def _policy(stage: PolicyStage, recipe: Recipe, info: ModelInfo | None, data: SourceLengths) -> Cost:
    cap, lora = recipe.rollout.max_tokens, recipe.model.lora
    known = data.of(stage.data or recipe.data.train)
    prompts = stage.prompts_per_step * (known.prompt if known is not None and known.exact else 0)
    own = stage.prompts_per_step * stage.group_size * cap
    more = list(extras(stage, recipe))
    sampled = own * (1 + stage.dynamic_sampling) + sum(extra.rollouts * extra.tokens for extra in more)
    trained = own + prompts + sum(extra.trained for extra in more)
    if info is None:
        return Cost(stage.steps, sampled, trained, None, None)
    one = forward(info, cap)
    passes = stage.updates_per_batch * _training(lora, stage.gradient_checkpointing)
    passes += (stage.updates_per_batch > 1) + (
        stage.loss.kl > 0
    )  # log-probs of the old policy, the reference
    return Cost(stage.steps, sampled, trained, (sampled + prompts) * one, trained * passes * one)


def forward(info: ModelInfo, length: int) -> float:
    """Operations of a forward pass for one token of a sequence of this length, on average."""
    products = info.layers * info.block + info.vocabulary * info.hidden
    attention = info.layers * info.linear["q_proj"][1] * length
    return 2.0 * (products + attention)


def _training(lora: LoraConfig | None, checkpointing: bool) -> int:
    """Forward passes that a forward and backward pass are worth."""
    return (3 if lora is None else 2) + checkpointing
