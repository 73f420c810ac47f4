"""Measure a claim over several seeds and write it to results/NAME.json.

./scripts/reproduce quickstart                 # seeds 0, 1, 2; about three minutes each
./scripts/reproduce quickstart --seeds 3 4 5
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.recipe.load import dump_recipe, load_recipe
from posttrain.recipe.run import run_recipe
from posttrain.training.record import write_json

ROOT = Path(__file__).resolve().parent.parent


def run_seed(recipe: str, seed: int) -> dict[str, Any]:
    """What the summary of one run of a tiny recipe says; a run of the same recipe that is there counts."""
    name = f"reproduce-{recipe}-{seed}"
    loaded = load_recipe(ROOT / "recipes" / "tiny" / f"{recipe}.yaml", [f"seed={seed}", f"name={name}"])
    folder = Path(loaded.recipe.output_dir) / name
    finished = (folder / "summary.json").is_file()
    if not finished or (folder / "recipe.yaml").read_text() != dump_recipe(loaded.recipe):
        run_recipe(loaded, overwrite=True)
    return json.loads((folder / "summary.json").read_text())


def claim(name: str, goal: str, values: Sequence[float], holds: bool) -> dict[str, Any]:
    """A claim over seeds: the mean, the range, and whether it holds on every seed."""
    return {
        "name": name,
        "goal": goal,
        "measured": round(statistics.mean(values), 4),
        "interval": [round(min(values), 4), round(max(values), 4)],
        "interval_kind": "range over seeds",
        "holds": holds,
    }


def quickstart(seeds: Sequence[int]) -> dict[str, Any]:
    """Sampled and greedy accuracy before and after GRPO, on problems the model has not seen."""
    summaries = [run_seed("quickstart", seed) for seed in seeds]

    def values(stage: int, metric: str) -> list[float]:
        return [summary["evaluations"][stage]["metrics"][metric]["value"] for summary in summaries]

    before, after = values(0, "pass@1"), values(-1, "pass@1")
    greedy_before, greedy_after = values(0, "greedy"), values(-1, "greedy")
    gains = [b - a for a, b in zip(greedy_before, greedy_after, strict=True)]
    training = [
        sum(stage["seconds"] for stage in summary["stages"] if stage["kind"] != "evaluate")
        for summary in summaries
    ]
    return {
        "budgets": {"tokens_sampled": [summary["tokens_sampled"] for summary in summaries]},
        "arms": {
            "warm start": {"pass@1": before, "greedy": greedy_before},
            "grpo": {"pass@1": after, "greedy": greedy_after},
        },
        "seconds": {"training": training, "all": [summary["seconds"] for summary in summaries]},
        "versions": summaries[0]["versions"],
        "claims": [
            claim("sampled accuracy after the warm start", "< 0.45", before, max(before) < 0.45),
            claim("sampled accuracy after GRPO", "> 0.70", after, min(after) > 0.70),
            claim("gain in greedy accuracy", ">= 0.10", gains, min(gains) >= 0.10),
        ],
    }


MEASUREMENTS = {"quickstart": quickstart}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=MEASUREMENTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    measured = MEASUREMENTS[options.name](options.seeds)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    result = {
        "method": options.name,
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {_processor()}",
        "seeds": options.seeds,
        **measured,
    }
    path = ROOT / "results" / f"{options.name}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, result)
    for item in measured["claims"]:
        verdict = "holds" if item["holds"] else "DOES NOT HOLD"
        print(f"{item['name']}: goal {item['goal']}, {item['measured']} over {item['interval']}: {verdict}")
    print(f"Written to {path.relative_to(ROOT)}")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
    return f"{len(names)} × {names[0]}"


if __name__ == "__main__":
    main()
