"""Arguments that several commands share."""

from __future__ import annotations

import argparse


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The recipe file and the overrides behind it."""
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe file")
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        default=[],
        help="set a value of the recipe, e.g. rollout.max_tokens=64 or stages.policy.steps=10",
    )
