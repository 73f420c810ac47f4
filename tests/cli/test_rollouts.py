"""`posttrain rollouts`: every token's provenance, without any ML library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_run import FORKED, write_forks, write_run

from posttrain.cli import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("rollouts") / "run", steps=2, problems=3, samples=2)
    write_forks(folder)
    return folder


def ask(capsys: Capture, *argv: object) -> str:
    assert main(["rollouts", *map(str, argv)]) == 0
    return capsys.readouterr().out


def refused(capsys: Capture, *argv: object) -> str:
    assert main(["rollouts", *map(str, argv)]) > 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_trained_rollout(run: Path, capsys: Capture) -> None:
    text = ask(capsys, "show", run, "7/solution/1", "--stage", FORKED)
    for expected in (
        "trained, at optimiser step 1",
        "version 1, which counts the engine's syncs of weights",
        f"seed {2**62 + 701}, temperature 1, at most 96 tokens",
        "none: it begins with the prompt",
        "advantage 0.6, weight 1",
        "from 0 to 0.25, weight 0.5",
        "(version 1@0c5d)",
        "written by the policy",
        "experience/1.0.0, a text of term experience",
    ):
        assert expected in text
    first = ask(capsys, "show", run, "7/solution/0", "--stage", FORKED)
    assert "2 of role probe after token 8" in first
    assert "1 of role probe after token 20" in first


def test_single_tokens(run: Path, capsys: Capture) -> None:
    text = ask(capsys, "show", run, "7/solution/1", "--stage", FORKED, "--tokens")
    header, first, *_, last = text[text.index("token  id") :].splitlines()
    names = ["token", "id", "text", "log-prob", "trained", "outcome", "progress", "weighted", "sum"]
    assert header.split() == names
    assert first.split()[:3] == ["0", str(ord("F")), '"F"']
    assert first.split()[4:] == ["yes", "0.6", "0", "0.6"]
    assert last.split()[-4:] == ["yes", "0.6", "0.25", "0.725"]
    learned = ask(capsys, "show", run, "experience/1.0.0", "--tokens")
    assert learned.splitlines()[-1].split()[-1] == "0.0625"
    assert "7/solution/1" in learned


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("7/solution/1/drawn-1", "dropped: unscored: math_answer: timeout, step 1"),
        ("7/solution/0@20/probe/0", "unused: in no channel of the loss, step 1"),
        ("7/solution/0@20/probe/0", "of 7/solution/0, after 20 tokens of its completion"),
        ("10004/solution/0", "dropped: equal rewards, step 1"),
    ],
)
def test_what_was_not_trained_on_says_why(run: Path, capsys: Capture, name: str, expected: str) -> None:
    assert expected in ask(capsys, "show", run, name)


def test_lists(run: Path, capsys: Capture) -> None:
    assert len(ask(capsys, "list", run).splitlines()) == 22
    forked = ask(capsys, "list", run, "--stage", FORKED)
    assert len(forked.splitlines()) == 8
    probes = ask(capsys, "list", run, "--role", "probe", "--from", "1").splitlines()[1:]
    assert [line.split()[0] for line in probes] == ["7/solution/0@8/probe/1", "7/solution/0@20/probe/0"]
    dropped = ask(capsys, "list", run, "--status", "dropped: unscored").splitlines()[1:]
    assert {line.split()[1] for line in dropped} == {"03-policy", FORKED}
    assert len(ask(capsys, "list", run, "--text", "let me CHECK", "--limit", "3").splitlines()) == 5
    assert ask(capsys, "list", run, "--step", "99") == "No rollout is like that.\n"
    evaluated = ask(
        capsys, "list", run, "--stage", "02-evaluate", "--role", "greedy", "--example", "arithmetic-1"
    )
    assert "evaluated, " in evaluated


def test_what_cannot_be_found(run: Path, tmp_path: Path, capsys: Capture) -> None:
    assert "there is no such run folder" in refused(capsys, "list", tmp_path / "none")
    assert "is not a run folder" in refused(capsys, "list", tmp_path)
    assert "Did you mean 7/solution/0/drawn-1?" not in refused(capsys, "show", run, "xyz")
    assert "Did you mean 7/solution/1/drawn-1?" in refused(capsys, "show", run, "7/solution/1/drawn-2")
    assert "no rollouts of a stage 'x'; there are those of 02-evaluate, 03-policy" in refused(
        capsys, "list", run, "--stage", "x"
    )
    assert "in 02-evaluate, 04-evaluate. --stage and --step say which" in refused(
        capsys, "show", run, "1/solution/0"
    )
    assert "ID is missing" in refused(capsys, "show", run)
    assert "can narrow down an id" in refused(capsys, "show", run, "1/solution/0", "--role", "probe")
    (tmp_path / "metrics.jsonl").write_text("")
    assert "holds no rollouts" in refused(capsys, "list", tmp_path)


def test_no_ml_library_is_imported(run: Path) -> None:
    code = (
        "import sys\nfrom posttrain.cli import main\n"
        f"main(['rollouts', 'show', {str(run)!r}, 'experience/1.0.0', '--tokens'])\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'trl', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
