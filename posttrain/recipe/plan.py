"""`posttrain plan`: what a recipe will do, in full, before anything heavy is imported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posttrain.recipe.check import data_sources, describe_source, require_runnable
from posttrain.recipe.cost import Cost, cost_of
from posttrain.recipe.devices import Layout, layout_of
from posttrain.recipe.estimate import StageSize, count_rows, disk_of, size_of
from posttrain.recipe.gate_schema import gate_line
from posttrain.recipe.lengths import SourceLengths
from posttrain.recipe.load import LoadedRecipe, recipe_to_dict
from posttrain.recipe.memory import GPU_SIZED, Memory, Stage, memory_of, trainable_parameters
from posttrain.recipe.method_cost import unknown_methods
from posttrain.recipe.model_info import IN_FOLDER, ModelInfo, find_model_info
from posttrain.recipe.preference_schema import PairStage
from posttrain.recipe.risks import device_needed, find_risks
from posttrain.recipe.schema import (
    AnnotatePreferencesStage,
    DpoStage,
    EvaluateStage,
    HardSubsetStage,
    PolicyStage,
    Recipe,
    RewardSpec,
    SftStage,
    SoarStage,
    StarStage,
    ZipRcStage,
)
from posttrain.recipe.soar_plan import hard_subset_line, soar_line
from posttrain.recipe.units import bytes_text, count_text, operations_text
from posttrain.recipe.zip_rc_plan import zip_rc_line


@dataclass(frozen=True)
class Value:
    """One value of the resolved recipe and where it comes from."""

    key: str
    value: Any
    source: str


@dataclass(frozen=True)
class Plan:
    """What will run. `memory` has one list of phases per stage; it is empty, like `disk`, where the model's
    sizes are not known. `known` says how those are, `costs` are of the stages that train.
    """

    loaded: LoadedRecipe
    model: ModelInfo | None
    known: str
    layout: Layout
    sizes: list[StageSize]
    costs: list[Cost | None]
    memory: list[list[Memory]]
    disk: int | None
    values: list[Value]
    notes: list[str]
    risks: list[str]


def make_plan(loaded: LoadedRecipe) -> Plan:
    """Check a recipe and work out what it will do.

    Raises:
        RecipeError: with every problem found, one a line.
    """
    notes = require_runnable(loaded)
    recipe = loaded.recipe
    found = find_model_info(recipe.model.path, recipe.model.revision)
    info, known = found or (None, "")
    layout, data = layout_of(recipe), SourceLengths(recipe.model.path)
    stages = [spec.config for spec in recipe.stages]
    sizes = [size_of(stage, recipe) for stage in stages]
    counted = info if info is not None and info.parameters is not None else None
    memory = [] if counted is None else [memory_of(stage, recipe, counted, data) for stage in stages]
    return Plan(
        loaded=loaded,
        model=info,
        known=known,
        layout=layout,
        sizes=sizes,
        costs=[
            cost_of(stage, recipe, counted, size.steps, data)
            for stage, size in zip(stages, sizes, strict=True)
        ],
        memory=memory,
        disk=None if counted is None else disk_of(recipe, counted),
        values=[Value(key, value, loaded.source(key)) for key, value in _leaves(recipe_to_dict(recipe))],
        notes=notes,
        risks=list(find_risks(recipe, counted, layout, sizes, memory, data)),
    )


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON-compatible values. Memory and disk in bytes."""
    stages = []
    for index, spec in enumerate(plan.loaded.recipe.stages):
        memory = [
            {"phase": phase.phase, "bytes": phase.parts, "total": phase.total, "host": phase.host}
            for phase in (plan.memory[index] if plan.memory else [])
        ]
        size, cost = asdict(plan.sizes[index]), plan.costs[index]
        stages.append(
            {
                "kind": spec.kind,
                "name": spec.config.name,
                **size,
                "cost": None if cost is None else asdict(cost),
                "memory": memory,
            }
        )
    return {
        "name": plan.loaded.recipe.name,
        "model": None if plan.model is None else asdict(plan.model),
        "layout": asdict(plan.layout),
        "stages": stages,
        "disk": plan.disk,
        "values": [asdict(value) for value in plan.values],
        "notes": plan.notes,
        "risks": plan.risks,
    }


def format_plan(plan: Plan, *, all_values: bool = False) -> str:
    """The plan as text; the last line is one sentence on what will run."""
    recipe = plan.loaded.recipe
    lines = [f"{recipe.name}: {recipe.description}" if recipe.description else recipe.name, ""]
    lines += _table(
        [
            ("model", _model_line(recipe, plan.model, plan.known)),
            *_data_lines(recipe),
            *_reward_lines(recipe),
            *_tool_lines(recipe),
            *_replica_lines(recipe),
            ("devices", plan.layout.text),
        ]
    )
    lines += ["", "stages"]
    lines += _table(list(_stage_lines(recipe, plan.sizes)), indent=2)
    if costs := list(_cost_lines(plan)):
        lines += [
            "",
            "cost of a step and of all of them, at most",
            *_table(costs, indent=2),
            *_time_lines(recipe),
        ]
    if plan.memory:
        lines += ["", "memory of one process on its device, at most", *_memory_lines(recipe, plan.memory)]
        lines += _device_lines(plan)
    folder = Path(recipe.output_dir) / recipe.name
    if plan.disk is not None:
        lines += ["", f"disk: at most about {bytes_text(plan.disk)} in {folder}"]
    shown = [value for value in plan.values if all_values or value.source != "default"]
    lines += [
        "",
        "values, all of them" if all_values else "values that are not defaults (--all shows the rest)",
    ]
    lines += _table([(value.key, _show(value.value), value.source) for value in shown], indent=2)
    if plan.notes:
        lines += ["", "notes", *(f"  {note}" for note in plan.notes)]
    if plan.risks:
        lines += ["", "what could go wrong", *(f"  {risk}" for risk in plan.risks)]
    return "\n".join([*lines, "", _closing_line(recipe, plan.layout)])


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every scalar and every list of scalars, by key path."""
    if isinstance(value, dict) and value:
        for name, child in value.items():
            yield from _leaves(child, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and any(isinstance(child, dict) for child in value):
        for index, child in enumerate(value):
            yield from _leaves(child, f"{key}[{index}]")
    else:
        yield key, value


def _model_line(recipe: Recipe, info: ModelInfo | None, known: str) -> str:
    if info is None:
        return f"{recipe.model.path}, not on this machine, size unknown"
    dtype = info.dtype if recipe.model.dtype == "auto" else recipe.model.dtype
    parts = [f"{recipe.model.path}: {info.architecture}"]
    parts.append("size unknown" if info.parameters is None else f"{count_text(info.parameters)} parameters")
    if recipe.model.lora is not None:
        parts.append(f"LoRA trains {count_text(trainable_parameters(info, recipe.model.lora))} more")
    parts.append(dtype)
    if info.context is not None:
        parts.append(f"context {info.context:,}")
    if recipe.model.trust_remote_code:
        parts.append("RUNS CODE FROM THE CHECKPOINT (trust_remote_code)")
    return ", ".join(parts) + ("" if known == IN_FOLDER else f" ({known})")


def _data_lines(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for key, source in data_sources(recipe):
        rows = count_rows(source)
        yield key, describe_source(source) + ("" if rows is None else f", {rows:,} rows")


def _reward_lines(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.rewards:
        yield "rewards", ", ".join(map(_reward_text, recipe.rewards))
    for spec in recipe.stages:
        if own := getattr(spec.config, "rewards", None):
            yield f"rewards of {spec.config.name}", ", ".join(map(_reward_text, own))
    for name, model in recipe.reward_models.items():
        code = ", RUNS CODE FROM THE CHECKPOINT (trust_remote_code)" if model.trust_remote_code else ""
        place = f"{model.path}, loaded once on this machine{code}" if model.path else f"served at {model.url}"
        yield f"reward model {name}", place


def _reward_text(spec: RewardSpec) -> str:
    if isinstance(spec.weight, dict):
        weight = " → ".join(f"{value:g} (step {step})" for step, value in sorted(spec.weight.items()))
    else:
        weight = f"{spec.weight:g}"
    clip = "" if spec.clip is None else f" clipped to [{spec.clip[0]:g}, {spec.clip[1]:g}]"
    use = "" if spec.use is None else f" ({spec.use})"
    return f"{spec.name}{use} × {weight}{clip}" + ("" if spec.only_if is None else f" if {spec.only_if}")


def _tool_lines(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.tools is not None:
        names = recipe.tools.environment or ", ".join(spec.name for spec in recipe.tools.use)
        limits = (
            f"at most {recipe.tools.max_turns} turns of them in a completion, {recipe.tools.timeout:g} s each"
        )
        yield "tools", f"{names}; {limits}"


def _replica_lines(recipe: Recipe) -> Iterator[tuple[str, str]]:
    server = recipe.rollout.server
    if recipe.rollout.engine != "vllm_server":
        return
    if server.urls:
        yield "replicas", f"running already: {', '.join(server.urls)}"
    else:
        yield "replicas", f"{server.replicas} × vllm serve on this machine, on loopback"


def _stage_lines(recipe: Recipe, sizes: list[StageSize]) -> Iterator[tuple[str, str, str]]:
    for number, (spec, size) in enumerate(zip(recipe.stages, sizes, strict=True), start=1):
        stage = spec.config
        match stage:
            case SftStage():
                text = _sft_line(stage, size)
            case PolicyStage():
                text = _policy_line(stage, size)
            case PairStage():
                text = _preference_line(stage, size)
            case StarStage():
                text = _star_line(stage, size)
            case SoarStage():
                text = soar_line(stage, recipe.rollout.max_tokens)
            case HardSubsetStage():
                text = hard_subset_line(stage, size.rows, recipe.rollout.max_tokens)
            case ZipRcStage():
                text = zip_rc_line(stage, size.rows, recipe.rollout.max_tokens)
            case _:
                text = _evaluate_line(stage, size)
        name = spec.kind if stage.name == spec.kind else f"{spec.kind} {stage.name!r}"
        yield f"{number}", name, text


def _sft_line(stage: SftStage, size: StageSize) -> str:
    rows = "rows" if size.rows is None else f"{size.rows:,} rows"
    steps = "" if size.steps is None else f" = {size.steps:,} steps"
    passes = f"{stage.epochs:g} × {rows}" if stage.max_steps is None else rows
    return f"{passes} in batches of {stage.batch_size}{steps}"


def _preference_line(stage: PairStage, size: StageSize) -> str:
    pairs = "pairs" if size.rows is None else f"{size.rows:,} pairs"
    steps = "" if size.steps is None else f" = {size.steps:,} steps"
    start = "the policy" if (model := getattr(stage, "model", None)) is None else model.path
    if isinstance(stage, AnnotatePreferencesStage):
        models = f"{stage.members * stage.folds} models from {start}"
        part = "all of them" if stage.folds == 1 else f"{stage.folds - 1} of {stage.folds} folds"
        each = f"{stage.members} votes on each of {pairs}: {models}, each trained on {part}"
        return f"{each} in batches of {stage.batch_size}{steps}, then {stage.treatment}"
    passes = f"{stage.epochs:g} × {pairs}" if stage.max_steps is None else pairs
    return f"{passes} in batches of {stage.batch_size}{steps}, from {start}"


def _policy_line(stage: PolicyStage, size: StageSize) -> str:
    work = f"{stage.steps:,} steps × {stage.prompts_per_step} prompts × {stage.group_size} completions"
    tokens = f"at most {count_text(size.sampled_tokens or 0)} sampled tokens"
    parts = [f"{work} = {size.rollouts:,} rollouts", tokens]
    if stage.updates_per_batch > 1:
        parts.append(f"{stage.steps * stage.updates_per_batch:,} updates")
    if size.rows is not None:
        parts.append(f"{stage.steps * stage.prompts_per_step / size.rows:.2g} passes over the prompts")
    if stage.dynamic_sampling:
        parts.append(f"up to {stage.dynamic_sampling} rounds of replacing prompts included")
    return ", ".join(parts)


def _evaluate_line(stage: EvaluateStage, size: StageSize) -> str:
    metrics = ", ".join(stage.metrics)
    if size.rollouts is None:
        return f"{metrics} on every problem{gate_line(stage)}"
    tokens = f"at most {count_text(size.sampled_tokens or 0)} sampled tokens"
    return f"{metrics} on {size.rows:,} problems: {size.rollouts:,} rollouts, {tokens}{gate_line(stage)}"


def _star_line(stage: StarStage, size: StageSize) -> str:
    kept = {"correct": "the right ones", "best_prefix": "the best beginning of each"}
    text = f"{stage.samples} of every prompt, of which {kept.get(stage.selection, 'the best')} are kept"
    if size.rollouts is None:
        return text
    tokens = f"at most {count_text(size.sampled_tokens or 0)} sampled tokens and forced answers"
    return f"{text}: {size.rollouts:,} traces, {tokens}"


def _memory_lines(recipe: Recipe, memory: list[list[Memory]]) -> list[str]:
    names = list(dict.fromkeys(name for phases in memory for phase in phases for name in phase.parts))
    rows: list[tuple[str, ...]] = [("", *names, "total")]
    for spec, phases in zip(recipe.stages, memory, strict=True):
        for phase in phases:
            if not phase.parts:  # servers elsewhere do it
                continue
            cells = [bytes_text(phase.parts[name]) if name in phase.parts else "" for name in names]
            rows.append((f"{spec.config.name}: {phase.phase}", *cells, bytes_text(phase.total)))
    return _table(rows, indent=2)


def _cost_lines(plan: Plan) -> Iterator[tuple[str, ...]]:
    """Of every training stage a row for its tokens and operations."""
    for spec, cost in zip(plan.loaded.recipe.stages, plan.costs, strict=True):
        if cost is None:
            continue
        sampled = f"{count_text(cost.sampled)} tokens sampled, " if cost.sampled else ""
        tokens = f"{sampled}{count_text(cost.trained)} trained"
        work = [
            f"{operations_text(each)} to {phase}, {operations_text(each * cost.steps)} in all"
            for phase, each in (("generate", cost.generate), ("update", cost.update))
            if each
        ]
        asked = unknown_methods(spec.config) if isinstance(spec.config, PolicyStage) else []
        more = [f"what {', '.join(asked)} adds is not known"] if asked else []
        yield spec.config.name, "; ".join([tokens, *work, *more])


def _time_lines(recipe: Recipe) -> list[str]:
    """How long it took, where it was measured: by an earlier run of the same name."""
    summary = Path(recipe.output_dir) / recipe.name / "summary.json"
    try:
        seconds = float(json.loads(summary.read_bytes())["seconds"])
    except (OSError, ValueError, LookupError, TypeError):
        return ["  How long it takes is not known: no run of this name has been measured here."]
    return [f"  The run in {summary.parent} took {seconds:,.0f} s."]


def _device_lines(plan: Plan) -> list[str]:
    """What GPUs the memory asks for, and the main memory beside them."""
    recipe, info = plan.loaded.recipe, plan.model
    if info is None or (info.parameters or 0) < GPU_SIZED:
        return []
    share = (
        f", of which vLLM takes {recipe.rollout.memory_fraction:.0%}"
        if recipe.rollout.engine == "vllm"
        else ""
    )
    lines = [f"  GPUs of {bytes_text(device_needed(recipe, plan.memory))} at least{share}."]
    if recipe.rollout.engine != "transformers":
        lines.append("  The cache is one sequence's; vLLM takes what its share leaves for more of them.")
    loading = max((phase.host for phases in plan.memory for phase in phases), default=0)
    if plan.layout.processes > 1 and loading:
        lines.append(f"  Main memory of a machine while the model is loaded: {bytes_text(loading)}.")
    return lines


def _closing_line(recipe: Recipe, layout: Layout) -> str:
    steps = ", then ".join(_what(spec.config) for spec in recipe.stages)
    where = f" in {layout.processes} processes" if layout.processes > 1 else ""
    return f"This will {steps}{where}, and write to {Path(recipe.output_dir) / recipe.name}."


def _what(stage: Stage) -> str:
    match stage:
        case SftStage():
            return "fine-tune on demonstrations"
        case DpoStage():
            return "train on preferences (DPO)"
        case PolicyStage():
            return f"train {stage.steps:,} steps with {stage.loss.kind}"
        case EvaluateStage():
            return f"evaluate {', '.join(stage.metrics)}"
        case AnnotatePreferencesStage():
            return "vote on preferences"
        case StarStage():
            return "sample traces and keep the good ones"
        case HardSubsetStage():
            return "find the problems that are never solved"
        case SoarStage():
            return f"train a teacher and its students for {stage.steps:,} outer steps"
        case ZipRcStage():
            return f"train forecasts of reward and length ({stage.variant})"
        case _:
            return f"train the reward model {stage.name}"


def _table(rows: list[tuple[str, ...]], indent: int = 0) -> list[str]:
    """Rows with their cells aligned to the left, two spaces apart."""
    if not rows:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return [" " * indent + line.rstrip() for line in padded]


def _show(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "…"
