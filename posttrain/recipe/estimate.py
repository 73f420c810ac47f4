"""Arithmetic of a recipe: steps, rollouts, tokens, and rough memory and disk for one process.

The memory formulas are first-order: weights, gradients, Adam's two moments, a frozen reference when the
loss has a KL term, activations, the chunk of logits, and the key-value cache of the sampler. Fragmentation,
the CUDA context (about 0.5 GiB) and sharding by FSDP or ZeRO are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import yaml

from posttrain.recipe.model_info import DTYPE_BYTES, ModelInfo
from posttrain.recipe.pareto_schema import FORECAST_METRICS
from posttrain.recipe.preference_schema import PreferenceStage
from posttrain.recipe.schema import (
    AnnotatePreferencesStage,
    DataSource,
    EvaluateStage,
    HardSubsetStage,
    LoraConfig,
    PolicyStage,
    Recipe,
    RewardModelStage,
    SftStage,
    SoarStage,
    StarStage,
    ZipRcStage,
)
from posttrain.recipe.soar_plan import soar_cost

Stage = (
    SftStage
    | PolicyStage
    | EvaluateStage
    | PreferenceStage
    | StarStage
    | SoarStage
    | HardSubsetStage
    | ZipRcStage
)

LOGIT_CHUNK_BYTES = 3 * 128 * 2**20
"""Log-probs exist for one chunk of tokens at a time: two to four tensors of 128 MiB."""
COUNTED_BYTES = 64 * 2**20
"""Rows of a jsonl file are counted up to this size."""
BYTES_PER_LOGGED_TOKEN = 12
"""Token id, log-prob and text of a sampled token in the rollouts' parquet files, before compression."""


@dataclass(frozen=True)
class StageSize:
    """What a stage will do; None is unknown before the data is read. Tokens are an upper bound."""

    rows: int | None
    steps: int | None
    rollouts: int | None
    sampled_tokens: int | None


@dataclass(frozen=True)
class Memory:
    """Bytes of one phase of a stage, in one process."""

    phase: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(self.parts.values())


def count_rows(source: DataSource) -> int | None:
    """Rows a source will give, where that can be told cheaply."""
    rows = source.size
    if source.jsonl is not None:
        path = Path(source.jsonl).expanduser()
        if path.stat().st_size <= COUNTED_BYTES:
            with path.open("rb") as lines:
                rows = sum(1 for line in lines if line.strip())
    if source.limit is None:
        return rows
    return source.limit if rows is None else min(rows, source.limit)


def size_of(stage: Stage, recipe: Recipe) -> StageSize:
    """Rows, steps, rollouts and sampled tokens of a stage; steps are those of all models that it trains."""
    source = stage.data or (recipe.data.eval if isinstance(stage, EvaluateStage) else recipe.data.train)
    rows = None if source is None else count_rows(source)
    match stage:
        case SftStage() | PreferenceStage():
            models, seen = _trainings(stage, rows or 0)
            steps = stage.max_steps
            if steps is None and rows is not None:
                steps = math.ceil(seen / stage.batch_size * stage.epochs)
            return StageSize(rows, None if steps is None else models * steps, None, None)
        case PolicyStage():
            rollouts = stage.steps * stage.prompts_per_step * stage.group_size
            tokens = rollouts * recipe.rollout.max_tokens * (1 + stage.dynamic_sampling)
            return StageSize(rows, stage.steps, rollouts, tokens)
        case StarStage():
            traces = None if rows is None else rows * stage.samples
            return StageSize(rows, None, traces, traces and traces * recipe.rollout.max_tokens)
        case SoarStage():
            cost = soar_cost(stage, recipe.rollout.max_tokens)
            return StageSize(rows, cost.steps, cost.rollouts, cost.tokens)
        case HardSubsetStage():
            drawn = None if rows is None else rows * stage.samples
            return StageSize(rows, None, drawn, drawn and drawn * recipe.rollout.max_tokens)
        case ZipRcStage():
            if rows is None:
                return StageSize(None, stage.max_steps and stage.trainings * stage.max_steps, None, None)
            drawn = rows * stage.samples
            steps = stage.trainings * stage.steps_for(drawn)
            return StageSize(rows, steps, drawn, drawn * recipe.rollout.max_tokens)
        case EvaluateStage():
            if rows is None:
                return StageSize(None, None, None, None)
            of_samples = ("mean_length", "meta", *FORECAST_METRICS)
            sampled = any("@" in metric or metric in of_samples for metric in stage.metrics)
            answers = rows * (stage.samples * sampled + ("greedy" in stage.metrics))
            told = rows * stage.meta.samples * ("meta" in stage.metrics)
            cap = stage.max_tokens or recipe.rollout.max_tokens
            tokens = answers * cap + told * (stage.meta.max_tokens or cap)
            return StageSize(rows, None, answers + told, tokens)


def _trainings(stage: SftStage | PreferenceStage, rows: int) -> tuple[int, int]:
    """How many models a stage trains, and on how many of the rows each."""
    if not isinstance(stage, AnnotatePreferencesStage):
        return 1, rows
    return stage.members * stage.folds, rows if stage.folds == 1 else rows - rows // stage.folds


def trainable_parameters(info: ModelInfo, lora: LoraConfig | None) -> int:
    """Parameters that get gradients: all, or r·(inputs + outputs) for every adapted linear layer."""
    if lora is None:
        return info.parameters or 0
    names = info.linear if lora.target_modules == "all-linear" else lora.target_modules
    adapted = [shape for name, shape in info.linear.items() if name in names]
    return info.layers * sum(lora.r * (inputs + outputs) for inputs, outputs in adapted)


def memory_of(stage: Stage, recipe: Recipe, info: ModelInfo) -> list[Memory]:
    """Memory of the stage's phases in one process."""
    if isinstance(stage, PreferenceStage):
        return _preference_memory(stage, recipe, info)
    weights = (info.parameters or 0) * element_bytes(recipe, info)
    sampler = {"weights": weights}
    if replicas := _engines_here(recipe):
        sampler["KV cache"] = replicas * _kv_cache(stage, recipe, info)
        if recipe.rollout.engine != "transformers":
            sampler["engine weights"] = replicas * weights
    if isinstance(stage, EvaluateStage | StarStage | HardSubsetStage):
        return [Memory("sample", sampler)]
    trained = {"weights": weights, **_training_state(recipe, info)}
    if isinstance(stage, SftStage):
        rows = stage.micro_batch_size or math.ceil(stage.batch_size / processes(recipe))
        length = stage.max_length or info.context or 0
        logits = rows * length * info.vocabulary * 4
        activations = _activations(rows * length, info, recipe, checkpointing=False)
        return [Memory("update", {**trained, "activations": activations, "logits": logits})]
    if isinstance(stage, SoarStage):
        return _soar_memory(stage, recipe, info)
    if isinstance(stage, ZipRcStage):
        return [Memory("sample", sampler), _forecast_memory(stage, recipe, info)]
    if stage.loss.kl > 0 and recipe.model.lora is None:
        trained["reference"] = sampler["reference"] = weights
    tokens = stage.micro_batch_tokens
    chunk = min(LOGIT_CHUNK_BYTES, 3 * tokens * info.vocabulary * 4)
    activations = _activations(tokens, info, recipe, stage.gradient_checkpointing)
    # Optimiser state stays while the engine samples, and vLLM's weights and cache while the trainer trains.
    held = {name: trained[name] for name in ("optimizer",)}
    kept = (
        {name: sampler[name] for name in ("engine weights", "KV cache")}
        if "engine weights" in sampler
        else {}
    )
    return [
        Memory("sample", {**sampler, **held}),
        Memory("update", {**trained, "activations": activations, "logits": chunk, **kept}),
    ]


def _soar_memory(stage: SoarStage, recipe: Recipe, info: ModelInfo) -> list[Memory]:
    """As for a policy stage; in the main memory the teacher's optimiser and copies of weights: teacher, base,
    baseline, and this process's students of an outer step.
    """
    phases = memory_of(stage.inner(), recipe, info)
    trained = trainable_parameters(info, recipe.model.lora) * (
        4 if recipe.model.lora else element_bytes(recipe, info)
    )
    runs = math.ceil(stage.datasets * stage.students / processes(recipe))
    more = {"in main memory": (5 + runs) * trained}
    return [Memory(phase.phase, {**phase.parts, **more}) for phase in phases]


def _forecast_memory(stage: ZipRcStage, recipe: Recipe, info: ModelInfo) -> Memory:
    """Of the larger training: all weights in float32, or of them the head alone with optimiser states, and a
    frozen reference for the KL term.
    """
    weights, tokens = 4 * (info.parameters or 0), stage.micro_batch_tokens
    trained = weights if stage.trains_all else 4 * info.vocabulary * info.hidden
    parts = {"weights": weights, "gradients": trained, "optimizer": 2 * trained}
    if stage.has_reference:
        parts["reference"] = (info.parameters or 0) * element_bytes(recipe, info)
    parts["activations"] = _activations(tokens, info, recipe, stage.gradient_checkpointing)
    return Memory("update", {**parts, "logits": min(LOGIT_CHUNK_BYTES, 3 * tokens * info.vocabulary * 4)})


def _preference_memory(stage: PreferenceStage, recipe: Recipe, info: ModelInfo) -> list[Memory]:
    """As for fine-tuning, twice the rows and no logits; nothing is known of a model other than the policy."""
    if stage.model is not None:
        return []
    alike = recipe.model_copy(update={"model": recipe.model.model_copy(update={"lora": stage.lora})})
    trained = {
        "weights": (info.parameters or 0) * element_bytes(alike, info),
        **_training_state(alike, info),
    }
    pairs = stage.micro_batch_size or math.ceil(stage.batch_size / processes(recipe))
    tokens = 2 * pairs * (stage.max_length or info.context or 0)
    activations = _activations(tokens, info, alike, checkpointing=False)
    return [Memory("update", {**trained, "activations": activations})]


def disk_of(recipe: Recipe, info: ModelInfo) -> int:
    """Bytes that the run folder will take at most: models, checkpoints with optimiser state, rollouts."""
    element = element_bytes(recipe, info)
    trained = trainable_parameters(info, recipe.model.lora) * (4 if recipe.model.lora else element)
    total = 0
    for spec in recipe.stages:
        stage = spec.config
        if isinstance(stage, EvaluateStage | AnnotatePreferencesStage | StarStage | HardSubsetStage):
            continue
        if isinstance(stage, SoarStage):
            # Teacher and student; in a checkpoint these and Adam's moments.
            total += trained * (2 + 4 * stage.keep_checkpoints)
            continue
        if isinstance(stage, RewardModelStage):
            total += (info.parameters or 0) * element if stage.model is None else 0
            continue
        total += trained if recipe.model.lora else (info.parameters or 0) * element
        if isinstance(stage, PolicyStage):
            total += (stage.steps // stage.save_steps if stage.save_steps else 0) * 3 * trained
            if stage.log_rollouts:
                tokens = size_of(stage, recipe).sampled_tokens or 0
                total += tokens // stage.log_rollouts * BYTES_PER_LOGGED_TOKEN
    return total


def _engines_here(recipe: Recipe) -> int:
    """Engines on this machine, whose memory counts with that of the process that starts them."""
    if recipe.rollout.engine != "vllm_server":
        return 1
    return 0 if recipe.rollout.server.urls else recipe.rollout.server.replicas


def element_bytes(recipe: Recipe, info: ModelInfo) -> int:
    """Bytes of one weight in training."""
    dtype = info.dtype if recipe.model.dtype == "auto" else recipe.model.dtype
    return DTYPE_BYTES.get(dtype, 4)


def processes(recipe: Recipe) -> int:
    """Training processes: the recipe's number, or else that of accelerate's configuration."""
    launch = recipe.launch
    if launch is None or launch.num_processes > 1 or launch.config_file is None:
        return launch.num_processes if launch else 1
    try:
        return int(yaml.safe_load(Path(launch.config_file).read_text())["num_processes"])
    except (OSError, yaml.YAMLError, LookupError, TypeError, ValueError):
        return 1  # accelerate will say what is wrong with it


def _training_state(recipe: Recipe, info: ModelInfo) -> dict[str, int]:
    # peft keeps adapters in float32; torch's Adam keeps its moments in the type of the parameter.
    element = 4 if recipe.model.lora else element_bytes(recipe, info)
    trainable = trainable_parameters(info, recipe.model.lora) * element
    adapters = {"adapters": trainable} if recipe.model.lora else {}
    return {**adapters, "gradients": trainable, "optimizer": 2 * trainable}


def _activations(tokens: int, info: ModelInfo, recipe: Recipe, checkpointing: bool) -> int:
    """Per token and block: eight vectors of the hidden size (norms, residuals, attention in and out), the
    projections' outputs, and four of the inner size. Attention scores are never stored (SDPA). With
    checkpointing one vector per block and one block in full.
    """
    outputs = {name: shape[1] for name, shape in info.linear.items()}
    block = 8 * info.hidden + outputs["q_proj"] + 2 * outputs["k_proj"] + 4 * outputs["gate_proj"]
    per_token = info.layers * info.hidden + block if checkpointing else info.layers * block
    return tokens * per_token * element_bytes(recipe, info)


def _kv_cache(stage: Stage, recipe: Recipe, info: ModelInfo) -> int:
    """Keys and values of the sequences decoded together, for prompts as long as their completions at most."""
    if recipe.rollout.engine != "transformers":
        return int(recipe.rollout.kv_cache_gib * 2**30)
    sequences, cap = recipe.rollout.batch_size, recipe.rollout.max_tokens
    if isinstance(stage, PolicyStage):
        sequences = min(sequences, math.ceil(stage.prompts_per_step / processes(recipe)) * stage.group_size)
    if isinstance(stage, EvaluateStage):
        cap = stage.max_tokens or cap
    length = min(2 * cap, recipe.rollout.max_model_len or info.context or 2 * cap)
    return sequences * length * info.layers * 2 * info.key_value_width * element_bytes(recipe, info)
