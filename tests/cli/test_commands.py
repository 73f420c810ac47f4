from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import posttrain
from posttrain.cli import COMMANDS, main
from posttrain.cli.recipes import copy_recipe
from posttrain.cli.train import launch_command
from posttrain.errors import RecipeError
from posttrain.recipe.load import LoadedRecipe, load_recipe
from posttrain.recipe.schema import LaunchConfig

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Calls of the runner, which is replaced."""
    calls: list[tuple[Any, ...]] = []

    def run_recipe(loaded: LoadedRecipe, *, overwrite: bool) -> Path:
        calls.append(("run", loaded.recipe.name, overwrite))
        return Path("runs/x")

    def evaluate_model(loaded: LoadedRecipe, *, overwrite: bool) -> Path:
        calls.append(("evaluate", loaded.recipe.model.path, overwrite))
        return Path("runs/x-evaluate")

    module = types.ModuleType("posttrain.recipe.run")
    module.run_recipe, module.evaluate_model = run_recipe, evaluate_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "posttrain.recipe.run", module)
    Path("r.yaml").write_text(
        "name: r\nmodel: {path: org/model}\nrewards: [exact_match]\n"
        "data: {eval: {task: arithmetic, size: 5, split: test}}\nstages: [{evaluate: {}}]\n"
    )
    return calls


def test_help_and_version(capsys: Capture) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"posttrain {posttrain.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: posttrain {command} ")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["trian"], "posttrain: there is no command 'trian'. Did you mean train? See posttrain --help.\n"),
        (
            ["--verson"],
            "posttrain: there is no option '--verson'. Did you mean --version? See posttrain --help.\n",
        ),
        (
            ["train", "r.yaml", "--overwite"],
            "posttrain train: there is no option --overwite. Did you mean --overwrite? "
            "See posttrain train --help.\n",
        ),
        (
            ["plan"],
            "posttrain plan: the following arguments are required: RECIPE. See posttrain plan --help.\n",
        ),
        (["plan", "nowhere.yaml"], "nowhere.yaml: there is no such recipe.\n"),
        (
            ["recipes", "show"],
            "posttrain recipes show: NAME is missing; `posttrain recipes list` has them.\n",
        ),
        (["generate", "model"], "posttrain generate: give either prompts or --prompts FILE.\n"),
        (["generate", "model", "hi", "--n", "0"], "posttrain generate: --n should be at least 1.\n"),
    ],
)
def test_bad_arguments(argv: list[str], text: str, capsys: Capture) -> None:
    assert main(argv) == 2
    assert capsys.readouterr() == ("", text)


def test_unknown_option_does_not_show_its_value(capsys: Capture) -> None:
    assert main(["train", "r.yaml", "--token=CANARY"]) == 2
    assert "CANARY" not in capsys.readouterr().err


def test_other_errors_have_their_own_exit_code(capsys: Capture) -> None:
    assert main(["report", "runs/none"]) == 1
    assert capsys.readouterr().err == "runs/none: there is no such run folder.\n"


def test_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("posttrain.cli.rewards.run", interrupt)
    assert main(["rewards", "list"]) == 130


def test_train_runs_the_recipe(runner: list[tuple[Any, ...]], capsys: Capture) -> None:
    assert main(["train", "r.yaml", "name=a", "--overwrite", "seed=3"]) == 0
    assert runner == [("run", "a", True)]
    assert capsys.readouterr().out == "Run folder: runs/x\n"


def test_evaluate_takes_another_model(runner: list[tuple[Any, ...]]) -> None:
    assert main(["evaluate", "r.yaml"]) == 0
    assert main(["evaluate", "r.yaml", "--model", "org/other", "--overwrite"]) == 0
    assert runner == [("evaluate", "org/model", False), ("evaluate", "org/other", True)]


def test_evaluate_checks_the_model(runner: list[tuple[Any, ...]], capsys: Capture) -> None:
    assert main(["evaluate", "r.yaml", "--model", "./none"]) == 2
    assert capsys.readouterr().err == "command line  model.path: there is no model folder ./none.\n"
    assert runner == []


def test_train_launches_accelerate(runner: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["posttrain", "train", "r.yaml", "launch.num_processes=2"])
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    started: list[list[str]] = []

    def execute(program: str, command: list[str]) -> None:
        started.append(command)
        raise SystemExit(0)

    monkeypatch.setattr("os.execv", execute)
    with pytest.raises(SystemExit):
        main(sys.argv[1:])
    assert started == [
        [
            *(sys.executable, "-m", "posttrain.cli.launcher", "--multi_gpu", "--num_machines", "1"),
            *("--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes", "2"),
            *("-m", "posttrain", "train", "r.yaml", "launch.num_processes=2"),
        ]
    ]
    assert runner == []


@pytest.mark.parametrize(
    ("launch", "environment", "options"),
    [
        (None, {}, None),
        (LaunchConfig(), {}, None),
        (LaunchConfig(config_file="ddp.yaml"), {}, ["--config_file", "ddp.yaml"]),
        (
            LaunchConfig(config_file="ddp.yaml", num_processes=4),
            {},
            ["--config_file", "ddp.yaml", "--num_processes", "4"],
        ),
        (LaunchConfig(num_processes=4), {"LOCAL_RANK": "0"}, None),
        (LaunchConfig(num_processes=4), {"ACCELERATE_MIXED_PRECISION": "no"}, None),
    ],
)
def test_launch_command(
    launch: LaunchConfig | None, environment: dict[str, str], options: list[str] | None
) -> None:
    command = launch_command(launch, ["train", "r.yaml"], environment)
    if options is None:
        assert command is None
    else:
        head = [sys.executable, "-m", "posttrain.cli.launcher"]
        assert command == [*head, *options, "-m", "posttrain", "train", "r.yaml"]


def test_init_writes_a_valid_recipe_once(capsys: Capture) -> None:
    assert main(["init", "new/mine.yaml"]) == 0
    assert load_recipe("new/mine.yaml").recipe.name == "my-run"
    assert main(["plan", "new/mine.yaml"]) == 0
    Path("new/mine.yaml").write_text("mine")
    assert main(["init", "new/mine.yaml"]) == 2
    assert Path("new/mine.yaml").read_text() == "mine"
    assert capsys.readouterr().err == "new/mine.yaml exists already and is not overwritten.\n"


def test_rewards_list(capsys: Capture) -> None:
    assert main(["rewards", "list"]) == 0
    assert "\nmath_answer " in capsys.readouterr().out


def test_recipes_list_show_and_copy(capsys: Capture) -> None:
    assert main(["recipes", "list"]) == 0
    assert "tiny/quickstart  " in capsys.readouterr().out
    assert main(["recipes", "show", "quickstart"]) == 0
    shown = capsys.readouterr().out
    assert main(["recipes", "copy", "quickstart", "mine.yaml"]) == 0
    assert Path("mine.yaml").read_text() == shown
    assert main(["recipes", "copy", "quickstart", "mine.yaml"]) == 2


def test_copy_takes_the_parents_along() -> None:
    Path("lib/tiny").mkdir(parents=True)
    Path("lib/base.yaml").write_text("name: base\n")
    Path("lib/tiny/a.yaml").write_text("extends: ../base.yaml\n")
    written = copy_recipe(Path("lib/tiny/a.yaml"), Path("mine/own/a.yaml"))
    assert [path.resolve() for path in written] == [
        Path("mine/own/a.yaml").resolve(),
        Path("mine/base.yaml").resolve(),
    ]
    Path("mine/own/a.yaml").unlink()
    with pytest.raises(RecipeError, match=r"base.yaml exists already"):
        copy_recipe(Path("lib/tiny/a.yaml"), Path("mine/own/a.yaml"))
    assert not Path("mine/own/a.yaml").exists()


def test_plan_as_json(runner: list[tuple[Any, ...]], capsys: Capture) -> None:
    assert main(["plan", "r.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "r"
