"""The search task: demonstrations keep its rules, and the chance of success is what they make it."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain.data.episodes import split_episodes
from posttrain.data.search import CUE, Waste, chance_of_success, search, waste_of
from posttrain.data.tasks import make_task, split_of
from posttrain.recipe.mrt_schema import EpisodeConfig

STEPS = EpisodeConfig(separator=";", markers=[""], min_gap=1)


def rows(count, **args):
    return make_task("search", size=count, seed=0, split="train", traces=True, **args)


def test_searches_end_in_the_solution():
    for row in rows(200):
        a, rest = row.prompt.split("x=")
        b, p = rest.split("%")
        thinking, answer = row.columns["completion"].removeprefix("<think>").split("</think>")
        assert answer == row.answer
        assert int(a, 16) * int(answer, 16) % int(p, 16) == int(b, 16)
        for episode in split_episodes(thinking, STEPS):
            if episode.startswith("T"):
                candidate, product = int(episode[1], 16), int(episode[3], 16)
                assert product == int(a, 16) * candidate % int(p, 16)
                assert (episode[4] == "Y") == (f"{candidate:x}" == answer)
        assert chance_of_success(row.prompt, thinking) == 1.0
        assert len(row.columns["completion"]) < 190


def test_no_search_is_longer_than_asked_for():
    for row in rows(100, max_episodes=4):
        assert len(split_episodes(row.columns["completion"].partition("</think>")[0], STEPS)) <= 4 + 3 + 1
        assert row.columns["completion"].endswith(f"</think>{row.answer}")


def test_waste_is_as_asked_for():
    waste = [waste_of(row.columns["completion"]) for row in rows(500)]
    episodes = sum(found.episodes for found in waste)
    assert 0.15 < sum(found.repeated for found in waste) / episodes < 0.3
    assert 0.2 < sum(found.fillers for found in waste) / episodes < 0.35
    for row in rows(50, repeats=0.0, fillers=0.0):
        assert waste_of(row.columns["completion"]).repeated == 0


def test_waste_counts_the_thinking_alone():
    assert waste_of("<think>T2:6N;W;T7:aN;T2:6N;</think>W;T2:6N;") == Waste(4, 1, 1)


@pytest.mark.parametrize(
    ("thinking", "chance"),
    [
        ("", 1 / 10),
        ("W;W;", 1 / 10),
        ("T1:3N;", 1 / 9),
        ("T1:3N;W;T1:3N;", 1 / 9),
        ("T1:3N;T2:6N;", 1 / 8),
        ("T1:3N;T9:5Y;", 1.0),
        ("T1:3N;T9:5Y;W;", 1.0),
        ("T1:3Y;", 0.0),  # claims to have found what is none
        ("T9:5N;", 0.0),  # dismissed the solution
    ],
)
def test_chance_of_success(thinking, chance):
    assert chance_of_success("3x=5%b", thinking) == pytest.approx(chance)


def test_forced_answers_are_right_as_often_as_the_chance_says():
    found = rows(800, forced=1.0)
    assert all(row.prompt.endswith(CUE) for row in found)
    assert all(split_of(row.prompt.partition("<")[0]) == "train" for row in found)
    chances = [chance_of_success(*row.prompt.split("<think>")) for row in found]
    right = [row.columns["completion"] == row.answer for row in found]
    assert np.mean(right) == pytest.approx(np.mean(chances), abs=0.03)
    unsure = [one for one, chance in zip(right, chances, strict=True) if chance < 1]
    assert 0.05 < np.mean(unsure) < 0.3


def test_facts_are_single_tries():
    for row in rows(200, facts=True):
        question, episode = (row.prompt + row.columns["completion"]).split("<think>")
        a, p = int(question[0], 16), int(question[-1], 16)
        assert int(episode[3], 16) == a * int(episode[1], 16) % p
        assert (episode[4:] == "Y;") == (chance_of_success(question, episode) == 1.0)


def test_a_question_comes_once_without_traces():
    rng = np.random.default_rng(0)
    found = [search(rng, repeats=0.0, fillers=0.0) for _ in range(2500)]
    assert len({problem.question for problem in found}) == 9 * 10 + 11 * 12
    assert not any(problem.variant for problem in found)
