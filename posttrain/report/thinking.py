"""Charts of evaluations in which thinking was cut short."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from posttrain.evaluation.regret import VOTES
from posttrain.report.run_folder import Run
from posttrain.report.series import rounded

BRANCHES = 5
"""Episodes after which votes are drawn, spread evenly."""


def thinking_charts(run: Run) -> list[dict[str, Any]]:
    """Accuracy and regret against tokens, one line for each evaluation, and the last one's votes."""
    found = {e["stage"]: e["thinking"] for e in run.summary.get("evaluations") or [] if e.get("thinking")}
    if not found:
        return []
    charts = [
        _against_tokens(
            found, "accuracy", "Accuracy against tokens", "If it had to answer after so many tokens."
        ),
        _against_tokens(
            found,
            "regret",
            "Regret against tokens",
            "1 minus the mean accuracy up to so many: what an answer right from the first would not lose.",
        ),
    ]
    stage, last = list(found.items())[-1]
    if len(last["votes"]) > 1:
        charts.append(_votes(stage, last))
    return charts


def _against_tokens(found: Mapping[str, Any], key: str, title: str, about: str) -> dict[str, Any]:
    lines = [
        _line(stage, [int(place) for place in curves["tokens"]], curves[key])
        for stage, curves in found.items()
    ]
    ends = "; ".join(f"{line['label']} {line['raw'][-1]:.3g}" for line in lines)
    summary = f"{title}. At {max(line['x'][-1] for line in lines)} tokens: {ends}."
    return _chart(title, about, lines, "tokens", summary)


def _votes(stage: str, curves: Mapping[str, Any]) -> dict[str, Any]:
    """Thinking on, and from some episodes on instead votes of 2, 4 and 8, each more charged as an episode."""
    votes, size = curves["votes"], curves["episodes_per_group"]
    alone = [row[0] for row in votes]
    lines = [_line("thinking on", [size * place for place in range(len(votes))], alone)]
    for place in np.unique(np.linspace(0, len(votes) - 1, BRANCHES).round().astype(int)).tolist():
        points = [
            (size * place + count - 1, value)
            for count, value in zip(VOTES, votes[place], strict=True)
            if value is not None
        ]
        if len(points) > 1:
            lines.append(_line(f"voting from {size * place}", *map(list, zip(*points, strict=True))))
    title = "Thinking on against voting"
    about = f"Accuracy by episodes in {stage}. Where votes are above the line, they would be the better use."
    summary = f"{title}. Without thinking {alone[0]:.3g}, after all episodes {alone[-1]:.3g}."
    return _chart(title, about, lines, "episodes", summary)


def _line(label: str, places: Sequence[Any], values: Sequence[Any]) -> dict[str, Any]:
    return {"label": label, "x": list(places), "raw": rounded(np.array(values, float)), "smooth": []}


def _chart(title: str, about: str, lines: list[dict[str, Any]], unit: str, summary: str) -> dict[str, Any]:
    return {
        "title": title,
        "about": about,
        "form": "percent",
        "wide": False,
        "lines": lines,
        "unit": unit,
        "summary": summary,
    }
