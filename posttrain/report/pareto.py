"""Charts of metric `pareto`: what ways to spend several samples of a problem reach, and at what cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from posttrain.report.run_folder import Run
from posttrain.report.series import rounded


def pareto_charts(run: Run) -> list[dict[str, Any]]:
    """For every evaluation with it: accuracy against compute and against latency, compute by difficulty."""
    found = [(e["stage"], e["pareto"]) for e in run.summary.get("evaluations") or [] if e.get("pareto")]
    charts = []
    for stage, measured in found:
        where = f": {stage}" if len(found) > 1 else ""
        charts += [
            _against(measured, "compute", f"Accuracy against compute{where}", "Tokens of all samples"),
            _against(measured, "latency", f"Accuracy against latency{where}", "Tokens one after another"),
            _effort(measured["effort"], f"Compute by difficulty{where}"),
        ]
    return charts


def _against(measured: Mapping[str, Any], cost: str, title: str, about: str) -> dict[str, Any]:
    families: dict[str, list[Mapping[str, Any]]] = {}
    for point in measured["points"]:
        families.setdefault(point["family"], []).append(point)
    lines = []
    for family, points in families.items():
        points = sorted(points, key=lambda point: float(point[cost]))
        lines.append(
            {
                "label": family,
                "x": [round(float(point[cost]), 2) for point in points],
                "raw": rounded(np.array([point["accuracy"]["value"] for point in points], float)),
                "settings": [point["setting"] for point in points],
                "smooth": [],
            }
        )
    best = [
        f"{line['label']} up to {max(line['raw']):.1%} at {line['x'][line['raw'].index(max(line['raw']))]}"
        for line in lines
    ]
    return {
        "title": title,
        "about": f"{about}, in units of a problem's mean sample; every point is one setting.",
        "form": "percent",
        "wide": False,
        "points": True,
        "lines": lines,
        "unit": f"{cost} in samples",
        "summary": f"{title}. {'; '.join(best)}.",
    }


def _effort(effort: Mapping[str, Any], title: str) -> dict[str, Any]:
    places = [round(level, 3) for level in effort["difficulty"]]
    lines = [
        {"label": label, "x": places, "raw": rounded(np.array(values, float)), "smooth": []}
        for label, values in effort["compute"].items()
    ]
    parts = [f"{line['label']} from {line['raw'][0]:.2g} to {line['raw'][-1]:.2g} samples" for line in lines]
    return {
        "title": title,
        "about": f"Mean samples that the utility spends, by {effort['measure']}.",
        "form": "number",
        "wide": False,
        "points": True,
        "lines": lines,
        "unit": effort["measure"],
        "summary": f"{title}. {'; '.join(parts)}.",
    }
