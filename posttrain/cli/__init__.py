"""The `posttrain` command. Each command is one module of this package, imported when it is called.

A command's module has `add_arguments(parser)`, `run(args)`, and a docstring that is its help. Help and
`plan` import no machine-learning library; typer would cost a third of their half second, so this is argparse.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from posttrain.errors import PosttrainError, RecipeError, Stopped
from posttrain.recipe.spelling import did_you_mean
from posttrain.redaction import redact

COMMANDS = {
    "init": "write a starter recipe",
    "plan": "check a recipe and show what it will do, without starting anything",
    "train": "run a recipe",
    "resume": "go on with a run that was stopped or killed",
    "evaluate": "run a recipe's evaluate stages on a model",
    "generate": "sample completions of a model",
    "report": "write the HTML report of a run, or compare two",
    "rollouts": "list the rollouts of a run, or show where one comes from",
    "rewards": "list the reward functions, try one before a run, score rollouts again",
    "recipes": "list, show or copy the recipes that come with posttrain",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    That is 0, 2 for bad input, 1 for other failures, and 128 + n for signal n.
    """
    # pydantic would look through every installed package for plugins: a tenth of a second for nothing.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        status = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except PosttrainError as error:
        print(redact(str(error)), file=sys.stderr)
        return error.exit_code
    except Stopped as stopped:
        if str(stopped):
            print(stopped, file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output (`head`, a pager) has gone; Python must not complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception:  # a defect of ours or of the user's code; the interpreter would print it as it is
        print(redact(traceback.format_exc()), file=sys.stderr, end="")
        return 1


class Parser(argparse.ArgumentParser):
    """Raises `RecipeError` with one sentence where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse for every bad argument."""
        message = message if message.endswith((".", "?")) else f"{message}."
        raise RecipeError(f"{self.prog}: {message} See {self.prog} --help.")


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    if argv[0] == "--version":
        from posttrain import __version__

        print(f"posttrain {__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        what = "option" if name.startswith("-") else "command"
        hint = did_you_mean(name, [*COMMANDS, "--help", "--version"])
        raise RecipeError(f"posttrain: there is no {what} {name!r}.{hint} See posttrain --help.")
    gc.disable()  # nothing that is imported is garbage, and looking for some takes a twentieth of `plan`
    try:
        command = importlib.import_module(f"posttrain.cli.{name}")
    finally:
        gc.enable()
    parser = Parser(
        prog=f"posttrain {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    command.run(_parse(parser, rest))
    return 0


def _parse(parser: Parser, argv: list[str]) -> argparse.Namespace:
    args, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        option = unknown[0].partition("=")[0]
        known = re.findall(r"--[\w-]+", parser.format_usage())
        parser.error(f"there is no option {option}.{did_you_mean(option, known)}")
    return args


def _help() -> str:
    commands = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    return (
        "usage: posttrain COMMAND ...\n\n"
        "Post-training for reasoning models: one recipe file, one rollout engine, one reward registry.\n\n"
        f"commands:\n{commands}\n\n"
        "posttrain COMMAND --help shows the options of a command; posttrain --version the version."
    )
