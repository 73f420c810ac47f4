from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.recipe.nodes import MAX_VALUES, Unreadable, is_plain_text, key_path, read_text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("-1.5E+3", -1500.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("017", 17),
        ("0o17", 15),
        ("0x1F", 31),
        ("+3", 3),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("1_000", "1_000"),
        ("12:30:00", "12:30:00"),
        ("2026-01-01", "2026-01-01"),
        ("0b1", "0b1"),
        ("'1'", "1"),
        ('"null"', "null"),
        ("!!str 1", "1"),
        ("!!float 1", 1.0),
        ("<<", "<<"),
    ],
)
def test_core_schema(text: str, value: object) -> None:
    node, problems = read_text(f"key: {text}\n", "f.yaml")
    read = node.plain()["key"]
    assert (read, type(read)) == (value, type(value))
    assert problems == []


def test_nan_is_a_number() -> None:
    assert math.isnan(read_text(".nan", None)[0].plain())


def test_places_are_those_of_keys_and_values() -> None:
    node, _ = read_text("a:\n  b: 1\n  c: [2,\n      3]\n", "f.yaml")
    places = {key_path(path): (str(n.key_origin), str(n.origin)) for path, n in node.walk()}
    assert places["a.b"] == ("f.yaml:2:3", "f.yaml:2:6")
    assert places["a.c[1]"] == ("f.yaml:4:7", "f.yaml:4:7")


def test_an_alias_stands_where_it_is_used() -> None:
    node, _ = read_text("a: &x {b: 1}\nc: *x\n", "f.yaml")
    assert node.plain() == {"a": {"b": 1}, "c": {"b": 1}}
    assert str(node.value["c"].key_origin) == "f.yaml:2:1"  # type: ignore[index,call-overload]


def test_values_are_counted_with_aliases_written_out() -> None:
    row = ", ".join("x" * 99)
    ok = f"a: &a [{row}]\n" + "".join(f"b{i}: *a\n" for i in range(MAX_VALUES // 100 - 2))
    read_text(ok, "f.yaml")
    with pytest.raises(Unreadable, match="more than 10000 values"):
        read_text(ok + "c: *a\nd: *a\n", "f.yaml")


@settings(deadline=None)
@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(Unreadable):
        read_text(text, "f.yaml")


def test_plain_text_is_what_needs_no_quotes() -> None:
    assert is_plain_text("yes")
    assert not any(map(is_plain_text, ["1e-5", "null", "true", "12", ".5"]))
