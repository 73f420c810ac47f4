"""What could go wrong with a valid recipe: sentences for the plan, each about something looked at."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from posttrain.recipe.check import describe_source
from posttrain.recipe.devices import Layout
from posttrain.recipe.estimate import StageSize
from posttrain.recipe.lengths import SourceLengths
from posttrain.recipe.memory import GPU_SIZED, Memory
from posttrain.recipe.model_info import ModelInfo
from posttrain.recipe.schema import DataSource, EvaluateStage, PolicyStage, Recipe, SftStage
from posttrain.recipe.units import bytes_text

DEVICE = Path("/dev/nvidia0")
GPU = 80 * 10**9
"""Memory of the usual data-centre GPU."""
HOST = 64 * 2**30
"""Main memory that a machine is not sure to have."""
ANSWERED = ("math_answer", "exact_match", "numeric_match")
"""Built-in rewards that compare with the reference answer, and do not apply where there is none."""
MANY_PASSES = 20


def find_risks(
    recipe: Recipe,
    info: ModelInfo | None,
    layout: Layout,
    sizes: Sequence[StageSize],
    memory: Sequence[Sequence[Memory]],
    data: SourceLengths,
) -> Iterator[str]:
    """Sentences, those about memory first."""
    yield from _memory(recipe, info, layout, memory)
    yield from _lengths(recipe, info, data)
    yield from _rewards(recipe)
    for spec, size in zip(recipe.stages, sizes, strict=True):
        if isinstance(spec.config, PolicyStage):
            yield from _groups(spec.config, recipe)
            yield from _passes(spec.config, size)
    yield from _unsaved(recipe)


# --- memory ------------------------------------------------------------------------------------------------


def device_needed(recipe: Recipe, memory: Sequence[Sequence[Memory]]) -> int:
    """Bytes that a GPU must have at least, for what is planned on it; vLLM in the process takes its share."""
    needed = 0
    for phase in (phase for phases in memory for phase in phases):
        engine = sum(phase.parts.get(name, 0) for name in ("engine weights", "KV cache"))
        host = phase.parts.get("in main memory", 0)
        if recipe.rollout.engine == "vllm" and engine:
            share = recipe.rollout.memory_fraction
            rest = (phase.total - engine - host) / (1 - share) if share < 1 else 0
            needed = max(needed, int(rest), int(engine / share))
        else:
            served = engine if recipe.rollout.engine == "vllm_server" else 0  # on devices of their own
            needed = max(needed, phase.total - host - served)
    return needed


def _memory(
    recipe: Recipe, info: ModelInfo | None, layout: Layout, memory: Sequence[Sequence[Memory]]
) -> Iterator[str]:
    if info is None or info.parameters is None:
        yield "memory is not known: the model's shape is not on this machine."
        return
    if not memory:
        return
    stages = [
        (spec.config.name, phase)
        for spec, phases in zip(recipe.stages, memory, strict=True)
        for phase in phases
    ]
    name, worst = max(stages, key=lambda entry: entry[1].total)
    if info.parameters < GPU_SIZED:
        free = available_memory()
        total = worst.total * layout.per_machine
        if free is not None and total > free and not DEVICE.exists():
            yield (
                f"out of memory: {name} takes up to {bytes_text(total)} to {worst.phase}, and this machine "
                f"has {bytes_text(free)} left and no GPU."
            )
        return
    needed = device_needed(recipe, memory)
    if needed > GPU:
        yield (
            f"out of memory on GPUs of 80 GB: {bytes_text(needed)} are needed. What helps: weights split "
            "over more devices (fsdp2, zero3), gradient_checkpointing, fewer micro_batch_tokens, an adapter."
        )
    loading = max((phase.host for _, phase in stages), default=0)
    if loading > HOST:
        each = bytes_text(loading // layout.per_machine)
        yield (
            f"out of main memory: while it loads, a machine holds up to {bytes_text(loading)}, the whole "
            f"model ({each}) in each of its {layout.per_machine} processes."
        )


def available_memory() -> int | None:
    """Main memory that is free, in bytes; None where the system does not tell."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024


# --- lengths -----------------------------------------------------------------------------------------------


def _lengths(recipe: Recipe, info: ModelInfo | None, data: SourceLengths) -> Iterator[str]:
    cap = recipe.rollout.max_tokens
    limit = recipe.rollout.max_model_len or (info.context if info is not None else None)
    for spec in recipe.stages:
        stage = spec.config
        if not isinstance(stage, PolicyStage):
            continue
        source = stage.data or recipe.data.train
        if source is not None:
            for text in _prompts(stage, source, cap, limit, data):
                yield f"{stage.name}: {text}"
        longest = _longest_row(source, recipe, data)
        if longest > stage.micro_batch_tokens:
            yield (
                f"{stage.name}: a prompt with a completion at the cap has up to {longest:,} tokens, more "
                f"than micro_batch_tokens {stage.micro_batch_tokens:,}; rows are never cut: memory is that "
                "of the longest."
            )


def _prompts(
    stage: PolicyStage, source: DataSource, cap: int, limit: int | None, data: SourceLengths
) -> Iterator[str]:
    what = describe_source(source)
    then = "are left out" if stage.on_long_prompt == "drop" else "end the run with an error"
    known = data.of(source)
    if known is None:
        above = "" if limit is None else f"; those above {max(limit - cap, 0):,} tokens {then}"
        yield f"how long the prompts of {what} are is known when they are read{above}."
        return
    if limit is not None and known.prompt + cap > limit:
        unit = "tokens" if known.exact else "bytes, so perhaps as many tokens"
        yield (
            f"prompts of {what} have up to {known.prompt:,} {unit}, and {cap:,} are for the completion: "
            f"those that do not fit in {limit:,} {then}."
        )
    if known.exact and known.completion is not None and known.completion > cap:
        yield (
            f"demonstrations of {what} have up to {known.completion:,} tokens and completions at most "
            f"{cap:,}: right answers may be cut off."
        )


def _longest_row(source: DataSource | None, recipe: Recipe, data: SourceLengths) -> int:
    known = data.of(source)
    return recipe.rollout.max_tokens + (known.prompt if known is not None and known.exact else 0)


# --- rewards and groups ------------------------------------------------------------------------------------


def _rewards(recipe: Recipe) -> Iterator[str]:
    policies = [spec.config for spec in recipe.stages if isinstance(spec.config, PolicyStage)]
    for stage in policies:
        source = stage.data or recipe.data.train
        for spec in recipe.rewards_of(stage):
            if source is not None and spec.code in ANSWERED and _has_no_answer(source):
                yield f"{stage.name}: reward {spec.name} never applies: the data has no columns.answer."
            for tag in _unmentioned(spec.args, source):
                yield (
                    f"{stage.name}: reward {spec.name} asks for {tag}, which neither system message nor "
                    "template of the data mentions: a policy that never writes it never gets the reward."
                )
            free = spec.args.get("max_tokens", 0) - spec.args.get("buffer", 0)
            if spec.code == "length_penalty" and free >= recipe.rollout.max_tokens:
                yield (
                    f"{stage.name}: reward {spec.name} begins above {free:,} tokens and completions end at "
                    f"{recipe.rollout.max_tokens:,}: it never fires."
                )
    kinds = [spec.config for spec in recipe.stages]
    if policies and not any(
        isinstance(stage, EvaluateStage | SftStage) for stage in kinds[: kinds.index(policies[0])]
    ):
        yield (
            f"{policies[0].name}: nothing says before it how often the rewards fire; if they never do, every "
            "group has the same reward and nothing is learnt. An evaluate stage before it would tell."
        )


def _has_no_answer(source: DataSource) -> bool:
    return source.columns.answer is None and source.task is None and source.stage is None


def _unmentioned(args: dict[str, Any], source: DataSource | None) -> list[str]:
    """Tags that a format reward wants and that no instruction names."""
    if source is None or source.task is not None:
        return []
    wanted = [f"<{tag}>" for tag in args.get("tags", ())] if isinstance(args.get("tags"), list) else []
    if isinstance(args.get("pattern"), str):
        wanted += re.findall(r"<[a-z_]+>", args["pattern"])
    told = (source.system or "") + (source.template or "")
    return [tag for tag in dict.fromkeys(wanted) if tag not in told]


def _groups(stage: PolicyStage, recipe: Recipe) -> Iterator[str]:
    """Groups whose rewards are all equal teach nothing: p^n + (1 - p)^n of them, for rewards of 0 or 1."""
    count = stage.group_size
    if count < 2:
        return
    shares = [(rate, rate**count + (1 - rate) ** count) for rate in (0.5, 0.9, 0.99)]
    told = ", ".join(
        f"{f'{share:.0%}' if share >= 0.01 else 'under 1%'} of groups where {rate:.0%} are right"
        for rate, share in shares
    )
    rounds = stage.dynamic_sampling
    replaced = f"up to {rounds} rounds replace them" if rounds else "none are replaced (dynamic_sampling: 0)"
    yield f"{stage.name}: zero-variance groups, if rewards are 0 or 1, {count} samples: {told}; {replaced}."


def _passes(stage: PolicyStage, size: StageSize) -> Iterator[str]:
    if not size.rows:
        return
    if size.rows < stage.prompts_per_step:
        yield (
            f"{stage.name}: a step takes {stage.prompts_per_step} prompts and there are {size.rows:,}: some "
            "are in it twice."
        )
    elif (passes := stage.steps * stage.prompts_per_step / size.rows) > MANY_PASSES:
        yield f"{stage.name}: {passes:.0f} passes over {size.rows:,} prompts: it may learn them by heart."


def _unsaved(recipe: Recipe) -> Iterator[str]:
    names = [spec.config.name for spec in recipe.stages if getattr(spec.config, "save_steps", 1) is None]
    if names:
        yield (
            f"{', '.join(names)}: no checkpoints (save_steps); a run that is killed there begins the stage "
            "anew. One that is asked to stop writes one."
        )
