import json
from collections import Counter

import pyarrow.parquet as pq
import pytest
from rewards.scoring import make_rollouts, make_scorer
from rewards.test_registry import spec

from posttrain.cli import main
from posttrain.errors import DataError
from posttrain.rewards.rescore import Agreement, rescore
from posttrain.rollout.types import Example
from posttrain.training.record import rollout_rows, write_rollouts

CODE = """
from posttrain import reward
from posttrain.rewards.counts import count

@reward("level", version="{version}", batched=True)
def level(completions, examples):
    count("calls")
    if any(c.text == "bad" for c in completions):
        raise ValueError("boom")
    return [{value} for c, e in zip(completions, examples)]
"""
OLD = "None if c.text == 'no' else float(len(c.text))"


@pytest.fixture
def saved(tmp_path):
    """A reward's file, and the rollouts of two steps that it scored."""
    code = tmp_path / "level.py"
    code.write_text(CODE.format(version="1", value=OLD))
    rows = []
    with make_scorer({"name": "level", "from": str(code)}, workers=1) as scorer:
        for step, texts in enumerate((["a", "bb", "no", "ccc"], ["bad", "d"])):
            rollouts = make_rollouts(texts, group_size=2, level=7)
            scorer.score(rollouts, step)
            prompts = {rollout.request.example.id: "What?" for rollout in rollouts}
            rows += rollout_rows(rollouts, step=step, prompt_text=prompts)
    path = tmp_path / "run" / "rollouts" / "policy" / "step-000001.parquet"
    write_rollouts(path, rows)
    return code, path


EXAMPLES = {f"row-{n}": Example(f"row-{n}", "What?", "42", {"level": 7}) for n in range(2)}


def test_provenance_is_kept_with_every_rollout(saved):
    (version,) = set(pq.read_table(saved[1])["reward_versions"].to_pylist())
    assert json.loads(version)["level"].startswith("1 sha256:")


def test_the_same_reward_gives_the_same(saved, tmp_path):
    code, path = saved
    found = rescore(path, tmp_path / "out.parquet", spec("level", **{"from": str(code)}), EXAMPLES)
    assert found == Agreement(
        rollouts=6, equal=3, different=0, largest=0.0, old=2.0, new=2.0, gained=0, lost=0,
        errors=2, unknown=0, counts=Counter(calls=3),
    )  # fmt: skip


def test_another_version_is_compared(saved, tmp_path):
    code, path = saved
    code.write_text(CODE.format(version="2", value="None if c.text == 'bb' else e.columns['level'] / 2"))
    before = path.read_bytes()
    own = spec("level", **{"from": str(code)})
    found = rescore(path, tmp_path / "out.parquet", own, EXAMPLES)
    assert found == Agreement(
        rollouts=6, equal=0, different=2, largest=2.5, old=2.0, new=3.5, gained=1, lost=1,
        errors=2, unknown=0, counts=Counter(calls=3),
    )  # fmt: skip
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["rescored/level"].to_pylist() == [3.5, None, 3.5, 3.5, None, None]
    assert "boom" in table["rescored_error/level"].to_pylist()[4]
    assert table["rescored_version/level"].to_pylist()[0].startswith('{"level": "2 sha256:')
    assert table["reward/level"].to_pylist()[0] == 1.0
    assert path.read_bytes() == before
    with pytest.raises(DataError, match=r"out\.parquet exists already"):
        rescore(path, tmp_path / "out.parquet", own, EXAMPLES)
    # Without the data, the column is missing: unscored, not zero.
    found = rescore(path, tmp_path / "blind.parquet", own, {})
    assert (found.errors, found.unknown, found.new) == (6, 6, None)


def test_what_is_no_rollouts(tmp_path):
    (tmp_path / "a.parquet").write_text("x")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as parquet"):
        rescore(tmp_path / "a.parquet", tmp_path / "b.parquet", spec("exact_match"), {})
    write_rollouts(tmp_path / "c.parquet", [{"step": 1, "text": "a"}])
    with pytest.raises(DataError, match=r"c\.parquet has no column 'example_id'"):
        rescore(tmp_path / "c.parquet", tmp_path / "b.parquet", spec("exact_match"), {})


# --- the command


def test_score_from_the_command_line(saved, capsys):
    code, path = saved
    assert main(["rewards", "score", "level", str(path), "--from", str(code)]) == 0
    shown = capsys.readouterr().out
    assert "level: 6 rollouts, 2 of them unscored by an error now\n  3 equal, 0 different" in shown
    assert "6 examples are not in the recipe's data" in shown
    assert "  counted: 3 calls\n" in shown
    assert path.with_name("rescored-level-step-000001.parquet").is_file()
    assert main(["rewards", "score", "level", str(path), "--from", str(code)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_score_uses_the_run_s_recipe(saved, capsys, monkeypatch):
    code, path = saved
    monkeypatch.chdir(code.parent)
    rows = [{"prompt": "What?", "answer": "42", "level": 7}]
    (code.parent / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (code.parent / "run" / "recipe.yaml").write_text(
        "name: run\nmodel: {path: org/model}\ndata: {eval: {jsonl: data.jsonl}}\n"
        "rewards: [{name: level, from: level.py, weight: 0.5}]\nstages: [{evaluate: {}}]\n"
    )
    assert main(["rewards", "score", "level", str(path)]) == 0
    assert "mean 2 then, 2 now" in capsys.readouterr().out
    assert main(["rewards", "list", "run/recipe.yaml"]) == 0
    assert "level.py:5" in capsys.readouterr().out


def test_test_from_the_command_line(saved, tmp_path, capsys):
    assert main(["rewards", "test", "exact_match"]) == 0
    assert "\n  ok  gold " in capsys.readouterr().out
    code, _ = saved
    gold = tmp_path / "gold.jsonl"
    gold.write_text('{"prompt": "Say yes.", "answer": "yes", "completion": "yes"}\n')
    assert main(["rewards", "test", "level", "--from", str(code), "--data", str(gold)]) == 1
    captured = capsys.readouterr()
    assert "  FAIL  adversarial    accepted without the answer: " in captured.out
    assert captured.err == "reward 'level' failed: adversarial\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["test"], "write posttrain rewards test NAME."),
        (["score", "exact_match"], "write posttrain rewards score NAME FILE.parquet."),
        (["score", "exact_match", "no.parquet"], "there is no file no.parquet."),
        (["test", "format", "--args", "[1]"], "--args takes a JSON object, not '[1]'."),
        (["test", "exact_mach"], "did you mean 'exact_match'"),
    ],
)
def test_arguments_that_are_wrong(argv, message, capsys):
    assert main(["rewards", *argv]) == 2
    assert message in capsys.readouterr().err
