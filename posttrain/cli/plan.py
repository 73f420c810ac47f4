"""Check a recipe and show what it will do: stages, steps, tokens, memory, disk, the source of each value.

Nothing is started, downloaded or written.
"""

from __future__ import annotations

import argparse
import json

from posttrain.cli.arguments import add_recipe, load
from posttrain.recipe.plan import format_plan, make_plan, plan_to_dict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `posttrain plan`."""
    add_recipe(parser)
    parser.add_argument("--all", action="store_true", help="show default values too")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def run(args: argparse.Namespace) -> None:
    """Print the plan."""
    plan = make_plan(load(args))
    print(json.dumps(plan_to_dict(plan), indent=2) if args.json else format_plan(plan, all_values=args.all))
