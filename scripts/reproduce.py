"""Measure a claim over several seeds and write it to results/NAME.json.

./scripts/reproduce quickstart                 # its own seeds; what is measured already is kept
./scripts/reproduce quickstart --seeds 3 4 5
./scripts/reproduce quickstart --fast          # one seed, minutes, numbers that mean nothing: is it in order?
"""

from __future__ import annotations

import argparse
import importlib
import math
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reproductions import common

from posttrain.errors import PosttrainError
from posttrain.training.record import write_json

NAMES = sorted(
    path.stem
    for path in Path(common.__file__).parent.glob("*.py")
    if path.stem not in ("common", "tiny_models", "__init__") and not path.stem.endswith("_world")
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--fast", action="store_true", help="the smallest run; writes to the folder runs")
    options = parser.parse_args(arguments)
    reproduction = importlib.import_module(f"reproductions.{options.name}")
    seeds = options.seeds or list(reproduction.SEEDS)
    seeds = seeds[:1] if options.fast else seeds
    try:
        measured = reproduction.measure(seeds, options.fast)
    except PosttrainError as error:
        raise SystemExit(f"{options.name}: {error}") from None
    result = {
        "method": options.name,
        "commit": _git("rev-parse", "HEAD"),
        "machine": f"{platform.machine()}, {_processor()}",
        "seeds": seeds,
        **measured,
    }
    folder = common.RUNS if options.fast else common.ROOT / "results"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{options.name}{'-fast' if options.fast else ''}.json"
    write_json(path, _strict(result))
    for item in measured["claims"]:
        verdict = "holds" if item["holds"] else "DOES NOT HOLD"
        print(f"{item['name']}: goal {item['goal']}, {item['measured']} over {item['interval']}: {verdict}")
    print(f"Written to {path}")


def _strict(value: Any) -> Any:
    """The same without NaN and infinities, which JSON has not: None instead."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _git(*command: str) -> str:
    found = subprocess.run(["git", *command], capture_output=True, text=True, cwd=common.ROOT, check=True)
    return found.stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
    return f"{len(names)} × {names[0]}"


if __name__ == "__main__":
    main()
