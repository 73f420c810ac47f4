"""Run a recipe: one stage after the other, each starting from the model that the one before handed on."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from posttrain.errors import RecipeError, Stopped
from posttrain.methods.base import load_methods
from posttrain.recipe.check import require_runnable
from posttrain.recipe.gates import decide_gate, require_passed
from posttrain.recipe.load import LoadedRecipe, dump_recipe
from posttrain.recipe.run_state import FinishedStage, RunLock, RunState, check_folder, make_folder
from posttrain.recipe.schema import Recipe, RewardSpec
from posttrain.recipe.summary import closing_lines, summarise, versions
from posttrain.report.html import write_report
from posttrain.report.progress import Progress
from posttrain.rewards.model_server import keep_servers
from posttrain.rewards.registry import RewardInfo
from posttrain.rewards.scorer import Scorer
from posttrain.stages.context import StageContext
from posttrain.training.distributed import start_processes
from posttrain.training.ranks import on_first_rank
from posttrain.training.record import MetricsFile, note_rewards, write_json
from posttrain.training.stop import StopSignals

METRICS = "metrics.jsonl"
REWARDS = "rewards.json"


def run_recipe(loaded: LoadedRecipe, *, overwrite: bool = False) -> Path:
    """Run all stages. Returns the run folder.

    Raises:
        RecipeError: the run folder exists already and `overwrite` is off, or another process works in it.
        GateFailed: a stage did not pass its gate; the later ones were not run.
        PosttrainError: a stage failed in a way its message explains.
        Stopped: a signal asked to stop; the run can be resumed.
    """
    require_runnable(loaded)
    recipe = loaded.recipe
    return _begin(recipe, Path(recipe.output_dir) / recipe.name, overwrite)


def evaluate_model(loaded: LoadedRecipe, *, overwrite: bool = False) -> Path:
    """Run the last evaluate stage of a recipe on its model. Returns the run folder.

    Raises:
        RecipeError: the recipe has no evaluate stage, or the folder exists already.
    """
    recipe = loaded.recipe
    stages = [stage for stage in recipe.stages if stage.kind == "evaluate"]
    if not stages:
        raise RecipeError(f"recipe {recipe.name!r} has no evaluate stage")
    evaluated = Path(recipe.model.adapter or recipe.model.path).name
    folder = Path(recipe.output_dir) / f"{recipe.name}-evaluate-{evaluated}"
    alone = stages[-1].config.model_copy(update={"advance_if": None})  # there is nothing to compare with
    stage = stages[-1].model_copy(update={"evaluate": alone})
    return _begin(recipe.model_copy(update={"stages": [stage]}), folder, overwrite)


def resume_run(loaded: LoadedRecipe, run_dir: Path) -> Path:
    """Go on with the run in a folder: with the stage it was in, from that stage's newest checkpoint.

    `loaded` is the folder's own recipe; the working directory is the one that the run was started in.

    Raises:
        RecipeError: there is no run in the folder, or another process works in it.
        PosttrainError, Stopped: as `run_recipe`.
    """
    require_runnable(loaded)
    rewards = _load_code(loaded.recipe)

    def open_run(lock: RunLock) -> RunState:
        lock.acquire()
        state = RunState.read(run_dir)
        note_rewards(run_dir / REWARDS, rewards)
        return state

    return _run(loaded.recipe, run_dir, open_run)


def _load_code(recipe: Recipe) -> list[RewardInfo]:
    """A reward or method that cannot be loaded must not be found out after an hour of another stage.

    Rewards whose model a stage of the recipe has yet to train are left out.
    """
    for spec in recipe.stages:
        if spec.policy is not None:
            load_methods(spec.policy.methods)
    options = recipe.reward_options.model_copy(update={"workers": 1, "max_outage": 0.0})
    trained = recipe.trained_rewards(len(recipe.stages))
    infos: dict[str, RewardInfo] = {}
    for specs in _distinct(recipe):
        known = [spec for spec in specs if spec.code not in trained]
        with Scorer(known, options, models=recipe.reward_models) as scorer:
            infos |= scorer.infos
    return list(infos.values())


def _distinct(recipe: Recipe) -> list[list[RewardSpec]]:
    """The rewards of all stages, in lists without a name twice; one list, unless stages differ in a name."""
    stages = [spec.config for spec in recipe.stages if hasattr(spec.config, "rewards")]
    lists: list[list[RewardSpec]] = []
    for spec in [*recipe.rewards, *(spec for stage in stages for spec in stage.rewards or [])]:
        plain = spec.model_copy(update={"weight": 1.0, "only_if": None, "clip": None})
        if any(plain in own for own in lists):
            continue
        free = [own for own in lists if plain.name not in {other.name for other in own}]
        if free:
            free[0].append(plain)
        else:
            lists.append([plain])
    return lists


def _begin(recipe: Recipe, run_dir: Path, overwrite: bool) -> Path:
    start_processes()
    on_first_rank(lambda: check_folder(run_dir, overwrite=overwrite))  # before rewards take seconds to load
    rewards = _load_code(recipe)

    def open_run(lock: RunLock) -> RunState:
        make_folder(run_dir, lock, overwrite=overwrite)
        (run_dir / "recipe.yaml").write_text(dump_recipe(recipe))
        write_json(run_dir / "versions.json", versions())
        note_rewards(run_dir / REWARDS, rewards)
        state = RunState(str(Path.cwd()))
        state.write(run_dir)
        return state

    return _run(recipe, run_dir, open_run)


def _run(recipe: Recipe, run_dir: Path, open_run: Callable[[RunLock], RunState]) -> Path:
    """Run what is left to run. `open_run` is called on the first rank."""
    rank, _ = start_processes()
    try:
        with keep_servers(), StopSignals() as stop, RunLock(run_dir) as lock:
            state = on_first_rank(lambda: open_run(lock))
            with Progress(run_dir / "logs", enabled=rank == 0) as progress:
                _run_stages(recipe, run_dir, state, progress, stop)
                if rank == 0 and not state.finished:
                    _finish(recipe, run_dir, state, progress)
    except Stopped as stopped:
        text = f"Stopped by {stopped.signal}. To go on: posttrain resume {run_dir}" if rank == 0 else ""
        raise Stopped(stopped.number, text) from None
    return run_dir


def _run_stages(
    recipe: Recipe, run_dir: Path, state: RunState, progress: Progress, stop: StopSignals
) -> None:
    """Run the stages that `state` does not have yet, and add them to it."""
    rank, world = start_processes()
    model = recipe.model
    for index, spec in enumerate(recipe.stages):
        name = recipe.stage_folder(index)
        if index < len(state.stages):
            progress.skipped(name)
        else:
            stop.check()
            context = StageContext(
                recipe=recipe,
                run_dir=run_dir,
                name=name,
                kind=spec.kind,
                model=model,
                metrics=MetricsFile(run_dir / METRICS),
                show=progress.stage(name, spec.kind),
                say=progress.say,
                stop=stop,
                rank=rank,
                world=world,
            )
            result = importlib.import_module(f"posttrain.stages.{spec.kind}").run(spec.config, context)
            seconds = context.clock.seconds()
            summary = result.summary | on_first_rank(partial(decide_gate, recipe, index, run_dir))
            state.stages.append(FinishedStage(name, spec.kind, result.model, summary, seconds))
            on_first_rank(lambda: state.write(run_dir))
            progress.finished(name, summary, seconds)
        # Again for a stage that was finished before: a run that a gate has stopped stays stopped.
        on_first_rank(partial(require_passed, state.stages[index], progress.say))
        model = state.stages[index].model


def _finish(recipe: Recipe, run_dir: Path, state: RunState, progress: Progress) -> None:
    """Write the summary and the report."""
    summary = summarise(recipe, state.stages, MetricsFile(run_dir / METRICS))
    write_json(run_dir / "summary.json", summary)
    report = write_report(run_dir)
    state.finished = True
    state.write(run_dir)
    for line in closing_lines(summary):
        progress.say(line)
    progress.say(f"Report: {report}")
