"""Votes of models that have not seen a pair, and what becomes of the pairs; training itself is left out."""

from __future__ import annotations

import json
import signal
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import make_tiny_model

from posttrain.data.preferences import load_pairs
from posttrain.errors import DataError, Stopped
from posttrain.recipe.schema import DataSource, Recipe
from posttrain.stages import annotate_preferences
from posttrain.stages.context import StageContext
from posttrain.training.record import MetricsFile
from posttrain.training.stop import StopSignals

ROWS = [
    {"prompt": f"{n % 8}+?=", "chosen": str(n), "rejected": str(n + 1), "flipped": n < 6} for n in range(24)
]


class Voter:
    """Stands for a trained model: its gap is -2 for the first six pairs and 1 for the others, give or take.

    Remembers which pairs it was trained on and which it voted on.
    """

    made: ClassVar[list[Voter]] = []

    def __init__(self, model, tokenizer, pairs, stage, *, seed, **options):
        self.seen = {str(pair["chosen_ids"]) for pair in pairs}
        self.seed = seed
        Voter.made.append(self)

    def rewards(self, pairs):
        self.asked = {str(pair["chosen_ids"]) for pair in pairs}
        noise = np.random.default_rng(self.seed).normal(0, 0.1, len(pairs))
        gaps = np.array([-2.0 if pair["number"] < 6 else 1.0 for pair in pairs]) + noise
        return np.stack([gaps, np.zeros(len(pairs))], axis=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def annotate(model, tmp_path, monkeypatch):
    """Runs the stage with the options given; returns the folder of its data and the summary."""
    encode = annotate_preferences.encode_pairs

    def numbered(pairs, *arguments):
        encoded = encode(pairs, *arguments)
        return [{**row, "number": int(pair.chosen)} for row, pair in zip(encoded, pairs, strict=True)]

    monkeypatch.setattr(annotate_preferences, "encode_pairs", numbered)
    monkeypatch.setattr(annotate_preferences, "train_reward_model", Voter)
    monkeypatch.setattr(Voter, "made", [])

    def run(name="run", rows=ROWS, show=lambda step, of, metrics: None, **options):
        source = tmp_path / "pairs.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        stage = {"data": {"jsonl": str(source)}, "members": 3, **options}
        recipe = Recipe(name=name, model={"path": str(model)}, stages=[{"annotate_preferences": stage}])
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        context = StageContext(
            recipe=recipe,
            run_dir=folder,
            name="01-annotate_preferences",
            kind="annotate_preferences",
            model=recipe.model,
            metrics=MetricsFile(folder / "metrics.jsonl"),
            show=show,
            say=lambda text: None,
            stop=StopSignals(),
        )
        result = annotate_preferences.run(recipe.stages[0].config, context)
        assert result.model == recipe.model
        return folder / "data" / "01-annotate_preferences", result.summary["preferences"]

    return run


def rows_of(folder):
    return pq.read_table(folder / "rows.parquet").to_pylist()


def test_nobody_votes_on_what_it_has_seen(annotate):
    folder, _ = annotate(folds=3)
    assert len(Voter.made) == 3 * 3
    for voter in Voter.made:
        assert not voter.seen & voter.asked
        assert len(voter.seen | voter.asked) == len(ROWS)
    for member in range(3):
        asked = [voter.asked for voter in Voter.made[3 * member : 3 * member + 3]]
        assert sum(map(len, asked)) == len(set().union(*asked)) == len(ROWS)
    assert len({voter.seed for voter in Voter.made}) == 9
    for row in rows_of(folder):
        same = [other for other in rows_of(folder) if other["prompt"] == row["prompt"]]
        assert all(other["fold"] == row["fold"] for other in same)


def test_one_fold_is_no_cross_fitting(annotate):
    annotate(folds=1)
    assert len(Voter.made) == 3
    assert all(voter.seen == voter.asked and len(voter.seen) == len(ROWS) for voter in Voter.made)


def test_rows_summary_and_audit(annotate):
    folder, summary = annotate(audit=4)
    rows = {int(row["chosen"]): row for row in rows_of(folder)}
    assert len(rows) == 24
    for number, row in rows.items():
        wrong = number < 6
        assert row["pref_mean"] == pytest.approx(np.mean(row["votes"]))
        assert row["pref_std"] == pytest.approx(np.std(row["votes"]))
        assert row["pref_mean"] == pytest.approx(-2 if wrong else 1, abs=0.3)
        assert (row["suspect"], row["weight"], row["target"], row["margin"]) == (wrong, 1 - wrong, 1, 0)
        assert row["flipped"] == wrong
    assert summary["suspect"] == summary["flipped"] == 6
    assert summary["negative_share"] == 0.25
    assert summary["auc"] == summary["precision"] == summary["recall"] == 1.0
    listed = json.loads((folder / "summary.json").read_text())["suspects"]
    assert sorted(place.rpartition(":")[2] for place in listed) == ["1", "2", "3", "4", "5", "6"]
    audit = [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]
    assert len(audit) == 4
    assert all(int(row["chosen"]) < 6 and row["pref_mean"] < -1 for row in audit)


def test_what_it_writes_can_be_trained_on(annotate):
    """Numbers survive, the rows have no answer column, and suspects have weight 0."""
    folder, _ = annotate(treatment="smooth_margin", share=0.25, alpha=0.1)
    pairs = load_pairs(DataSource(parquet=str(folder / "rows.parquet")))
    suspect = [pair for pair in pairs if pair.target != 1.0]
    assert sorted(int(pair.chosen) for pair in suspect) == [0, 1, 2, 3, 4, 5]
    assert all(pair.target == 0.9 and pair.margin < -1 and pair.weight == 1 for pair in suspect)


def test_stopped_between_models_and_resumed(annotate):
    """What has been trained is not trained again, and the rows are those of a run that was not stopped."""
    straight, _ = annotate("straight")

    def stop(step, of, metrics):
        if step == 2:
            raise Stopped(signal.SIGTERM)

    with pytest.raises(Stopped):
        annotate("stopped", show=stop)
    before = len(Voter.made)
    resumed, _ = annotate("stopped")
    assert len(Voter.made) - before == 6 - 2
    assert rows_of(resumed) == rows_of(straight)
    lines = MetricsFile(resumed.parents[1] / "metrics.jsonl").lines()
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all({"accuracy", "gap"} <= line.keys() for line in lines)


@pytest.mark.parametrize(
    ("rows", "options", "problem"),
    [
        (
            [*ROWS, {**ROWS[0], "target": 0.5}],
            {},
            ":25: the target is 0.5 already, and annotate_preferences",
        ),
        (ROWS, {"folds": 9}, "annotate_preferences: 9 folds need as many different prompts; there are 8"),
    ],
)
def test_refused(annotate, rows, options, problem):
    with pytest.raises(DataError, match=problem):
        annotate(rows=rows, **options)
