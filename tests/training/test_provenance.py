"""What the run folder says about every rollout and every supervised text of a step."""

from __future__ import annotations

import json
from dataclasses import replace

import pyarrow.parquet as pq

from posttrain.methods.base import Channel, LossTerm
from posttrain.rollout.engine import fork_requests
from posttrain.rollout.types import Completion, Example, Rollout, RolloutBatch, RolloutRequest, Sampling
from posttrain.training.collect import Collected
from posttrain.training.provenance import StepRecord, glimpses, statuses, step_rows, supervised_records
from posttrain.training.record import write_rollouts

EXAMPLE = Example("sum", "1+1=", "2")


def rollout(index, ids=(5, 6, 7), reward=1.0, role="solution", mask=None, request=None):
    request = request or RolloutRequest((1, 2), EXAMPLE, "0.0", Sampling(8, n=4, seed=11), role)
    completion = Completion(tuple(ids), (-0.5,) * len(ids), "stop", f"text {index}", mask)
    made = Rollout(request, completion, index, policy_version=3, reward=reward)
    made.rewards, made.reward_versions = {"exact": reward}, {"exact": "1@ab"}
    return made


def step(batch, channels, *, dropped=(), redrawn=(), reasons=None, terms=()):
    collected = Collected(RolloutBatch(list(batch)), list(dropped), list(redrawn), reasons or {})
    return StepRecord(9, collected, list(channels), list(terms))


def decode(rows):
    return [" ".join(map(str, row)) for row in rows]


def test_every_rollout_says_whether_it_was_trained_on_or_why_not():
    trained, probe, tool = rollout(0), rollout(0, role="probe"), rollout(1, mask=(0, 0, 0))
    text, cut, failed = rollout(0, (8, 9), role="analysis"), rollout(2), rollout(3, reward=None)
    failed.redraw = 1
    record = step(
        [trained, probe, tool, text],
        [Channel("outcome", {trained.id: 0.5, tool.id: -0.5})],
        dropped=[cut],
        redrawn=[failed],
        reasons={cut.id: "truncated", failed.id: "unscored: exact: boom"},
        terms=[LossTerm("experience", [((1,), (8, 9))])],
    )
    assert statuses(record) == {
        "0.0/solution/0": "trained",
        "0.0/probe/0": "unused: in no channel of the loss",
        "0.0/solution/1": "unused: the policy wrote no token of it",
        "0.0/analysis/0": "trained: as a text of term experience",
        "0.0/solution/2": "dropped: truncated",
        "0.0/solution/3/drawn-1": "dropped: unscored: exact: boom",
    }


def test_rows_have_fork_sampling_channels_and_their_weights(tmp_path):
    first, second = rollout(0), rollout(1)
    [request] = fork_requests(first, [2], 1, Sampling(4, temperature=0.5, seed=12), suffix=(9,))
    forked = rollout(0, (3,), request=replace(request, role="probe"))
    channels = [Channel("outcome", {first.id: 0.25, second.id: -0.25}, weight=0.9)]
    channels += [Channel("length", {first.id: [0.0, 0.0, 1.0]}, weight=0.1)]
    record = step([first, second, forked], channels)
    write_rollouts(tmp_path / "step-000009.parquet", step_rows(record, {"sum": "1+1="}))
    one, two, three = pq.read_table(tmp_path / "step-000009.parquet").to_pylist()
    assert (one["advantage/outcome"], one["advantage/length"]) == ([0.25] * 3, [0.0, 0.0, 1.0])
    assert json.loads(one["channel_weights"]) == {"outcome": 0.9, "length": 0.1}
    assert json.loads(two["channel_weights"]) == {"outcome": 0.9}
    assert two["advantage/length"] is None
    assert json.loads(three["channel_weights"]) == {}
    assert (one["parent"], one["forked_at"], one["policy_version"]) == (None, None, 3)
    assert (three["parent"], three["forked_at"]) == (first.id, 2)
    assert (three["temperature"], three["max_tokens"], three["prompt_ids"]) == (0.5, 4, [1, 2, 5, 6, 9])
    assert json.loads(one["reward_versions"]) == {"exact": "1@ab"}


def test_supervised_texts_say_whose_they_are(tmp_path):
    own = rollout(0, (8, 9), role="analysis")
    terms = [LossTerm("experience", [((1,), (8, 9)), ((1,), (4,))], weight=0.5, row_weights=[0.25, 2.0])]
    terms += [LossTerm("empty", [])]
    record = step([own], [], terms=terms)
    write_rollouts(tmp_path / "supervised-000009.parquet", supervised_records(record, decode, rank=1))
    one, two = pq.read_table(tmp_path / "supervised-000009.parquet").to_pylist()
    assert (one["rollout_id"], two["rollout_id"]) == ("experience/9.1.0", "experience/9.1.1")
    assert (one["source"], two["source"]) == (own.id, None)
    assert (one["weight"], one["token_weight"], two["token_weight"]) == (0.5, 0.25, 2.0)
    assert (one["prompt"], one["completion"], one["completion_ids"]) == ("1", "8 9", [8, 9])


def test_a_display_sees_the_best_and_the_worst_of_a_group_that_differs():
    flat = RolloutRequest((1,), EXAMPLE, "0.1", Sampling(8))
    batch = [rollout(0, request=flat), rollout(1, request=flat), rollout(0, reward=0.0), rollout(1)]
    shown = glimpses(step(batch, []), {"sum": "1+1="})["rollouts"]
    assert [entry["reward"] for entry in shown] == [1.0, 0.0]
    assert shown[0]["completion"] == "text 1"
    assert glimpses(step([rollout(0, reward=None)], []), {"sum": "1+1="}) == {"rollouts": []}
