"""The report of a run: one HTML file that needs nothing else, not even a network.

What the model wrote is untrusted: Jinja escapes it in the page, `embed` in the data the page's script
reads, the script only ever sets text, and the page's own policy lets no other script run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from posttrain.report import words
from posttrain.report.health import findings
from posttrain.report.pareto import pareto_charts
from posttrain.report.results import results
from posttrain.report.rollouts import Sample, distributions, sample_rollouts
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
    page = render(read_run(run_dir))
    path = run_dir / "report.html"
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
    script = "\n".join(_asset(name) for name in ("charts.js", "browser.js"))
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
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"duration": words.duration, "stage_title": words.stage_title}
    return environment.from_string(_asset("template.html")).render(
        run=run,
        facts=_facts(run),
        tiles=_tiles(run, sample),
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


def _tiles(run: Run, sample: Sample) -> list[tuple[str, str]]:
    """The run in a few numbers."""
    steps = sum(stage.steps for stage in run.stages if stage.kind == "policy")
    tiles = [
        ("Run time", words.duration(number(run.summary.get("seconds")))),
        ("Policy steps", words.count(steps) if steps else words.MISSING),
        ("Tokens sampled", words.count(run.summary.get("tokens_sampled"))),
        ("Tokens trained", words.count(run.summary.get("tokens_trained"))),
        ("Rollouts kept", words.count(sample.written) if sample.written else words.MISSING),
    ]
    return [(name, value) for name, value in tiles if value != words.MISSING]


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
