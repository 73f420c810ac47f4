"""Every fenced block of the documentation is executed or checked, in the order in which a reader meets it."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from docs.blocks import PAGES, Block, alternatives, blocks_of, commands, fences
from docs.commands import HARMLESS, check_command, only_about_this_machine
from helpers import make_tiny_model
from integration import test_rewards_page

from posttrain.cli import main
from posttrain.errors import RecipeError
from posttrain.methods.base import load_methods
from posttrain.recipe.check import require_runnable
from posttrain.recipe.load import load_recipe
from posttrain.recipe.schema import Recipe, ToolsConfig
from posttrain.rewards import registry
from posttrain.rollout.tools import environment_factory, schemas_of
from posttrain.zip_rc.grid import Grid

ROOT = Path(__file__).resolve().parents[2]
HOME: dict[str, Any] = {
    "name": "home",
    "model": {"path": "Qwen/Qwen2.5-0.5B-Instruct"},
    "data": {
        "train": {"task": "arithmetic", "size": 20, "split": "train"},
        "eval": {"task": "arithmetic", "size": 20, "split": "test"},
    },
    "rollout": {"max_tokens": 48},
    "rewards": ["math_answer"],
    "reward_models": {"preference": {"path": "somebody/preference"}},
    "stages": [{"policy": {"steps": 200, "prompts_per_step": 8}}],
}
"""The recipe that fragments are put into."""
FILES = {
    "base.yaml": "description: parent\n",
    "data/train.jsonl": json.dumps({"question": "1+1=", "solution": "2"}),
    "docs.jsonl": json.dumps({"title": "Ada", "text": "Ada Lovelace was a mathematician."}),
    "demonstrations.jsonl": json.dumps({"prompt": "1+1=", "answer": "2", "trace": "2"}),
    "pairs.jsonl": json.dumps({"prompt": "1+1=", "chosen": "2", "rejected": "3"}),
    "held_out.jsonl": json.dumps({"prompt": "2+1=", "chosen": "3", "rejected": "2"}),
    "my_rewards.py": "def concise(completion, example, budget=1):\n    return 1.0\n",
    "my_tools.py": 'def lookup(name: str) -> str:\n    """Look up.\n\n    Args:\n        name: N.\n    """\n',
    "my.yaml": yaml.safe_dump(HOME),
}
"""What a reader is taken to have; a page that writes a file of such a name writes its own."""
IN_SMALL = {
    "zip_rc.md": (
        ('path="runs/zip_rc/models/03-zip_rc"', 'path="foreseeing"'),
        ('engine="vllm"', 'engine="transformers"'),
        ("max_tokens=1024", "max_tokens=12"),
        ("interval=64", "interval=8"),
    )
}
"""What programs on a page have in place of a model of a real size."""
ELSEWHERE = {test_rewards_page.PAGE: "tests/integration/test_rewards_page.py"}
"""Pages that a test follows from the first block to the last, with real processes."""
TUTORIAL = ROOT / "docs" / "first_run.md"
_runs: dict[tuple[str, ...], tuple[str, Path]] = {}
"""What runs have printed, and a copy of their folders, by arguments and recipe."""
GRID = Grid(first_id=200, reward_values=(0.0, 0.5, 1.0), length_edges=(0, 8, 16, 32))
Capture = pytest.CaptureFixture[str]


class Reader:
    """Somebody who follows a page in a folder with the clone's files and what the page has written."""

    def __init__(self, folder: Path, model: Path, capsys: Capture):
        self.folder, self.model, self.capsys = folder, model, capsys
        self.names: dict[str, Any] = {}
        self.printed = self.printed_by_quickstart = ""
        for name in ("recipes", "examples", "results", "scripts", "docs"):
            (folder / name).symlink_to(ROOT / name)
        (folder / "data").mkdir()
        (folder / "data" / "tiny-reasoner").symlink_to(ROOT / "data" / "tiny-reasoner")
        for name, content in FILES.items():
            (folder / name).write_text(content + "\n")

    def meets(self, block: Block) -> None:
        """Do what the block asks for."""
        {"python": self.python, "yaml": self.yaml, "bash": self.bash}.get(block.language, self.shown)(block)

    # --- python ---------------------------------------------------------------------------------------

    def python(self, block: Block) -> None:
        if block.test:
            self.names |= given(block.test.removeprefix("with "), self.model)
        if block.file:
            with Path(block.file).open("a" if block.continues else "w") as file:
                file.write(block.code)
        text = block.code
        for real, small in IN_SMALL.get(block.page.name, ()):
            text = text.replace(real, small)
        exec(compile(text, str(block), "exec"), self.names)
        self.printed = self.capsys.readouterr().out

    # --- yaml -----------------------------------------------------------------------------------------

    def yaml(self, block: Block) -> None:
        if block.file or block.code.startswith("name: "):
            Path(block.file or "my.yaml").write_text(block.code)
        for number, fragment in enumerate(alternatives(block.code)):
            path = Path(f"fragment-{block.line}-{number}.yaml")
            path.write_text(whole(fragment))
            self.check_recipe(path)

    def check_recipe(self, path: Path) -> None:
        """Everything that `plan` looks at, and what it cannot look at without running the recipe's code."""
        loaded = load_recipe(path)
        try:
            require_runnable(loaded)
        except RecipeError as error:
            if not only_about_this_machine(error):
                raise
        for stage in loaded.recipe.stages:
            if stage.policy is not None:
                load_methods(stage.policy.methods)
        if loaded.recipe.tools is not None:
            check_tools(loaded.recipe.tools)

    # --- bash -----------------------------------------------------------------------------------------

    def bash(self, block: Block) -> None:
        self.run_documents(block)
        verb, *rest = block.test.split() or ["check"]
        if rest == ["with", "forecasts"]:
            foresee(self.model)
        elif rest == ["with", "a", "run"]:
            self.quickstart()
        if verb == "check":
            for command in commands(block.code):
                if not self.is_refused(command):
                    check_command(command)
            return
        assert verb == "run", block.test
        overrides = [word for word in rest if "=" in word]
        for command in commands(block.code):
            words = shlex.split(command, comments=True)
            if words[0] in HARMLESS:
                continue
            assert words[0] == "posttrain", command
            if words[1] == "train":
                self.train([*words[2:], *overrides])
                continue
            status = main(words[1:])
            captured = self.capsys.readouterr()
            self.printed = captured.out + captured.err
            assert (status != 0) == (rest == ["fails"]), self.printed

    def train(self, arguments: list[str]) -> None:
        """Run a recipe; of the same one with the same arguments an earlier reader's run is taken."""
        key = (*arguments, Path(arguments[0]).read_text())
        if key in _runs:
            self.printed, runs = _runs[key]
            shutil.copytree(runs, "runs", dirs_exist_ok=True)
            return
        status = main(["train", *arguments])
        captured = self.capsys.readouterr()
        assert status == 0, captured.err
        self.printed = captured.out
        _runs[key] = self.printed, shutil.copytree("runs", self.folder / "runs-of-this")

    def quickstart(self) -> str:
        """What the quickstart prints: it is run as the first tutorial has it, which is in small."""
        if not self.printed_by_quickstart:
            shutil.copy("recipes/tiny/quickstart.yaml", "first.yaml")
            (block,) = (b for b in blocks_of(TUTORIAL) if b.code.startswith("posttrain train first.yaml"))
            self.bash(block)
            Path("first.yaml").unlink()
            self.printed_by_quickstart = re.sub(r"\bfirst\b", "quickstart", self.printed)
        return self.printed_by_quickstart

    def run_documents(self, block: Block) -> None:
        """Write the files that a block writes by here-documents."""
        for script in re.findall(r"^cat > [\w.]+ <<'END'$.*?^END$", block.code, re.DOTALL | re.MULTILINE):
            subprocess.run(["bash", "-e", "-c", script], check=True)

    def is_refused(self, command: str) -> bool:
        """Whether the command is `posttrain plan … || echo TEXT`; then what it prints is remembered."""
        found = re.fullmatch(r"posttrain (plan .*) \|\| echo \"(.*)\"", command)
        if found is None:
            return False
        assert main(shlex.split(found[1])) == 2
        self.printed = self.capsys.readouterr().err + found[2] + "\n"
        return True

    # --- everything else ------------------------------------------------------------------------------

    def shown(self, block: Block) -> None:
        verb, _, rest = block.test.partition(" ")
        if block.language == "json":
            json.loads("{" + block.code.replace(", …", "") + "}")
        elif block.language == "toml":
            tomllib.loads(block.code)
        elif block.test == "output of the quickstart":
            check_output(block.code, self.quickstart())
        elif block.test == "mistake of the recipe":
            self.check_mistake(block)
        elif verb == "output":
            check_output(block.code, self.printed)
        elif verb == "folder":
            check_folder(block.code, Path(rest))
        elif verb == "layout":
            check_layout(block.code)
        elif verb == "asserted":
            check_asserted(block.code, ROOT / rest.removeprefix("by "))
        else:
            pytest.fail(f"{block}: a block without a language needs a comment that says what it shows")

    def check_mistake(self, block: Block) -> None:
        """A message about the recipe on its page, with one key of it misspelt."""
        recipe = Path("my.yaml").read_text()
        misspelt = re.sub(r"optimizer: .*", "learnin_rate: 1e-5", recipe)
        assert misspelt != recipe
        Path("misspelt.yaml").write_text(misspelt)
        with pytest.raises(RecipeError) as caught:
            load_recipe("misspelt.yaml")
        check_output(block.code, str(caught.value).replace("misspelt.yaml", "my.yaml"))


def given(what: str, model: Path) -> dict[str, Any]:
    """Names that a program on a page goes on from."""
    from transformers import AutoTokenizer

    from posttrain.recipe.schema import RolloutConfig
    from posttrain.rollout.types import Completion, Example, Rollout, RolloutRequest, Sampling

    example = Example("row", "12+30=", "42")
    if what == "a model":
        return {"model": str(model)}
    if what == "a run":
        return {"run": "runs/first"}
    if what == "scored rollouts":
        request = RolloutRequest((5, 6), example, "0.0", Sampling(4, n=4))
        completion = Completion((7, 8), (-1.0, -1.0), "stop", "42")
        return {"rollouts": [Rollout(request, completion, i, 0, reward=float(i % 2)) for i in range(4)]}
    foresee(model)
    ids = tuple(AutoTokenizer.from_pretrained(model)("12+30=")["input_ids"])
    names: dict[str, Any] = {"ids": ids, "example": example, "Sampling": Sampling}
    names |= {"RolloutRequest": RolloutRequest, "rollout": RolloutConfig()}
    assert what in ("forecasts", "a model with forecasts"), what
    if what == "a model with forecasts":
        from posttrain.recipe.schema import ModelConfig

        names["model"] = ModelConfig(path="foreseeing")
    return names


def foresee(model: Path) -> None:
    """A folder `foreseeing` with a model that has forecasts."""
    if Path("foreseeing").exists():
        return
    shutil.copytree(model, "foreseeing")
    config = json.loads(Path("foreseeing/config.json").read_text())
    Path("foreseeing/config.json").write_text(json.dumps(config | {"zip_rc": GRID.to_config()}))


def whole(fragment: str) -> str:
    """A recipe around a fragment: keys of a recipe, a list of stages, or `methods` of a policy stage."""
    content = yaml.safe_load(fragment)
    indented = "".join(f"      {line}\n" for line in fragment.splitlines())
    if isinstance(content, list):
        fragment, content = f"stages:\n{indented}", {"stages": content}
    elif set(content) == {"methods"}:
        stage = "  - policy:\n      steps: 200\n      prompts_per_step: 8\n"
        fragment, content = f"stages:\n{stage}{indented}", {"stages": content}
    assert set(content) <= {*Recipe.model_fields, "extends"}, f"{sorted(content)} are no keys of a recipe"
    return yaml.safe_dump({key: value for key, value in HOME.items() if key not in content}) + fragment


def check_tools(config: ToolsConfig) -> None:
    """Tools load, and can be described to a model."""
    schemas_of(environment_factory(config)().tools)


def masked(line: str) -> str:
    """A line without its numbers, quotes of paths and spaces in a row."""
    return re.sub(r"\s+", " ", re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "#", line)).strip()


def check_output(shown: str, printed: str) -> None:
    """Every line that is shown was printed, in this order, numbers aside."""
    lines = iter(masked(line) for line in printed.splitlines())
    for line in shown.splitlines():
        wanted = masked(line)
        assert wanted in ("", "…") or any(found == wanted for found in lines), (
            f"{line!r} is not in\n{printed}"
        )


def check_folder(listing: str, folder: Path) -> None:
    """Every path of a listing is there; STAGE is any stage. What only some runs have is made by others."""
    for line in listing.splitlines()[1:]:
        name = line.split()[0]
        found = list(folder.glob(name.replace("STAGE", "*")))
        assert found or name.startswith(("checkpoints/", "bad_batches/", "cache/", "logs/")), name


def check_layout(tree: str) -> None:
    """Every file and folder that the tree names is there, and it names every package of posttrain."""
    package = ROOT / "posttrain"
    files = {path.stem for folder in (package, ROOT / "scripts") for path in folder.rglob("*.*")}
    named = re.findall(r"\b(\w+)\.(?:py|js|css|yaml)\b", tree)
    assert set(named) <= files, set(named) - files
    folders = {path.name for path in package.iterdir() if (path / "__init__.py").is_file()}
    assert folders <= set(re.findall(r"^  (\w+)/", tree, re.MULTILINE)), folders


def check_asserted(text: str, file: Path) -> None:
    """A test in the file looks for a long enough piece of the text."""
    literals = [
        node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)
    ]
    pieces = [masked(value) for value in literals if isinstance(value, str) and len(value) >= 25]
    assert any(piece in masked(text) for piece in pieces), file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def reader(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Iterator[Reader]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    for name in ("STYLE_TOKEN", "JUDGE_API_KEY"):
        monkeypatch.setenv(name, "a-token-of-this-test")
    registry.known_rewards()
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))  # a page's rewards are forgotten
    before = set(sys.modules), list(sys.path)
    yield Reader(tmp_path, model, capsys)
    sys.path[:] = before[1]
    for name in set(sys.modules) - before[0]:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(
            (str(tmp_path), str(ROOT / "examples"))
        ):
            del sys.modules[name]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in ELSEWHERE], ids=lambda page: page.stem
)
def test_a_page(page: Path, reader: Reader) -> None:
    for block in blocks_of(page):
        try:
            reader.meets(block)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{block} does not do what it says: {error}\n{block.code}") from error


def test_no_block_is_overlooked() -> None:
    for page in PAGES:
        assert 2 * len(list(blocks_of(page))) == fences(page), page
    assert sum(len(list(blocks_of(page))) for page in PAGES) > 80


def test_pages_that_are_followed_elsewhere_are() -> None:
    for page, test in ELSEWHERE.items():
        code = (ROOT / test).read_text()
        assert f'PAGE = ROOT / "docs" / "{page.name}"' in code
        assert any(name.startswith("test_") for name in _functions(code))
        languages = {block.language for block in blocks_of(page)} - {""}
        assert languages <= {"python", "yaml", "bash", "toml"}  # the branches that the test has


def _functions(code: str) -> list[str]:
    return [node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize(
    ("language", "code", "test", "told"),
    [
        ("yaml", "rollout: {max_tokns: 3}\n", "", "Did you mean max_tokens"),
        ("yaml", "methods:\n  - masa: {group_sise: 3}\n", "", "no such option"),
        ("yaml", "batch_size: 3\n", "", "no keys of a recipe"),
        ("bash", "posttrain trian my.yaml\n", "", "trian"),
        ("bash", "posttrain train my.yaml stages.policy.stpes=3\n", "", "Did you mean steps"),
        ("bash", "posttrain resume runs/x --fast\n", "", "--fast"),
        ("bash", "accelerate launch --config_file x -m posttrain train my.yaml\n", "", "No such file"),
        ("bash", "accelerate launch --machine_rank x -m posttrain train my.yaml\n", "", "2"),
        ("bash", "vllm serve MODEL --no-such-option\n", "", "--no-such-option"),
        ("bash", "pip install -e '.[vlm]'\n", "", "vlm"),
        ("bash", "./scripts/reproduce nothing\n", "", "nothing"),
        ("bash", "frobnicate\n", "", "nobody knows"),
        ("bash", "posttrain plan my.yaml\n", "run fails", ""),
        ("python", "undefined_name\n", "", "not defined"),
        ("json", '"a": \n', "", "Expecting value"),
        ("", "something\n", "", "needs a comment"),
        ("", "what nobody printed\n", "output", "is not in"),
    ],
)
def test_a_wrong_block_is_found(language: str, code: str, test: str, told: str, reader: Reader) -> None:
    block = Block(ROOT / "docs" / "none.md", 1, language, code, test)
    with pytest.raises((Exception, SystemExit, pytest.fail.Exception)) as caught:
        reader.meets(block)
    assert told in str(caught.value)
