"""The reward functions that a recipe can name: built in, or from installed packages.

A recipe may also name a function of its own: `package.module:function` or `path/to/file.py:function`.
"""

from __future__ import annotations

import argparse

from posttrain.cli.arguments import one_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `posttrain rewards`."""
    parser.add_argument("action", metavar="list", type=one_of(["list"]))


def run(args: argparse.Namespace) -> None:
    """List the rewards with what they do."""
    from posttrain.rewards.registry import known_rewards

    rewards = known_rewards()
    width = max(map(len, rewards))
    for name, info in rewards.items():
        print(f"{name:<{width}}  {info.doc or info.origin}")
