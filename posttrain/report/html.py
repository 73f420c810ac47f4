"""The report of a run, or of two side by side: one HTML file that needs nothing else, not even a network.

What the model wrote is untrusted: Jinja escapes it in the page, `embed` in the data the page's script
reads, the script only ever sets text, and the page's own policy lets no other script run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from posttrain.report import words
from posttrain.report.compare import count, different_settings, names, pairs, shared_curves
from posttrain.report.health import findings
from posttrain.report.pareto import pareto_charts
from posttrain.report.results import results
from posttrain.report.rollouts import distributions, sample_rollouts
from posttrain.report.run_folder import Run, number, read_run
from posttrain.report.self_predictions import calibration_charts
from posttrain.report.series import stage_charts
from posttrain.report.texts import memories, promoted
from posttrain.report.thinking import thinking_charts

PHASES = ("generate", "score", "update", "sync")


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from what the run folder holds, and return its path.

    Parts of the run that are missing are missing in the report.

    Raises:
        PosttrainError: `run_dir` is no run folder, or a file in it is damaged.
    """
    return _write(run_dir / "report.html", render(read_run(run_dir)))


def write_comparison(run_dir: Path, other_dir: Path) -> Path:
    """Write a page that sets a run against another, `run_dir/compare-OTHER.html`, and return its path.

    Raises:
        PosttrainError: a folder is no run folder, or a file in it is damaged.
    """
    page = render_comparison(read_run(run_dir), read_run(other_dir))
    return _write(run_dir / f"compare-{other_dir.resolve().name}.html", page)


def _write(path: Path, page: str) -> Path:
    beside = path.with_suffix(".tmp")
    beside.write_text(page, encoding="utf-8")
    beside.replace(path)
    return path


def render(run: Run) -> str:
    """The report as text."""
    sample = sample_rollouts(run)
    curves = [(stage, groups) for stage in run.stages if (groups := stage_charts(stage))]
    histograms = [(stage, panels) for stage in run.stages if (panels := distributions(stage))]
    thinking = thinking_charts(run)
    calibration = calibration_charts(run)
    pareto = pareto_charts(run)
    data = {
        "charts": [chart for _, groups in curves for group in groups for chart in group["charts"]],
        "thinking": thinking,
        "calibration": calibration,
        "pareto": pareto,
        "histograms": [panel for _, panels in histograms for panel in panels],
        "prompts": sample.prompts,
        "rollouts": sample.rows,
        "pieces": sample.pieces,
        "run": str(run.path),
    }
    return _page(
        "template.html",
        ("charts.js", "browser.js"),
        data,
        run=run,
        facts=_facts(run),
        tiles=[tile for tile in tiles(run, sample.written) if tile[1] != words.MISSING],
        results=results(run),
        findings=findings(run),
        thinking=thinking,
        calibration=calibration,
        pareto=pareto,
        curves=curves,
        histograms=histograms,
        times=_times(run),
        sample=sample,
        memories=memories(run),
        promoted=promoted(run),
        versions=run.summary.get("versions") or {},
        phases=PHASES,
    )


def render_comparison(run: Run, other: Run) -> str:
    """The page that sets `run` against `other`, as text."""
    curves = shared_curves(run, other)
    data = {"charts": [chart for _, groups in curves for group in groups for chart in group["charts"]]}
    numbers = [
        (name, value, against)
        for (name, value), (_, against) in zip(
            tiles(run, count(run)), tiles(other, count(other)), strict=True
        )
        if (value, against) != (words.MISSING, words.MISSING)
    ]
    return _page(
        "compare.html",
        ("charts.js",),
        data,
        run=run,
        other=other,
        names=names(run, other),
        numbers=numbers,
        pairs=pairs(run, other),
        settings=different_settings(run, other),
        curves=curves,
    )


def _page(template: str, scripts: Sequence[str], data: Mapping[str, Any], **parts: Any) -> str:
    script = "\n".join(_asset(name) for name in scripts)
    environment = Environment(
        loader=FunctionLoader(_asset),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": words.duration, "stage_title": words.stage_title}
    return environment.get_template(template).render(
        **parts,
        metric_name=words.metric_name,
        style=Markup(_asset("style.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=Markup(embed(data)),
    )


def embed(data: Any) -> str:
    """JSON that can stand in a script element: no character in it can end the element or begin another."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _asset(name: str) -> str:
    return resources.files("posttrain.report").joinpath(name).read_text(encoding="utf-8")


def _facts(run: Run) -> list[tuple[str, str]]:
    """What ran, on what and when."""
    machine = run.summary.get("machine")
    if isinstance(machine, Mapping):
        machine = ", ".join(f"{key} {value}" for key, value in machine.items())
    facts = [
        ("Model", (run.recipe.get("model") or {}).get("path")),
        ("Seed", run.summary.get("seed", run.recipe.get("seed"))),
        ("Machine", machine),
        ("Finished" if run.finished else "Last step", _moment(run.ended)),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _moment(time: float | None) -> str:
    return "" if time is None else f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M} UTC"


def tiles(run: Run, rollouts: int) -> list[tuple[str, str]]:
    """The run in a few numbers, those that are not known as "–"."""
    steps = sum(stage.steps for stage in run.stages if stage.kind == "policy")
    return [
        ("Run time", words.duration(number(run.summary.get("seconds")))),
        ("Policy steps", words.count(steps or None)),
        ("Tokens sampled", words.count(run.summary.get("tokens_sampled"))),
        ("Tokens trained", words.count(run.summary.get("tokens_trained"))),
        ("Rollouts kept", words.count(rollouts or None)),
    ]


@dataclass(frozen=True)
class StageTime:
    """A stage's share of the run: its bar is `width` % of the longest, cut into (phase, seconds, %)."""

    stage: str
    seconds: float
    width: float
    parts: list[tuple[str, float, float]]


def _times(run: Run) -> list[StageTime]:
    """How long each stage took, by phase. What no phase accounts for is "other"."""
    timed = [(stage, number(stage.seconds)) for stage in run.stages if number(stage.seconds) > 0]
    longest = max((seconds for _, seconds in timed), default=0.0)
    times = []
    for stage, seconds in timed:
        phases = {name: s for name, s in stage.phases.items() if not math.isnan(s) and s > 0}
        rest = seconds - sum(phases.values())
        if rest > 0.005 * seconds:
            phases["other"] = rest
        whole = sum(phases.values())
        order = sorted(phases, key=lambda name: PHASES.index(name) if name in PHASES else len(PHASES))
        parts = [(name, phases[name], 100 * phases[name] / whole) for name in order]
        times.append(StageTime(stage.name, seconds, 100 * seconds / longest, parts))
    return times
