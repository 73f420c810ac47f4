"""Cutting thinking traces into episodes: the worked numbers, and cuts on token ids."""

from __future__ import annotations

import pytest

from posttrain.data.episodes import find_thinking, split_episodes, text_cuts
from posttrain.recipe.mrt_schema import EpisodeConfig, ProbeConfig

STEPS = EpisodeConfig(separator=";", markers=[""], min_gap=1)


def paragraphs(count, marked):
    return "\n\n".join(f"Wait {i}" if i in marked else f"s{i}" for i in range(count))


def lengths(text, **options):
    return [len(episode.split("\n\n")) for episode in split_episodes(text, EpisodeConfig(**options))]


def test_worked_example():
    text = paragraphs(10, {2, 3, 4, 8})
    assert lengths(text) == [3, 5, 2]
    assert lengths(text, max_cuts=1) == [3, 7]
    assert lengths(text, max_cuts=0) == [10]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (paragraphs(10, set()), 1),
        ("", 1),
        (paragraphs(6, {0, 3}), 2),
        (paragraphs(8, {2}), 1),
        ("a\n\nb\n\nc\n\nwait, no", 1),
        ("a\n\nb\n\nc\n\nso Wait", 1),
        ("a\n\nb\n\nc\n\nBut hold on", 2),
    ],
)
def test_edges(text, expected):
    assert len(split_episodes(text, EpisodeConfig())) == expected


def test_episodes_lose_their_trailing_line_breaks_and_cuts_do_not():
    text = "a\n\nb\n\nc\n\nWait\n\n"
    assert split_episodes(text, EpisodeConfig()) == ["a\n\nb\n\nc", "Wait"]
    assert text_cuts(text, EpisodeConfig()) == [len("a\n\nb\n\nc\n\n")]


def test_groups_of_episodes_are_merged():
    assert split_episodes("1;2;3;4;5", STEPS) == ["1;", "2;", "3;", "4;", "5"]
    merged = STEPS.model_copy(update={"group_size": 2})
    assert split_episodes("1;2;3;4;5", merged) == ["1;2;", "3;4;", "5"]


def test_every_so_many_paragraphs():
    assert lengths(paragraphs(8, set()), markers=[""], min_gap=3) == [3, 3, 2]


def test_tagged_steps():
    config = EpisodeConfig(separator="\n", markers=["Node", "Backtrack"], min_gap=1)
    text = "Node 1: a\nmore\nNode 2: b\nBacktrack to Node 1\nNode 2: c"
    assert split_episodes(text, config) == [
        "Node 1: a\nmore",
        "Node 2: b",
        "Backtrack to Node 1",
        "Node 2: c",
    ]


class Words:
    """Token ids are places in `words`; an empty word is a special token."""

    def __init__(self, *words):
        self.words = words

    def __call__(self, rows):
        return ["".join(self.words[token] for token in row) for row in rows]

    def thinking(self, **options):
        ids = range(len(self.words))
        return find_thinking(ids, self, ProbeConfig(episodes=STEPS, **options))


def test_spans_partition_the_thinking():
    thinking = Words("<think>", "a", ";", "b", ";", "c", "</think>", "4", "").thinking()
    assert thinking.episodes == [(1, 3), (3, 5), (5, 6)]
    assert thinking.answer == 7
    assert thinking.cuts == (3, 5)


def test_without_closing_tag_there_is_no_answer():
    thinking = Words("<think>", "a", ";", "b", ";").thinking()
    assert (thinking.episodes, thinking.answer) == ([(1, 3), (3, 5)], None)


def test_a_thinking_that_the_prompt_opened():
    assert Words("a", ";", "b", "</think>", "4").thinking().episodes == [(0, 2), (2, 3)]


def test_a_token_over_a_boundary_is_in_the_later_episode():
    thinking = Words("<think>", "a", ";b", ";", "c", "</th", "ink>4", "").thinking()
    assert thinking.cuts == (2, 4)
    assert thinking.end == 5
    assert thinking.answer == 7  # the token that closes the tag already begins the answer


def test_empty_thinking_is_one_empty_episode():
    assert Words("<think>", "</think>", "4").thinking().episodes == [(1, 1)]


def test_characters_of_several_tokens():
    """A byte-level tokenizer decodes the parts of a character to replacement characters."""
    data = "<think>é;ü</think>4".encode()

    def decode(rows):
        return [bytes(row).decode(errors="replace") for row in rows]

    thinking = find_thinking(list(data), decode, ProbeConfig(episodes=STEPS))
    assert [bytes(data[start:end]).decode() for start, end in thinking.episodes] == ["é;", "ü"]
    assert bytes(data[thinking.answer :]) == b"4"
