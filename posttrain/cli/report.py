"""Write the HTML report of a run from what its folder holds, or a page that sets it against another run.

The comparison has both runs' curves in the same charts, the settings that differ, and what evaluations of the
same problems gained or lost, with paired intervals.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from posttrain.errors import PosttrainError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `posttrain report`."""
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run, e.g. runs/quickstart")
    parser.add_argument(
        "--compare",
        metavar="OTHER",
        type=Path,
        help="folder of a run to compare with: RUN/compare-OTHER.html",
    )


def run(args: argparse.Namespace) -> None:
    """Write the report, or the comparison, and say where it is."""
    for folder in (args.run, args.compare):
        if folder is not None and not folder.is_dir():
            raise PosttrainError(f"{folder}: there is no such run folder.")
    from posttrain.report.html import write_comparison, write_report

    if args.compare is None:
        print(f"Report: {write_report(args.run)}")
    else:
        print(f"Comparison: {write_comparison(args.run, args.compare)}")
