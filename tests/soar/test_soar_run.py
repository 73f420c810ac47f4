"""Whole SOAR runs of a tiny model: what is trained, what is kept, and going on after a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from talker import FORMAT, make_talker, write_recipe

from posttrain.errors import DataError
from posttrain.recipe.load import load_recipe
from posttrain.recipe.run import resume_run, run_recipe
from posttrain.recipe.run_state import RunState
from posttrain.soar.learner import Learner


class Killed(BaseException):
    """What a test ends a run with: nothing catches it."""


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    return make_talker(tmp_path_factory.mktemp("talker"))


@pytest.fixture
def recipe(talker, tmp_path):
    """Writes a recipe and loads it; arguments change the section `soar`."""
    return lambda name="run", **changes: load_recipe(write_recipe(tmp_path, talker, name, **changes))


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key != "time" and not key.startswith("seconds/")}
        for line in lines
        if line["kind"] == "soar"
    ]


def assert_same_run(one: Path, other: Path) -> None:
    """Same models, bit for bit, same metrics, same proposals."""
    for part in ("01-soar", "01-soar-teacher"):
        ours, theirs = (load_file(run / "models" / part / "model.safetensors") for run in (one, other))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), part
    assert metrics(one) == metrics(other)
    for path in sorted((one / "rollouts" / "01-soar").iterdir()):
        assert pq.read_table(path) == pq.read_table(other / "rollouts" / "01-soar" / path.name), path.name
    rows = [pq.read_table(run / "data/01-soar/rows.parquet") for run in (one, other)]
    assert rows[0] == rows[1]


def test_a_run_killed_among_students_goes_on_as_if_it_had_not_been(recipe, monkeypatch):
    """Killed in the last student of outer step 2, then at the teacher's update of step 3."""
    whole = run_recipe(recipe("whole"))
    assert [line["promotion"] for line in metrics(whole)] == [0.0, 1.0, 0.0]
    assert [line["student/steps"] for line in metrics(whole)] == [2.0, 2.0, 3.0]
    calls, update = {"made": 0, "kill": 17}, Learner.update

    def counted(self, *args):
        calls["made"] += 1
        if calls["made"] == calls["kill"]:
            raise Killed
        return update(self, *args)

    monkeypatch.setattr(Learner, "update", counted)
    loaded = recipe("killed")
    # An outer step is 4 students of 2 updates and one update of the teacher: the 17th is in the last student.
    with pytest.raises(Killed):
        run_recipe(loaded)
    folder = Path(loaded.recipe.output_dir) / "killed"
    assert [path.name for path in (folder / "checkpoints/01-soar").glob("step-*")] == ["step-000001"]
    # The last student (2); the first again, since it is promoted and its weights were lost (2); the teacher
    # (1); four students of 3 updates (12): killed at the teacher's update.
    calls.update(made=0, kill=18)
    with pytest.raises(Killed):
        resume_run(load_recipe(folder / "recipe.yaml"), folder)
    calls.update(made=0, kill=0)
    resume_run(load_recipe(folder / "recipe.yaml"), folder)
    assert calls["made"] == 1  # no student was trained twice
    assert_same_run(whole, folder)


def adapter_is_trained(folder: Path) -> bool:
    weights = load_file(folder / "adapter_model.safetensors")
    assert all("lora_" in name for name in weights)
    return any(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)


def test_adapters_are_slots_on_one_base_and_the_intrinsic_teacher_trains_no_student(recipe):
    lora = {"lora": {"r": 2, "alpha": 4}}
    promoting = {"threshold": -2.0, "window": 1}
    folder = run_recipe(recipe("adapters", model=lora, steps=9, max_student_updates=1, promotion=promoting))
    assert [line["student/updates"] for line in metrics(folder)] == [8]  # the budget is used up after a step
    assert adapter_is_trained(folder / "models/01-soar")
    kept = pq.read_table(folder / "data/01-soar/rows.parquet").to_pylist()
    assert len(kept) == 3
    assert {row["step"] for row in kept} == {1}

    changes = {"reward": "learnability", "learnability_samples": 8, "promotion": {"enabled": False}}
    own = run_recipe(recipe("own", model=lora, steps=1, **changes))
    (line,) = metrics(own)
    assert 0 < line["reward"] < 1
    assert line["student/updates"] == 0
    assert line["teacher/kl"] == pytest.approx(0, abs=1e-6)  # at the first update it is its own reference
    assert adapter_is_trained(own / "models/01-soar-teacher")
    assert not adapter_is_trained(own / "models/01-soar")  # handed on as it was


def test_the_hard_subset_is_what_is_never_solved_and_is_gone_on_with(recipe, monkeypatch):
    import posttrain.stages.hard_subset as stage

    before = [{"hard_subset": {"samples": 6, "first": 2, "problems_at_a_time": 5}}]
    data = {"stage": "hard_subset", "format": "text"}
    never, parts = stage.never_solved, []

    def killed(*args):
        parts.append(args[2])
        if len(parts) == 3:
            raise Killed
        return never(*args)

    monkeypatch.setattr(stage, "never_solved", killed)
    loaded = recipe("hard", before=before, data=data, steps=1)
    with pytest.raises(Killed):
        run_recipe(loaded)
    folder = Path(loaded.recipe.output_dir) / "hard"
    resume_run(load_recipe(folder / "recipe.yaml"), folder)
    assert [len(part) for part in parts] == [5, 5, 5, 5, 3]  # the third was lost, the first two were not
    written = [pq.read_table(folder / "data/01-hard_subset" / name).to_pylist()
               for name in ("rows.parquet", "rows-test.parquet")]  # fmt: skip
    lines = (folder / "journal/01-hard_subset/problems-0.jsonl").read_text().split("\n")
    outcomes = [json.loads(line) for line in lines[1:]]
    hard = [outcome for outcome in outcomes if outcome["right"] == 0]
    assert len(outcomes) == 18
    assert 2 <= len(hard) < 18
    assert sum(map(len, written)) == len(hard)
    assert abs(len(written[0]) - len(written[1])) <= 1
    assert not {row["prompt"] for row in written[0]} & {row["prompt"] for row in written[1]}
    assert all(outcome["drawn"] == 6 for outcome in hard)
    assert {outcome["drawn"] for outcome in outcomes} <= {2, 6}
    assert RunState.read(folder).finished


def test_a_teacher_that_cannot_be_read_skips_the_step(recipe, capsys):
    teacher = {"prompt": "T:", "max_tokens": 2, "max_draws": 2, "format": FORMAT}
    folder = run_recipe(recipe("mute", steps=2, teacher=teacher))
    lines = metrics(folder)
    assert [line["student/updates"] for line in lines] == [0, 0]
    assert lines[0]["teacher/drawn"] == 12
    assert lines[0]["teacher/readable"] == 0
    assert "only 0 of 6 proposals could be read" in capsys.readouterr().out
    assert len(pq.read_table(folder / "data/01-soar/rows.parquet")) == 0


def test_too_few_hard_problems(recipe):
    before = [{"hard_subset": {"samples": 1, "first": 1}}]
    loaded = recipe("easy", before=before, data={"stage": "hard_subset"})
    one = loaded.recipe.data.train.model_copy(update={"limit": 1})
    data = loaded.recipe.data.model_copy(update={"train": one})
    with pytest.raises(DataError, match="two halves need at least 2"):
        run_recipe(replace(loaded, recipe=loaded.recipe.model_copy(update={"data": data})))
