"""Draw what results/NAME.json says, as docs/images/NAME.svg.

./scripts/plots            # all that have been measured
./scripts/plots masa hdpo
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS, IMAGES = ROOT / "results", ROOT / "docs" / "images"
STYLE = {
    "svg.hashsalt": "posttrain",  # the same file for the same numbers
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}

Result = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(DRAWN))
    names = parser.parse_args(arguments).names or [name for name in DRAWN if _measured(name).is_file()]
    for name in names:
        if name not in DRAWN:
            parser.error(f"{name!r} is none of {', '.join(DRAWN)}")
        if not _measured(name).is_file():
            parser.error(f"{_measured(name)} is not there; ./scripts/reproduce {name} measures it")
    for name in names:
        print(f"Drawn to {draw(name)}")


def draw(name: str) -> Path:
    """Draw one result; the picture's description is the digest of what it was drawn from."""
    content = _measured(name).read_bytes()
    with mpl.rc_context(STYLE):
        figure = DRAWN[name](json.loads(content))
        IMAGES.mkdir(exist_ok=True)
        path = IMAGES / f"{name}.svg"
        figure.savefig(path, metadata={"Date": None, "Creator": None, "Description": digest(content)})
        pyplot.close(figure)
    return path


def digest(content: bytes) -> str:
    """Of a result, as it stands in the picture."""
    return f"sha256 of the result: {hashlib.sha256(content).hexdigest()}"


def _measured(name: str) -> Path:
    return RESULTS / f"{name}.json"


# --- the pictures ----------------------------------------------------------------------------------------


def hdpo(result: Result) -> Figure:
    """Share of problems with a call by family, and accuracy, by arm."""
    figure, (calls, accuracy) = pyplot.subplots(1, 2, figsize=(9, 4), sharey=True)
    arms = {name: arm for name, arm in result["arms"].items() if "equal tokens" not in name}
    families = ("easy", "medium", "hard")
    for place, family in enumerate(families):
        _dots(calls, {name: arm[f"use/{family}"] for name, arm in arms.items()}, place, len(families), family)
    _dots(accuracy, {name: arm["accuracy"] for name, arm in arms.items()}, 0, 1, "accuracy")
    calls.set(title="completions with a call, by kind of problem", xlim=(-0.02, 1.02))
    accuracy.set(title="right answers")
    calls.legend(loc="lower center", ncols=3, bbox_to_anchor=(0.5, -0.22))
    return figure


def masa(result: Result) -> Figure:
    """Calibration over the training, accuracy by tokens, and the solutions' tokens in the efficient phase."""
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6.5))
    curves = result["curves"]
    for key, title, axis in (
        ("rate_spearman", "Spearman of predicted and true pass rates", axes[0, 0]),
        ("rate_mae", "mean absolute error of predicted pass rates", axes[0, 1]),
    ):
        for arm in ("grpo", "masa", "shuffled"):
            seeds = [[point.get(key) or 0.0 for point in curve] for curve in curves[arm]]
            _band(axis, [point["step"] for point in curves[arm][0]], seeds, arm)
        axis.set(title=title, xlabel="step")
        axis.legend()
    for arm, seeds in curves.items():
        tokens = [[(p["solution_tokens"] + p["meta_tokens"]) / 1000 for p in curve] for curve in seeds]
        means = [statistics.mean(values) for values in zip(*tokens, strict=True)]
        heights = [statistics.mean(p["pass@1"] for p in points) for points in zip(*seeds, strict=True)]
        axes[1, 0].plot(means, heights, marker="o", markersize=3, label=arm)
    axes[1, 0].set(title="accuracy, mean over seeds", xlabel="thousand tokens sampled, all kinds")
    axes[1, 0].legend()
    arms = result["arms"]
    late = {arm: [t / 1000 for t in found["solution_tokens_late"]] for arm, found in arms.items()}
    _dots(axes[1, 1], late, 0, 1, "")
    axes[1, 1].set(title="thousand solution tokens in the efficient phase", xlim=(0, None))
    return figure


def mrt(result: Result) -> Figure:
    """Accuracy where thinking is cut after so many tokens, and wasted episodes."""
    figure, (curve, waste) = pyplot.subplots(1, 2, figsize=(9, 4))
    arms = {name: arm for name, arm in result["arms"].items() if "equal tokens" not in name}
    for name, arm in arms.items():
        heights = zip(*[row["accuracy"] for row in arm["curve"]], strict=True)
        curve.plot(arm["curve"][0]["tokens"], [statistics.mean(values) for values in heights], label=name)
    curve.set(title="accuracy by tokens of thinking, mean over seeds", xlabel="tokens", ylim=(0, 1))
    curve.legend(fontsize=7)
    for place, kind in enumerate(("repeated", "fillers")):
        _dots(waste, {name: arm[kind] for name, arm in arms.items()}, place, 2, kind)
    waste.set(title="share of episodes that are wasted", xlim=(0, None))
    waste.legend()
    return figure


def reward_model(result: Result) -> Figure:
    """Held-out accuracy of the arms, a line for each seed."""
    figure, axis = pyplot.subplots(figsize=(5, 3.2))
    names = ["raw pairs, fewer steps", "raw pairs", "annotated"]
    for place, seed in enumerate(result["seeds"]):
        axis.plot(names, [result["arms"][name]["held-out accuracy"][place] for name in names],
                  marker="o", label=f"seed {seed}")  # fmt: skip
    axis.set(title="held-out accuracy of reward models")
    axis.legend()
    return figure


DRAWN: dict[str, Callable[[Result], Figure]] = {
    "hdpo": hdpo,
    "masa": masa,
    "mrt": mrt,
    "reward_model": reward_model,
}


# --- parts of pictures -----------------------------------------------------------------------------------


def _dots(axis: Axes, rows: Mapping[str, Sequence[float]], place: int, of: int, label: str) -> None:
    """A row for each arm: a dot for each seed, and a line at their mean. Several kinds lie side by side."""
    colour = f"C{place}"
    for index, values in enumerate(rows.values()):
        height = index + (place - (of - 1) / 2) * 0.22
        axis.scatter(values, [height] * len(values), s=14, color=colour, alpha=0.6,
                     label=label if index == 0 else None)  # fmt: skip
        axis.plot([statistics.mean(values)] * 2, [height - 0.1, height + 0.1], color=colour, linewidth=2)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.5, -0.5)


def _band(axis: Axes, places: Sequence[float], seeds: Sequence[Sequence[float]], label: str) -> None:
    """The mean over seeds, and from the lowest to the highest."""
    points = list(zip(*seeds, strict=True))
    (line,) = axis.plot(places, [statistics.mean(values) for values in points], label=label)
    axis.fill_between(
        places, [min(values) for values in points], [max(values) for values in points],
        color=line.get_color(), alpha=0.15, linewidth=0,
    )  # fmt: skip


if __name__ == "__main__":
    main()
