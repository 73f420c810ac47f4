"""The controller of a prompt: what it asks for, in which order, and which answer counts."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain.zip_rc.controller import (
    Chunk,
    Controller,
    EarlyStopPolicy,
    ThresholdPolicy,
    UtilityPolicy,
    weighted_vote,
)
from posttrain.zip_rc.grid import Grid

GRID = Grid(first_id=0, reward_values=(0.0, 0.5, 1.0), length_edges=(0, 8, 16, 32))
EVERYTHING = EarlyStopPolicy(2.0)


def forecast(reward, length_bin=1):
    """A forecast (R, L) that is sure of a reward bin and of a length bin."""
    joint = np.zeros((3, 3))
    joint[GRID.reward_bin(reward), length_bin] = 1.0
    return joint


def spread(chance):
    """A forecast of reward 1 with this chance, else 0, and of 12 tokens to go."""
    joint = np.zeros((3, 3))
    joint[2, 1], joint[0, 1] = chance, 1 - chance
    return joint


def make(policy, samples=3, cap=32, interval=8, budget=None):
    return Controller(GRID, policy, samples=samples, cap=cap, interval=interval, budget=budget)


def extend(controller, joints, **kwargs):
    """Record full chunks for what the controller asks for; returns what that was."""
    asked = controller.next()
    controller.record({index: Chunk(tokens, joints[index], **kwargs) for index, tokens in asked.items()})
    return asked


def states(controller):
    return [sample.state for sample in controller.samples]


def test_the_first_token_tells_what_the_prompt_is_worth():
    controller = make(EVERYTHING)
    assert extend(controller, [spread(0.5)] * 3) == {0: 1}
    assert [sample.value for sample in controller.samples] == [0.5] * 3
    assert [sample.remaining for sample in controller.samples] == [12.0] * 3
    # All chunks end at multiples of the interval.
    assert extend(controller, [spread(0.5)] * 3) == {0: 7, 1: 8, 2: 8}
    assert (controller.tokens, controller.latency) == (24, 9)
    assert controller.next() == {0: 8, 1: 8, 2: 8}
    assert controller.confidence == pytest.approx(1 - 0.5**3)


def test_samples_are_paused_and_taken_up_again():
    choices = [[0, 1, 0], [0, 1, 0], [1, 0, 1]]

    class Scripted:
        def choose(self, outlook):
            assert outlook.reference == 12.0
            return np.array(choices.pop(0), bool)

    controller = make(Scripted())
    joints = [spread(0.5)] * 3
    extend(controller, joints)
    assert extend(controller, joints) == {1: 8}
    assert states(controller) == ["paused", "running", "waiting"]
    assert extend(controller, joints) == {1: 8}
    assert extend(controller, joints) == {0: 7, 2: 8}
    assert states(controller) == ["running", "paused", "running"]
    assert [sample.tokens for sample in controller.samples] == [8, 16, 8]


def test_one_sample_is_always_run_to_its_end():
    controller = make(ThresholdPolicy(0.9), samples=2, cap=20)
    joints = [spread(0.3), spread(0.4)]
    extend(controller, joints)
    assert extend(controller, joints) == {1: 8}  # the one that has not begun is not pruned yet
    assert extend(controller, joints) == {1: 8}  # both are below: the better one
    assert extend(controller, joints, ended="length") == {1: 4}
    assert controller.next() == {}
    assert states(controller) == ["paused", "truncated"]
    assert (controller.best(), controller.confidence) == (1, 0.0)


def test_utility_stops_when_more_would_not_pay():
    controller = make(UtilityPolicy(alpha=1.0, beta=0.2))
    joints = [spread(0.5)] * 3
    extend(controller, joints)
    assert extend(controller, joints) == {0: 7, 1: 8}  # a third adds 0.125 for 0.2
    asked = controller.next()
    sure = Chunk(asked[0], spread(1.0), "stop", "yes")
    controller.record({0: sure, 1: Chunk(asked[1], spread(0.5))})
    assert controller.next() == {}
    assert (controller.best(), controller.confidence) == (0, 1.0)
    assert controller.samples[0].remaining == 0.0


def test_early_stop():
    controller = make(EarlyStopPolicy(0.5), samples=2)
    extend(controller, [spread(0.5)] * 2)
    asked = controller.next()
    controller.record({0: Chunk(asked[0], spread(0.4), "stop"), 1: Chunk(asked[1], spread(0.4))})
    assert extend(controller, [None, spread(0.6)], ended="stop") == {1: 8}
    assert controller.next() == {}
    assert controller.best() == 1


def test_samples_that_were_cut_off_are_second_choice():
    controller = make(EVERYTHING, samples=2)
    extend(controller, [spread(0.5)] * 2)
    asked = controller.next()
    cut, done = Chunk(asked[0], spread(0.9), "length"), Chunk(asked[1], spread(0.2), "stop")
    controller.record({0: cut, 1: done})
    assert controller.next() == {}
    assert (controller.best(), controller.confidence) == (1, pytest.approx(0.2))
    with pytest.raises(ValueError, match="has ended"):
        make(EVERYTHING).best()


@pytest.mark.parametrize(
    ("values", "answers", "best"),
    [
        ([0.5, 0.4, 0.3], ["a", "b", "b"], 1),  # 0.7 against 0.5, and of b the better
        ([0.5, 0.1, 0.3], ["a", "b", "b"], 0),
        ([0.4, 0.3, 0.3], [None, None, "b"], 0),  # no answer votes for itself alone
        ([0.2, 0.2], ["a", "b"], 0),
    ],
)
def test_weighted_vote(values, answers, best):
    assert weighted_vote(values, answers) == best


def test_budget_is_kept_and_one_sample_ends():
    rng = np.random.default_rng(0)

    class Random:
        def choose(self, outlook):
            return rng.random(len(outlook.joints)) < 0.6

    for _ in range(60):
        lengths = rng.integers(1, 33, 4)
        budget = int(rng.integers(32, 80))
        controller = make(Random(), samples=4, budget=budget)
        for _ in range(100):
            asked = controller.next()
            if not asked:
                break
            chunks = {}
            for index, tokens in asked.items():
                begun = controller.samples[index].tokens
                tokens = min(tokens, int(lengths[index]) - begun)
                done = begun + tokens == lengths[index]
                chunks[index] = Chunk(tokens, spread(float(rng.random())), "stop" if done else None)
            controller.record(chunks)
            assert controller.tokens <= budget
        assert "finished" in states(controller)


def test_a_budget_pays_for_the_best_first():
    controller = make(EVERYTHING, samples=3, cap=16, budget=24)
    joints = [spread(0.1), spread(0.9), spread(0.5)]
    extend(controller, [spread(0.5)] * 3)
    assert controller.next() == {0: 7, 1: 8}  # 16 stay paid for sample 0, 8 are left
    controller.record({0: Chunk(7, joints[0]), 1: Chunk(8, joints[1])})
    assert controller.next() == {0: 8}  # it is no worse off than sample 1, and one must end
