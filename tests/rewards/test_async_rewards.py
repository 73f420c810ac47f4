"""Async rewards: how many calls are under way, who is to blame when their process ends, outages."""

from __future__ import annotations

from collections import Counter

import pytest
from rewards.scoring import make_rollouts, make_scorer

from posttrain.errors import RewardError, Stopped

CODE = """
import asyncio, os
from pathlib import Path
from posttrain import reward
from posttrain.errors import RewardUnavailable
from posttrain.rewards.counts import count

FOLDER = Path(__file__).parent

def note(text):
    with open(FOLDER / "calls", "a") as file:
        file.write(f"{os.getpid()} {text}\\n")

def noted():
    return [line.split()[1] for line in open(FOLDER / "calls")]

@reward("patient", concurrency=4, deterministic=False, timeout=20.0)
async def patient(completion, example):
    if completion.text == "slow":
        while len(noted()) < 19:
            await asyncio.sleep(0.01)
    note(completion.text)
    return 1.0

@reward("deadly", concurrency=3, deterministic=False)
async def deadly(completion, example):
    note(completion.text)
    if completion.text == "4":
        os._exit(1)
    await asyncio.sleep(0.02 * (1 + int(completion.text) % 3))
    return 1.0

@reward("ends_late", deterministic=False)
async def ends_late(completion, example):
    note(completion.text)
    if completion.text == "deadly":
        await asyncio.sleep(0.5)
        os._exit(1)
    return 1.0

@reward("counts", deterministic=False)
async def counts(completion, example):
    count("calls")
    await asyncio.gather(*(add(length) for length in (1, len(completion.text))))
    if completion.text == "bad":
        raise ValueError("bad")
    return 1.0

async def add(length):
    count("letters", length)

@reward("counts_too", deterministic=True)
def counts_too(completion, example):
    count("calls", 0.5)
    return 1.0

def away():
    if (FOLDER / "away").exists():
        raise RewardUnavailable("http://node1:8000 failed")

@reward("remote", concurrency=2, deterministic=False)
async def remote(completion, example):
    note(completion.text)
    count("calls")
    await asyncio.sleep(0.01)
    if completion.text != "fine":
        away()
    return float(len(completion.text))

@reward("local_client", deterministic=False)
def local_client(completion, example):
    away()
    return 2.0

@reward("stuck", deterministic=False, timeout=60.0)
async def stuck(completion, example):
    note("stuck")
    away()
    await asyncio.sleep(3600)

@reward("other", deterministic=False)
def other(completion, example):
    note("other")
    return 5.0
"""


@pytest.fixture
def code(tmp_path):
    path = tmp_path / "remote_rewards.py"
    path.write_text(CODE)
    (tmp_path / "calls").touch()
    return path


def own(code, name, **options):
    return {"name": name, "from": str(code), **options}


def calls(code):
    """(process, text) of every call so far."""
    return [tuple(line.split()) for line in (code.parent / "calls").read_text().splitlines()]


def test_nobody_waits_for_the_slowest(code):
    """The first sample ends when all others have: calls are no waves, and all are made in one process."""
    rollouts = make_rollouts(["slow", *map(str, range(19))])
    with make_scorer(own(code, "patient"), workers=3) as scorer:
        report = scorer.score(rollouts)
    assert report.rewards["patient"].errors == {}
    assert [rollout.reward for rollout in rollouts] == [1.0] * 20
    assert calls(code)[-1][1] == "slow"
    assert len({process for process, _ in calls(code)}) == 1


def test_who_had_not_been_started_is_not_suspected(code):
    rollouts = make_rollouts([str(number) for number in range(12)])
    with make_scorer(own(code, "deadly"), workers=2) as scorer:
        report = scorer.score(rollouts)
    assert report.rewards["deadly"].errors == {"died": 1}
    assert [rollout.reward for rollout in rollouts] == [None if n == 4 else 1.0 for n in range(12)]
    made = Counter(text for _, text in calls(code))
    assert made["4"] == 2  # in company, and alone
    # Called again were those that were under way with it, or whose results were on the way to the parent.
    assert sum(made.values()) <= 12 + 5
    assert all(made[str(number)] == 1 for number in range(7, 12))


def test_results_do_not_wait_for_the_slowest(code):
    """Those that came at once are with the parent long before the last one ends the process."""
    rollouts = make_rollouts([*"abcdef", "deadly"])
    with make_scorer(own(code, "ends_late"), workers=1) as scorer:
        report = scorer.score(rollouts)
    assert report.rewards["ends_late"].errors == {"died": 1}
    assert [text for _, text in calls(code)] == [*"abcdef", "deadly"]


def test_what_rewards_count_is_reported(code):
    rollouts = make_rollouts(["ab", "abc", "bad", "ab"], group_size=4)
    with make_scorer(own(code, "counts"), own(code, "counts_too"), "exact_match") as scorer:
        report = scorer.score(rollouts)
        assert report.rewards["counts"].counts == {"calls": 4, "letters": 4 + 2 + 3 + 3 + 2}
        assert report.rewards["counts_too"].counts == {"calls": 1.5}  # equal samples share a call
        assert report.rewards["exact_match"].counts == {}
        assert scorer.score(rollouts[:1]).rewards["counts"].counts == {"calls": 1, "letters": 3}


@pytest.mark.parametrize("name", ["remote", "local_client"])
def test_a_reward_that_is_away_is_waited_for(code, name):
    away = code.parent / "away"
    away.touch()
    said = []

    def say(text):
        said.append(text)
        away.unlink(missing_ok=True)

    texts = ["a", "bb", "ccc", "fine", "eeeee"]
    rollouts = make_rollouts(texts)
    with make_scorer(own(code, name), own(code, "other"), say=say) as scorer:
        report = scorer.score(rollouts)
    values = [2.0] * 5 if name == "local_client" else [float(len(text)) for text in texts]
    assert [rollout.rewards[name] for rollout in rollouts] == values
    assert [rollout.reward for rollout in rollouts] == [value + 5.0 for value in values]
    assert report.errors == 0
    assert report.rewards[name].paused_seconds >= 1.0
    assert report.rewards["other"].paused_seconds == 0.0
    assert (
        said[0] == f"Paused, as reward {name} is away: http://node1:8000 failed. Waiting for at most 3600 s."
    )
    assert said[1].startswith(f"Reward {name} answers again: going on after a pause of ")
    assert len(said) == 2
    # The results of the other reward were kept.
    made = Counter(text for _, text in calls(code))
    assert made["other"] == 5
    if name == "remote":  # two were under way, the others were not tried; every call was answered once
        assert report.rewards["remote"].counts == {"calls": 5 + 2}
        assert sum(made.values()) == 5 + 5 + 2


def test_an_outage_that_is_too_long_ends_the_run(code):
    (code.parent / "away").touch()
    with make_scorer(own(code, "remote"), say=lambda text: None, max_outage=0.5) as scorer:
        with pytest.raises(
            RewardError,
            match=r"^reward 'remote' was away for [01] s, and reward_options.max_outage is 0.5 s: http://node1",
        ):
            scorer.score(make_rollouts(["a"] * 5))
        (code.parent / "away").unlink()
        assert scorer.score(make_rollouts(["a"] * 5)).errors == 0


def test_without_patience_the_samples_have_failed(code):
    (code.parent / "away").touch()
    rollouts = make_rollouts(["a", "a", "a", "a"])
    with make_scorer(own(code, "remote"), own(code, "other"), max_outage=0) as scorer:
        report = scorer.score(rollouts)
    assert report.rewards["remote"].errors == {"unavailable": 4}
    assert report.rewards["remote"].paused_seconds == 0.0
    assert [rollout.reward for rollout in rollouts] == [None] * 4
    assert rollouts[3].reward_errors == {"remote": "unavailable: http://node1:8000 failed"}


def test_a_pause_can_be_stopped(code):
    (code.parent / "away").touch()
    asked = []

    def check():
        asked.append(1)
        if len(asked) == 3:
            raise Stopped(15)

    with make_scorer(own(code, "remote"), say=lambda text: None, check=check) as scorer:
        with pytest.raises(Stopped):
            scorer.score(make_rollouts(["a"] * 5))
        (code.parent / "away").unlink()
        assert scorer.score(make_rollouts(["a"] * 5)).errors == 0


def test_a_repetition_can_be_stopped(code):
    """A server that is back, but answers nothing, does not hold up the end of a run."""
    away = code.parent / "away"
    away.touch()

    def check():
        if len(calls(code)) == 2:
            raise Stopped(15)

    with (
        make_scorer(own(code, "stuck"), say=lambda text: away.unlink(), check=check) as scorer,
        pytest.raises(Stopped),
    ):
        scorer.score(make_rollouts(["a"]))
    assert len(calls(code)) == 2
