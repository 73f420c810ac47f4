"""Measure posttrain against what it is compared with, side by side in one run.

./scripts/bench train-step                  # one bench; several names or `all` work, too
./scripts/bench all --repeats 1 --dry-run   # runs everything once and writes nothing
./scripts/bench train-step train-memory whole-step --device cuda

Every number is a ratio, ours ÷ theirs, of two things that took turns: A, B, A, B. On a CPU the measure is CPU
seconds of one thread, which hardly depend on what else the machine does; still, a result is only written when
the machine was idle at the start. Each bench asserts that both sides computed the same.

On a GPU (--device cuda) the measure is seconds, the model has the shape of Qwen2.5-0.5B and computes in
bfloat16. That path has not been run yet: there was no GPU to run it on.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from benchmarks.harness import BENCHES, CUDA_BENCHES, MAX_LOAD, Settings, machine, show, write


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="+", choices=[*BENCHES, "all"], metavar="NAME", help=", ".join(BENCHES)
    )
    parser.add_argument("--repeats", type=int, help="pairs of runs; each bench has its own default")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--allow-load", action="store_true", help=f"with a load average above {MAX_LOAD}")
    parser.add_argument("--dry-run", action="store_true", help="print the table, write nothing")
    options = parser.parse_args()
    names = list(BENCHES) if "all" in options.names else options.names
    if options.device == "cuda" and not set(names) <= set(CUDA_BENCHES):
        parser.error(f"--device cuda is for {', '.join(CUDA_BENCHES)}")

    start = machine(options.device)
    if start["load_average"] > MAX_LOAD and not options.allow_load:
        sys.exit(
            f"The load average is {start['load_average']}, above {MAX_LOAD}: nothing is measured on a busy "
            "machine. --allow-load does it all the same and records it."
        )
    settings = Settings(options.repeats, options.device, options.seed)
    for name in names:
        bench = importlib.import_module(f"benchmarks.{BENCHES[name]}")
        comparisons = bench.compare(settings)
        show(name, bench.__doc__, comparisons)
        if not options.dry_run:
            path = write(name, bench.__doc__, comparisons, settings, start)
            print(f"Written to {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
