"""Which traces are worth imitating."""

from __future__ import annotations

from posttrain.data.star import best_prefix, best_trace

NAN = float("nan")


def test_the_best_prefix_is_the_shortest_of_the_best():
    assert best_prefix([0.25, 0.5, 1.0, 1.0, 0.75]) == 2
    assert best_prefix([0.0, 0.25]) == 1


def test_a_trace_that_gains_nothing_over_answering_at_once_is_dropped():
    assert best_prefix([0.5, 0.5, 0.25]) is None
    assert best_prefix([0.0, 0.0]) is None
    assert best_prefix([1.0, 1.0]) is None
    assert best_prefix([1.0, 1.0], allow_empty=True) == 0
    assert best_prefix([0.5, 0.5], allow_empty=True) is None


def test_unknown_values_are_never_the_best():
    assert best_prefix([0.25, NAN, 0.5]) == 2
    assert best_prefix([NAN, NAN]) is None


def test_the_best_trace():
    assert best_trace([[0.0, 0.5], [0.0, 1.0]], [1, 9]) == 1  # more progress
    assert best_trace([[0.0, 0.5, 0.25, 1.0], [0.0, 1.0]], [1, 9]) == 1  # fewer steps back
    assert best_trace([[0.0, 1.0], [0.0, 0.5, 1.0]], [9, 1]) == 1  # shorter
    assert best_trace([[0.5, 0.5], [1.0, 0.0]], [1, 1]) is None
    assert best_trace([], []) is None
