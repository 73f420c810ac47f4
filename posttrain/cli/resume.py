"""Go on with a run that was stopped or killed.

Finished stages are not run again; the one that was interrupted goes on from its newest checkpoint, or from
its beginning when it has none. The recipe is the one in the run's folder.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from posttrain.cli.train import launch
from posttrain.errors import RecipeError
from posttrain.recipe.load import load_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `posttrain resume`."""
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder, e.g. runs/my-run")


def run(args: argparse.Namespace) -> None:
    """Load the run's recipe, then go on here or hand over to accelerate."""
    from posttrain.recipe.run_state import RunState

    state = RunState.read(args.run)
    if state.finished:
        print(f"The run in {args.run} is finished.")
        return
    folder = args.run.resolve()
    # The recipe's relative paths, and those in the state, start where the run was started.
    try:
        os.chdir(state.directory)
    except OSError as error:
        started = f"{args.run} was started in {state.directory}"
        raise RecipeError(f"{started}, which cannot be entered: {error.strerror}") from None
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    loaded = load_recipe(folder / "recipe.yaml")
    launch(loaded.recipe.launch, ["resume", str(folder)])
    from posttrain.recipe.run import resume_run

    print(f"Run folder: {resume_run(loaded, folder)}")
