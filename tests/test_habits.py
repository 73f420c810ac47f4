"""Habits of the code base that no linter checks."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "posttrain").rglob("*.py"))
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80


def name(path):
    return path.relative_to(ROOT).as_posix()


def imported_modules(path):
    """Top-level packages that a file imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


def test_files_are_short():
    lengths = {name(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {path: length for path, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_functions_are_short():
    lengths = {
        f"{name(path)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert lengths
    assert {function: length for function, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize(
    ("package", "home"),
    [
        ("vllm", {"posttrain/rollout/vllm.py", "posttrain/rollout/transfer.py"}),
        ("trl", {"posttrain/stages/sft.py", "posttrain/stages/dpo.py", "posttrain/stages/reward_model.py"}),
        ("deepspeed", {"posttrain/rollout/weights.py"}),
    ],
)
def test_heavy_packages_are_imported_in_one_file(package, home):
    assert {name(path) for path in SOURCES if package in imported_modules(path)} <= home


@pytest.mark.parametrize("module", ["posttrain", "posttrain.recipe.schema", "posttrain.cli"])
def test_light_imports(module):
    heavy = ("torch", "transformers", "trl", "vllm", "deepspeed", "datasets", "pandas")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_changelog_names_the_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.search(rf"^## .*\b{re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_scripts_are_executable_and_stop_at_errors():
    files = (*(ROOT / "scripts").iterdir(), ROOT / ".ci" / "run")
    scripts = [path for path in files if path.suffix == "" and path.is_file()]
    assert {"setup", "test"} <= {script.name for script in scripts}
    for script in scripts:
        text = script.read_text()
        assert script.stat().st_mode & 0o111, name(script)
        assert text.startswith("#!/usr/bin/env "), name(script)
        if text.startswith("#!/usr/bin/env bash\n"):
            assert "set -euo pipefail" in text, name(script)
