"""What `results/soar.json` says as a page: gains and promotions, what the teachers write, arms, claims."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT, LEFT = 640, 180, 44
HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>SOAR on the string machine</title>
<style>
body{font:15px/1.5 system-ui,sans-serif;max-width:760px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}
td,th{padding:.2em .7em;border-bottom:1px solid #ddd;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}
svg{display:block;margin:.5em 0}
text{font:11px system-ui,sans-serif;fill:#555}
.no{color:#a33;font-weight:600}
</style>"""


def page(result: Mapping[str, Any]) -> str:
    """The whole page. `result` is what the reproduction has measured."""
    arms = result["arms"]
    parts = [HEAD, "<h1>SOAR on the string machine</h1>"]
    parts.append(
        "<p>Rates on hard problems that nobody was trained or rewarded on. Intervals are over problems.</p>"
    )
    parts += ["<h2>Claims</h2>", _claims(result["claims"]), "<h2>Arms</h2>", _arms(arms)]
    parts.append("<h2>Gains of students, their moving average, and promotions</h2>")
    for seed, row in enumerate(arms["soar"]):
        curves = row["curves"]
        lines = {"mean gain": curves["reward"], "moving average": curves["reward/moving_average"]}
        lines["baseline's accuracy"] = curves["baseline/accuracy"]
        parts += [f"<h3>Run {seed + 1}</h3>", _lines(lines, curves["promotion"])]
    for arm in ("soar", "intrinsic"):
        parts.append(f"<h2>What the teacher writes, {arm}</h2>")
        parts.append("<p>Kinds of questions by outer step: header and number of operations.</p>")
        parts += [_heat(row["kinds"]) for row in arms[arm]]
    return "\n".join([*parts, "</html>\n"])


def _claims(claims: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for item in claims:
        verdict = "holds" if item["holds"] else '<span class="no">does not hold</span>'
        low, high = item["interval"]
        cells = (html.escape(item["name"]), html.escape(item["goal"]))
        rows.append(
            f"<tr><td>{cells[0]}<td>{cells[1]}<td class=n>{item['measured']}<td class=n>{low} to {high}"
            f"<td>{verdict}"
        )
    return "<table><tr><th>claim<th>goal<th>measured<th>range<th>" + "".join(rows) + "</table>"


def _arms(arms: Mapping[str, Any]) -> str:
    """pass@k of every arm, the mean over seeds."""
    found: dict[str, list[Mapping[str, Any]]] = {"base model": [_base(arms["base"])]}
    found |= {"promoted student": arms["soar"], "hard-only RL": arms["hard only"]}
    for name in dict.fromkeys(name for row in arms["fresh"] for name in row if name != "questions"):
        found[f"fresh student: {name}"] = [row[name] for row in arms["fresh"] if name in row]
    keys = [key for key in found["base model"][0] if key.startswith("pass@") and "interval" not in key]
    rows = [
        f"<tr><td>{html.escape(name)}<td class=n>{len(measured)}"
        + "".join(f"<td class=n>{sum(m[key] for m in measured) / len(measured):.4f}" for key in keys)
        for name, measured in found.items()
        if measured
    ]
    head = "".join(f"<th>{key}" for key in keys)
    return f"<table><tr><th>arm<th>runs{head}" + "".join(rows) + "</table>"


def _base(measured: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("base "): value for key, value in measured.items() if key.startswith("base ")}


def _lines(curves: Mapping[str, Sequence[float | None]], marks: Sequence[float | None]) -> str:
    """Line charts over outer steps on one scale; a mark is a vertical line."""
    values = [v for curve in curves.values() for v in curve if v is not None and math.isfinite(v)]
    low, high = min([0.0, *values]), max([0.01, *values])
    count = max(len(marks) - 1, 1)

    def place(step: int, value: float) -> str:
        x = LEFT + step / count * (WIDTH - LEFT - 10)
        return f"{x:.1f},{HEIGHT - 20 - (value - low) / (high - low) * (HEIGHT - 40):.1f}"

    drawn = [f'<svg width="{WIDTH}" height="{HEIGHT}">']
    for step, mark in enumerate(marks):
        if mark:
            x = place(step, low).split(",")[0]
            drawn.append(
                f'<line x1="{x}" x2="{x}" y1="20" y2="{HEIGHT - 20}" stroke="#d9a" stroke-width="2"/>'
            )
    for index, (name, curve) in enumerate(curves.items()):
        colour = ("#9bbce0", "#1f5fa8", "#3a8f4f")[index % 3]
        points = " ".join(place(step, value) for step, value in enumerate(curve) if value is not None)
        drawn.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        drawn.append(
            f'<text x="{LEFT + 170 * index}" y="12" style="fill:{colour}">{html.escape(name)}</text>'
        )
    drawn.append(f'<text x="2" y="{HEIGHT - 20}">{low:.3f}</text><text x="2" y="30">{high:.3f}</text></svg>')
    return "".join(drawn)


def _heat(steps: Sequence[Mapping[str, int]]) -> str:
    """Shares of kinds (rows) in every outer step (columns); the darker the more."""
    kinds = sorted({kind for counts in steps for kind in counts})
    size, width = 16, max((WIDTH - LEFT) // max(len(steps), 1), 2)
    drawn = [f'<svg width="{WIDTH}" height="{size * len(kinds) + 4}">']
    for row, kind in enumerate(kinds):
        drawn.append(f'<text x="2" y="{size * row + 12}">{html.escape(kind)}</text>')
        for column, counts in enumerate(steps):
            share = counts.get(kind, 0) / max(sum(counts.values()), 1)
            drawn.append(
                f'<rect x="{LEFT + column * width}" y="{size * row}" width="{width - 1}" height="{size - 1}" '
                f'fill="#1f5fa8" fill-opacity="{share:.3f}"/>'
            )
    return "".join([*drawn, "</svg>"])
