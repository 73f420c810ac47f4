"""Run a recipe: all its stages, one after the other.

The run's folder is output_dir/name. With `launch:` in the recipe, accelerate starts the processes;
`accelerate launch -m posttrain train RECIPE` does the same by hand.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from posttrain.cli.arguments import add_recipe, load
from posttrain.recipe.check import require_runnable
from posttrain.recipe.schema import LaunchConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `posttrain train`."""
    add_recipe(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run of the same name")


def run(args: argparse.Namespace) -> None:
    """Load the recipe, then run it here or hand over to accelerate."""
    loaded = load(args)
    require_runnable(loaded)
    launch(loaded.recipe.launch, sys.argv[1:])
    from posttrain.recipe.run import run_recipe

    folder = run_recipe(loaded, overwrite=args.overwrite)
    print(f"Run folder: {folder}")


def launch(options: LaunchConfig | None, argv: Sequence[str]) -> None:
    """Hand over to accelerate when the recipe asks for several processes and none has been started yet."""
    command = launch_command(options, argv, os.environ)
    if command is not None:
        os.execv(command[0], command)


def launch_command(
    launch: LaunchConfig | None, argv: Sequence[str], environment: Mapping[str, str]
) -> list[str] | None:
    """The `accelerate launch` that repeats this command in several processes.

    None when this process is to do the work itself, which includes every process that accelerate or
    torchrun has already started.
    """
    started = "LOCAL_RANK" in environment or "ACCELERATE_MIXED_PRECISION" in environment
    if launch is None or started or (launch.num_processes == 1 and launch.config_file is None):
        return None
    command = [sys.executable, "-m", "posttrain.cli.launcher"]
    if launch.config_file is not None:
        command += ["--config_file", launch.config_file]
    else:
        # Without --multi_gpu accelerate starts a single process on a machine that has no GPU, and without
        # the others it warns that it chose these very values.
        command += ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    if launch.num_processes > 1:
        command += ["--num_processes", str(launch.num_processes)]
    return [*command, "-m", "posttrain", *argv]
