"""Rollouts as a tree, the texts of their tokens, and what methods leave behind."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic_run import FORKED, policy_line, write_forks
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel, Metaspace
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel as Alphabet

from posttrain.report.html import render
from posttrain.report.panels import method_groups
from posttrain.report.rollouts import distributions, sample_rollouts
from posttrain.report.run_folder import read_run
from posttrain.report.series import stage_charts
from posttrain.report.texts import memories, promoted
from posttrain.report.tokens import Pieces, pieces_of
from posttrain.report.tree import Branch, branches, family_of
from posttrain.training.record import write_rollouts


def row(prompt, completion, name="a", group="g", parent=None):
    ids = {"prompt_ids": prompt, "completion_ids": completion}
    return {"rollout_id": name, "group": group, "parent": parent, **ids}


def test_branches_leave_the_one_they_have_most_in_common_with():
    rows = [
        row([1, 2], [3, 4, 5, 6]),
        row([1, 2], [3, 4, 7]),
        row([1, 2, 3, 4, 9], [8]),
        row([1, 2], [3, 4, 7, 7]),
    ]
    assert branches(rows) == [
        Branch(None, 0, 0, 4),
        Branch(0, 2, 2, 3),
        Branch(0, 2, 3, 4),  # forked after two tokens, with one that it was given
        Branch(1, 3, 3, 4),
    ]
    assert branches([row([1, 2], [3]), row([5, 6], [3])])[1] == Branch(None, 0, 0, 1)  # another prompt


def test_a_family_has_forks_of_forks():
    rows = [row([], [], "a"), row([], [], "b", "h"), row([], [], "c", "f", "a"), row([], [], "d", "f", "c")]
    assert family_of(rows, "g") == [0, 2, 3]
    assert family_of(rows, "h") == [1]


def test_pieces_are_what_tokens_add_to_the_text():
    letters = sorted(Alphabet.alphabet())
    model = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    model.pre_tokenizer, model.decoder = Alphabet(add_prefix_space=False), ByteLevel()
    ids = model.encode("a é!").ids
    assert Pieces(model).of(ids) == ["a", " ", "", "é", "!"]
    assert Pieces(model).of(ids[:3]) == ["a", " ", "\ufffd"]  # ends within a character
    words = Tokenizer(BPE({"▁to": 0, "▁be": 1}, []))
    words.decoder = Metaspace()
    assert Pieces(words).of([0, 1]) == [" to", " be"]


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forked")
    (folder / "recipe.yaml").write_text("name: forked\nmodel: {path: nowhere/at-all}\nstages: []\n")
    rows = write_forks(folder)
    path = folder / "rollouts" / FORKED / "step-000001.parquet"
    base = {"parent": None, "forked_at": None, "channel_weights": "{}", "advantage/outcome": None}
    base |= {"advantage/progress": None, "status": "unused: in no channel of the loss"}
    text = "Add the tens first."
    others = [
        {
            "rollout_id": f"7.a/analysis/{i}",
            "group": "7.a",
            "role": "analysis",
            "index": i,
            "completion": said,
        }
        for i, said in enumerate((text, "No idea."))
    ]
    replay = {"rollout_id": "7.r/replay/0", "group": "7.r", "role": "replay", "index": 0, "reward": 0.0}
    others.append(
        replay | {"prompt": f"{text} What is 1+1?", "status": "trained: as a text of term experience"}
    )
    write_rollouts(path, rows + [{**rows[0], **base, **other} for other in others])
    return folder


def test_forked_groups_are_shown_whole_with_every_other_role(forked):
    sample = sample_rollouts(read_run(forked))
    assert {row["role"] for row in sample.rows} == {"solution", "probe", "analysis", "replay"}
    family = [row for row in sample.rows if row["family"] == "7" and row["role"] in ("solution", "probe")]
    assert len(family) == 7
    probe = next(row for row in family if row["forkedAt"] == 20)
    assert (probe["parent"], probe["branch"]) == ("7/solution/0", [0, 20, 20, 26])
    assert sample.rows[0]["weights"] == {"outcome": 1.0, "progress": 0.5}
    assert sample.pieces[str(ord("F"))] == "F"
    (reward, _) = distributions(read_run(forked).stages[0])
    assert reward["means"] == [pytest.approx(1.1 / 3, abs=1e-4)]  # of the three scored solutions alone


def test_memories_are_told_with_what_became_of_them(forked):
    first, second = memories(read_run(forked))
    assert (first.text, first.verdict) == ("Add the tens first.", "learned: replay 0")
    assert second.verdict == "not replayed"
    page = render(read_run(forked))
    assert "learned: replay 0" in page
    assert "Memories of errors" in page


def test_questions_of_promoted_sets(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"stages": [{"stage": "01-soar", "kind": "soar"}]}))
    (tmp_path / "data/01-soar").mkdir(parents=True)
    rows = [{"prompt": "1+1=<b>", "answer": "2", "step": 3}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data/01-soar/rows.parquet")
    (question,) = promoted(read_run(tmp_path))
    assert (question.step, question.question, question.answer) == (3, "1+1=<b>", "2")
    assert "1+1=&lt;b&gt;" in render(read_run(tmp_path))


def test_every_method_has_panels(tmp_path):
    metrics = ("mel/kept", "mrt/progress", "hdpo/tool_use/easy", "amft/mu", "masa/rate_true", "promotions")
    line = policy_line(np.random.default_rng(0), "01-policy", 1, 1)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line | dict.fromkeys(metrics, 0.5)) + "\n")
    (stage,) = read_run(tmp_path).stages
    titles = {group["title"] for group in stage_charts(stage)}
    assert {title for title, _ in method_groups(stage)} <= titles
    assert "Other metrics" not in titles
    assert pieces_of(read_run(tmp_path)) is None
