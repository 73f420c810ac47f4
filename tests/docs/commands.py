"""Whether a documented command is one that exists, with options that it has. Nothing is started."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path

import yaml

from posttrain.cli import COMMANDS, Parser
from posttrain.errors import RecipeError
from posttrain.recipe.library import find_recipe
from posttrain.recipe.load import load_recipe
from posttrain.recipe.plan import make_plan
from posttrain.training.trackers import FOLDER

ROOT = Path(__file__).resolve().parents[2]
HARMLESS = ("export", "source", "cd", "echo", "mkdir", ".venv/bin/pre-commit")
"""Commands that say nothing about posttrain."""


def check_command(line: str) -> None:
    """Fail unless the command is known and takes its arguments."""
    for before in (r"^srun (.*)$", r"^bash -c '(.*)'$", r"^(.*?) \|\| echo .*$"):
        line = re.sub(before, r"\1", line)
    line = re.sub(r"\$[A-Z_]+", "1", line)
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    assert words, line
    program, *arguments = words
    if program == "posttrain":
        check_posttrain(arguments)
    elif program == "accelerate":
        check_accelerate(arguments)
    elif program == "vllm":
        check_vllm(arguments)
    elif program in OTHERS:
        OTHERS[program](arguments)
    elif program.startswith("./scripts/"):
        check_script(Path(program).name, arguments)
    else:
        assert program in HARMLESS, f"nobody knows how to check {line!r}"


def parse_posttrain(arguments: list[str]) -> argparse.Namespace:
    """Parse the arguments of a posttrain command as it would."""
    name, *rest = arguments
    assert name in COMMANDS, name
    command = importlib.import_module(f"posttrain.cli.{name}")
    parser = Parser(prog=f"posttrain {name}", allow_abbrev=False)
    command.add_arguments(parser)
    return parser.parse_intermixed_args(rest)


def check_posttrain(arguments: list[str]) -> None:
    """Arguments and recipe: a recipe that is there is planned, offline and without starting anything."""
    args = parse_posttrain(arguments)
    recipe = getattr(args, "recipe", None)
    if recipe is None or not hasattr(args, "overrides"):
        return
    try:
        make_plan(load_recipe(find_recipe(recipe), args.overrides))
    except RecipeError as error:
        if not only_about_this_machine(error):
            raise


def only_about_this_machine(error: RecipeError) -> bool:
    """Whether all that is wrong with a recipe is what a reader has and this machine has not."""
    missing = r"is not installed|needs? posttrain\[|there is no (file|model folder|dataset folder) "
    return all(re.search(missing, line) for line in str(error).splitlines())


def check_accelerate(arguments: list[str]) -> None:
    """accelerate's own parser, and what it is to start."""
    from accelerate.commands.launch import launch_command_parser

    args = launch_command_parser().parse_args(arguments[1:])
    assert arguments[0] == "launch"
    if args.config_file is not None and "…" not in args.config_file:
        assert yaml.safe_load((ROOT / args.config_file).read_text())["num_processes"] >= 1
    assert args.module
    assert args.training_script == "posttrain"
    check_posttrain(args.training_script_args)


def check_vllm(arguments: list[str]) -> None:
    """`vllm serve` with options that the suite starts the real vLLM with."""
    known = "".join((ROOT / path).read_text() for path in VLLM_OPTIONS)
    assert arguments[0] == "serve"
    for option in (word for word in arguments if word.startswith("--")):
        assert option in known or option.removeprefix("--").replace("-", "_") in known, option
    for number, word in enumerate(arguments):
        if word == "--worker-extension-cls":
            module, _, name = arguments[number + 1].rpartition(".")
            assert f"class {name}" in Path(ROOT, *module.split(".")).with_suffix(".py").read_text()


VLLM_OPTIONS = (
    "posttrain/rollout/serve.py",
    "posttrain/rollout/vllm_options.py",
    "posttrain/rollout/vllm_server.py",
    "tests/integration/vllm_servers.py",
)
"""Files with the options that the suite starts the real vLLM with."""


@cache
def _extras() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return set(project["optional-dependencies"])


def check_pip(arguments: list[str]) -> None:
    """`pip install -e .` with extras that there are."""
    assert arguments[:2] == ["install", "-e"]
    (extras,) = re.findall(r"^\.(?:\[([\w,-]+)\])?$", arguments[2])
    assert set(filter(None, extras.split(","))) <= _extras(), arguments[2]


def check_uvicorn(arguments: list[str]) -> None:
    """An application in a file that the page has written."""
    module, _, name = arguments[0].partition(":")
    assert re.search(rf"^{name} = FastAPI\(", Path(f"{module}.py").read_text(), re.MULTILINE)


def check_python(arguments: list[str]) -> None:
    """One of the examples, with settings that it has."""
    code = (ROOT / arguments[0]).read_text()
    for option in (word for word in arguments if word.startswith("--")):
        assert re.search(rf"^    {option.removeprefix('--').replace('-', '_')}: ", code, re.MULTILINE), option


def check_script(name: str, arguments: list[str]) -> None:
    """A script that there is; of those that take names, a name that it knows; else values of its recipe."""
    script = ROOT / "scripts" / name
    assert script.stat().st_mode & 0o111, name
    folder = {"reproduce": "reproductions", "bench": "benchmarks"}.get(name)
    if folder and arguments:
        assert (ROOT / "scripts" / folder / f"{arguments[0].replace('-', '_')}.py").is_file(), arguments
    if name == "quickstart":
        check_posttrain(["train", "recipes/tiny/quickstart.yaml", *arguments])


def check_tensorboard(arguments: list[str]) -> None:
    """The folder that the tracker writes to."""
    assert arguments == ["--logdir", f"runs/my-run/{FOLDER}/tensorboard"], arguments


OTHERS = {
    "pip": check_pip,
    "uvicorn": check_uvicorn,
    "python": check_python,
    "tensorboard": check_tensorboard,
}
"""Programs of others, by name."""
