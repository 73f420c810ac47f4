"""Write the HTML report of a run from what its folder holds."""

from __future__ import annotations

import argparse
from pathlib import Path

from posttrain.errors import PosttrainError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `posttrain report`."""
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run, e.g. runs/quickstart")


def run(args: argparse.Namespace) -> None:
    """Write the report and say where it is."""
    if not args.run.is_dir():
        raise PosttrainError(f"{args.run}: there is no such run folder.")
    from posttrain.report.html import write_report

    print(f"Report: {write_report(args.run)}")
