"""Memory of a recipe's stages, by phase, on the device of one process: first-order formulas.

A run's phases are called as in its metrics: generate, update, sync. Every number is for the worst case that
the recipe allows: completions as long as their cap, no two with a common beginning beyond their prompt,
prompts and demonstrations as long as the longest that was looked at. What a run needs is less where
completions end sooner, unless `micro_batch_tokens` is the limit anyway.

Left out are the process itself (Python and its libraries, some 350 MiB of main memory, or the CUDA context)
and what an allocator keeps of memory that was given back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from posttrain.recipe.data_schema import DataSource
from posttrain.recipe.devices import Layout, layout_of
from posttrain.recipe.lengths import SourceLengths
from posttrain.recipe.method_cost import extras
from posttrain.recipe.model_info import DTYPE_BYTES, ModelInfo
from posttrain.recipe.preference_schema import PairStage, PreferenceStage
from posttrain.recipe.schema import (
    DpoStage,
    EvaluateStage,
    HardSubsetStage,
    LoraConfig,
    PolicyStage,
    Recipe,
    SftStage,
    SoarStage,
    StarStage,
    ZipRcStage,
)

Stage = (
    SftStage | PolicyStage | EvaluateStage | PairStage | StarStage | SoarStage | HardSubsetStage | ZipRcStage
)
Parts = dict[str, int]

CHUNK_BYTES = 128 * 2**20
"""Logits of one chunk of tokens, as in `posttrain.training.logprobs`; TRL's tiles are no larger."""
CHUNKS = 3
"""Tensors of that size that exist together."""
CACHE_ROOM = 64
"""Tokens by which a key-value cache of the transformers engine grows, or a quarter if that is more."""
GPU_SIZED = 200_000_000
"""Parameters from which on a model is hardly trained on a CPU."""
MOMENTS = {"sgd": 0, "adafactor": 0, "lion": 4, "8bit": 2}
"""Bytes of state for a float32 parameter of optimisers with this in their name; Adam's are 8."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one phase of a stage, in one process. `host` is main memory of its own, on a GPU machine."""

    phase: str
    parts: Parts
    host: int = 0

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(self.parts.values())


def memory_of(
    stage: Stage, recipe: Recipe, info: ModelInfo, data: SourceLengths | None = None
) -> list[Memory]:
    """Memory of the stage's phases in one process."""
    plan = _Planner(recipe, info, layout_of(recipe), data or SourceLengths(recipe.model.path))
    match stage:
        case PolicyStage():
            return plan.policy(stage)
        case SoarStage():
            return plan.soar(stage)
        case ZipRcStage():
            return [
                plan.sampling(stage.samples, recipe.rollout.max_tokens, stage.data),
                plan.forecasts(stage),
            ]
        case SftStage() | DpoStage():
            return [plan.supervised(stage)]
        case PreferenceStage():
            return plan.preferences(stage)
        case EvaluateStage():
            cap = stage.max_tokens or recipe.rollout.max_tokens
            return [plan.sampling(stage.samples, cap, stage.data or recipe.data.eval)]
        case StarStage() | HardSubsetStage():
            return [plan.sampling(stage.samples, recipe.rollout.max_tokens, stage.data)]
        case _:
            return []


def element_bytes(recipe: Recipe, info: ModelInfo) -> int:
    """Bytes of a number in the type that the model computes in."""
    dtype = info.dtype if recipe.model.dtype == "auto" else recipe.model.dtype
    return DTYPE_BYTES.get(dtype, 4)


def trainable_parameters(info: ModelInfo, lora: LoraConfig | None) -> int:
    """Parameters that get gradients: all, or r·(inputs + outputs) for every adapted linear layer."""
    if lora is None:
        return info.parameters or 0
    return info.layers * sum(lora.r * (inputs + outputs) for inputs, outputs in adapted(info, lora))


def adapted(info: ModelInfo, lora: LoraConfig) -> list[tuple[int, int]]:
    """(inputs, outputs) of the linear layers of a block that an adapter changes."""
    names = info.linear if lora.target_modules == "all-linear" else lora.target_modules
    return [shape for name, shape in info.linear.items() if name in names]


@dataclass(frozen=True)
class _Planner:
    recipe: Recipe
    info: ModelInfo
    layout: Layout
    data: SourceLengths

    # --- stages --------------------------------------------------------------------------------------------

    def policy(self, stage: PolicyStage) -> list[Memory]:
        lora, cap = self.recipe.model.lora, self.recipe.rollout.max_tokens
        trained = self._trained(lora, stage.optimizer.name)
        reference = self._copy("reference") if stage.loss.kl > 0 and lora is None else {}
        # Optimiser state stays while the engine samples, and the engine's memory while the trainer trains.
        rows = self._share(stage.prompts_per_step) * stage.group_size
        own = self.layout.splits_weights or stage.overlap > 0
        engine = self._engine(rows, cap, stage.data or self.recipe.data.train, own=own)
        kept = {name: size for name, size in engine.items() if name == "engine weights"}
        if self.recipe.rollout.engine != "transformers" or stage.overlap:
            kept = engine
        held = {name: size for name, size in trained.items() if name in ("weights", "adapters", "optimizer")}
        tokens = self._policy_tokens(stage)
        update = {
            **trained,
            **reference,
            **self._passes(tokens, lora, checkpointing=stage.gradient_checkpointing),
            **kept,
        }
        phases = [
            Memory("generate", {**held, **reference, **engine}),
            Memory("update", update, host=self._loading()),
        ]
        if own or self.recipe.rollout.engine != "transformers":
            phases.append(Memory("sync", {**held, **reference, **kept, "weights under way": self._largest()}))
        return phases

    def soar(self, stage: SoarStage) -> list[Memory]:
        """As for a policy stage; in main memory teacher, base and baseline and their optimisers, and this
        process's students of an outer step.
        """
        phases = self.policy(stage.inner())
        lora = self.recipe.model.lora
        runs = self._share(stage.datasets * stage.students)
        copies = (5 + runs) * 4 * trainable_parameters(self.info, lora)
        return [Memory(phase.phase, {**phase.parts, "in main memory": copies}) for phase in phases]

    def forecasts(self, stage: ZipRcStage) -> Memory:
        """Of the larger training: all weights, or of them the head alone with optimiser state, and a frozen
        reference for the KL term.
        """
        whole = 4 * (self.info.parameters or 0)
        learnt = whole if stage.trains_all else 4 * self.info.vocabulary * self.info.hidden
        parts = {
            "weights": self.layout.weights(whole),
            "gradients": self.layout.gradients(learnt),
            "optimizer": self.layout.optimizer(2 * learnt),
            **({"gathered": self.layout.gathered(self.info, 4)} if self.layout.splits_weights else {}),
            **(self._copy("reference") if stage.has_reference else {}),
        }
        prompt, cap = self._prompt(stage.data or self.recipe.data.train), self.recipe.rollout.max_tokens
        batch = self._share(stage.batch_size) * (prompt + cap)
        tokens = min(max(stage.micro_batch_tokens, prompt + cap), batch)
        passes = self._passes(tokens, None, checkpointing=stage.gradient_checkpointing)
        return Memory("update", {**parts, **passes}, host=self._loading())

    def supervised(self, stage: SftStage | DpoStage) -> Memory:
        """TRL's trainers: padded rows, of DPO both answers of a pair."""
        lora = self.recipe.model.lora
        pairs = isinstance(stage, DpoStage)
        longest = self._longest(stage, pairs=pairs)
        rows = stage.micro_batch_size or self._share(stage.batch_size)
        tokens = rows * longest * (2 if pairs else 1)
        parts = {
            **self._trained(lora, stage.optimizer.name),
            **(self._copy("reference") if pairs and lora is None else {}),
            **self._passes(
                tokens, lora, checkpointing=isinstance(stage, SftStage) and stage.gradient_checkpointing
            ),
        }
        return Memory("update", parts, host=self._loading())

    def preferences(self, stage: PreferenceStage) -> list[Memory]:
        """As for fine-tuning, twice the rows and no logits; nothing is known of other models."""
        if stage.model is not None:
            return []
        rows = 2 * (stage.micro_batch_size or self._share(stage.batch_size))
        passes = self._passes(rows * self._longest(stage, pairs=True), stage.lora, checkpointing=False)
        del passes["logits"]
        parts = {**self._trained(stage.lora, stage.optimizer.name), **passes}
        return [Memory("update", parts, host=self._loading())]

    def sampling(self, samples: int, cap: int, source: DataSource | None) -> Memory:
        """A stage that only samples, with a model of its own."""
        source = source or self.recipe.data.train
        known = None if source is None else source.limit or source.size
        rows = samples * (known or self.recipe.rollout.batch_size)
        return Memory("generate", self._engine(self._share(rows), cap, source, own=True, alone=True))

    # --- parts ---------------------------------------------------------------------------------------------

    def _share(self, count: int) -> int:
        return math.ceil(count / self.layout.processes)

    @property
    def _element(self) -> int:
        return element_bytes(self.recipe, self.info)

    def _copy(self, name: str) -> Parts:
        """A frozen copy of the whole model, in the type it computes in."""
        return {name: self._element * (self.info.parameters or 0)}

    def _trained(self, lora: LoraConfig | None, optimizer: str) -> Parts:
        """Weights, gradients, optimiser state. What is trained is held in float32, a frozen base is not."""
        layout, whole, element = self.layout, self.info.parameters or 0, self._element
        learnt = 4 * trainable_parameters(self.info, lora)
        state = next((size for name, size in MOMENTS.items() if name in optimizer), 8)
        parts = {"weights": layout.weights(element * whole if lora else learnt)}
        if lora:
            parts["adapters"] = layout.weights(learnt)
        parts["gradients"] = layout.gradients(learnt)
        parts["optimizer"] = layout.optimizer(learnt * state // 4)
        if layout.splits_weights:
            parts["gathered"] = layout.gathered(self.info, element)
        elif element < 4 and not lora:
            parts["casts"] = element * whole  # autocast keeps the weights it has cast until a pass has ended
        return parts

    def _passes(self, tokens: int, lora: LoraConfig | None, *, checkpointing: bool) -> Parts:
        """Of one forward and backward pass: what is stored for the way back, and the logits of a chunk."""
        chunk = min(CHUNK_BYTES, tokens * self.info.vocabulary * 4)
        return {"activations": self._activations(tokens, lora, checkpointing), "logits": CHUNKS * chunk}

    def _activations(self, tokens: int, lora: LoraConfig | None, checkpointing: bool) -> int:
        """Per token and block: six vectors of the hidden size (residuals, norms and what they normalise),
        queries, keys, values and attention's output twice, and four of the inner size. Scores are never
        stored (SDPA). Norms and residuals are float32 where weights are; with autocast the products' inputs
        are cast copies. With checkpointing one vector a block and one block in full; and always one block's
        gradients.
        """
        info, narrow = self.info, self._element
        wide = narrow if lora else 4
        queries, keys, inner = (info.linear[name][1] for name in ("q_proj", "k_proj", "gate_proj"))
        block = 6 * info.hidden * wide + (3 * queries + 2 * keys + 4 * inner) * narrow
        if narrow < wide:
            block += 2 * info.hidden * narrow
        if lora:
            block += sum(inputs for inputs, _ in adapted(info, lora)) * narrow if narrow < 4 else 0
        gradients = 2 * info.hidden * wide + 2 * inner * narrow
        stored = info.layers * info.hidden * wide + block if checkpointing else info.layers * block
        return tokens * (stored + gradients)

    def _longest(self, stage: SftStage | PairStage, *, pairs: bool) -> int:
        """Tokens of the longest row: known, or what the stage or the context allows.

        Rows that an earlier stage writes are the pairs that it was given, or its own traces.
        """
        source = stage.data or self.recipe.data.train
        limit = stage.max_length or self.info.context or 0
        if source is not None and source.stage is not None:
            writer = next(s.config for s in self.recipe.stages if s.config.name == source.stage)
            source = writer.data or self.recipe.data.train
            if not pairs:
                return min(self._prompt(source) + self.recipe.rollout.max_tokens, limit)
        known = self.data.of(source, pairs=pairs)
        return limit if known is None else min(known.both, limit or known.both)

    def _policy_tokens(self, stage: PolicyStage) -> int:
        """Distinct tokens of the largest micro-batch."""
        cap, prompts = self.recipe.rollout.max_tokens, self._share(stage.prompts_per_step)
        prompt = self._prompt(stage.data or self.recipe.data.train)
        more = sum(extra.trained for extra in extras(stage, self.recipe)) // self.layout.processes
        step = prompts * (prompt + stage.group_size * cap) + more
        return min(max(stage.micro_batch_tokens, prompt + cap), step)

    def _prompt(self, source: DataSource | None) -> int:
        """Tokens of the longest prompt: known, or what the context leaves, at most those of a completion."""
        cap = self.recipe.rollout.max_tokens
        limit = self.recipe.rollout.max_model_len or self.info.context
        room = cap if limit is None else max(min(cap, limit - cap), 1)
        known = self.data.of(source)
        if known is None:
            return room
        return known.prompt if known.exact else min(known.prompt, room)

    def _engine(
        self, rows: int, cap: int, source: DataSource | None, *, own: bool, alone: bool = False
    ) -> Parts:
        """Of the engine on this device; with weights of its own where the trainer's are split or in use."""
        rollout = self.recipe.rollout
        prompt = self._prompt(source)
        per_token = self.info.layers * 2 * self.info.key_value_width * self._element
        if rollout.engine != "transformers":
            engines = 1 if rollout.engine == "vllm" else 0 if rollout.server.urls else rollout.server.replicas
            cache = int(rollout.kv_cache_gib * 2**30)
            if (self.info.parameters or 0) >= GPU_SIZED:  # vLLM's least: one whole sequence
                cache = per_token * (rollout.max_model_len or self.info.context or prompt + cap)
            whole = self._copy("engine weights")["engine weights"]
            return {"engine weights": engines * whole, "KV cache": engines * cache} if engines else {}
        rows, length = min(rows, rollout.batch_size), _capacity(prompt, prompt + cap)
        return {
            **(self._copy("weights" if alone else "engine weights") if own else {}),
            "KV cache": rows * length * per_token,
            "logits": CHUNKS * rows * self.info.vocabulary * 4,
        }

    def _largest(self) -> int:
        """The largest tensor, whole and in float32, as it is gathered, and cast for the engine."""
        return (4 + self._element) * self.info.vocabulary * self.info.hidden

    def _loading(self) -> int:
        """Main memory of a machine while its processes load: each has the whole model before it is split."""
        held = self._element if self.recipe.model.lora else 4
        return self.layout.per_machine * held * (self.info.parameters or 0)


def _capacity(start: int, stop: int) -> int:
    """Tokens that a growing cache has room for when it holds `stop` of them."""
    room = start + max(CACHE_ROOM, start // 4)
    while room < stop:
        room += max(CACHE_ROOM, room // 4)
    return room
