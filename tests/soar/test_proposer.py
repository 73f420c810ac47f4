"""Rejection sampling: what is kept, in what order, and when it gives up."""

from __future__ import annotations

import pytest

from posttrain.recipe.schema import RewardOptions, RewardSpec
from posttrain.recipe.soar_schema import TeacherConfig
from posttrain.rewards.scorer import Scorer
from posttrain.rollout.types import Completion
from posttrain.soar.proposals import Unreadable
from posttrain.soar.teacher import Proposer, spread


class Writer:
    """An engine whose completions are the next of some texts, over and over."""

    def __init__(self, texts):
        self.texts = texts
        self.written = 0

    def __call__(self, requests):
        answers = []
        for request in requests:
            for _ in range(request.sampling.n):
                text = self.texts[self.written % len(self.texts)]
                self.written += 1
                answers.append(Completion((1, 2), (-1.0, -1.0), "stop", text))
        return [answers]


def proposer(texts, **config):
    def admit(question):
        if len(question) > 9:
            raise Unreadable("long_question")

    config = {"format": {"question": ["{", "}"], "answer": ["(", ")"], "boxed": False}, **config}
    writer = Writer(texts)
    scorer = Scorer([RewardSpec(name="numeric_match")], RewardOptions(workers=1))
    made = Proposer(
        TeacherConfig.model_validate(config),
        prompt=(0,),
        temperature=1.0,
        generate=writer,
        scorer=scorer,
        threshold=1.0,
        reward="numeric_match",
        admit=admit,
    )
    return made, writer


def test_the_first_readable_ones_in_the_order_of_sampling():
    texts = ["{a}(1)", "nonsense", "{b}(2)", "{b}(2)", "{much too long}(3)", "{c}(not a number)", "{d}(4)"]
    made, _ = proposer(texts)
    found = made.propose(6, seed=0, group="0")
    assert [(q.question, q.answer) for q in found.questions] == [
        *[("a", "1"), ("b", "2"), ("b", "2"), ("d", "4"), ("a", "1"), ("b", "2")]
    ]
    assert len({rollout.id for rollout in (*found.accepted, *found.refused)}) == len(found.accepted) + len(
        found.refused
    )
    assert {"no_question", "long_question", "uncheckable"} <= set(found.reasons.values())
    values = found.metrics()
    assert values["teacher/readable"] == pytest.approx(4 / 7, abs=0.15)
    assert values["teacher/refused/uncheckable"] >= 1
    assert "teacher/refused/beyond" not in values


def test_a_mute_teacher_is_given_up():
    made, writer = proposer(["", "{}()", "{ }(1)"], max_draws=3)
    found = made.propose(4, seed=0, group="0")
    assert found.accepted == []
    assert writer.written == 12


def test_every_rollout_of_a_set_has_its_advantage():
    assert spread([0.5, -0.5], 3) == [0.5, 0.5, 0.5, -0.5, -0.5, -0.5]
