"""A method, tool or environment in a file of the user's."""

import pytest

from posttrain.errors import RecipeError
from posttrain.methods.base import find_method, load_attribute

FILE = """
from __future__ import annotations

from dataclasses import dataclass

from beside import VALUE
from posttrain.methods.base import Method


@dataclass(frozen=True)
class Record:
    value: int = VALUE


class Mine(Method):
    name = "mine"
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "beside.py").write_text("VALUE = 7\n")
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path / "mine.py"


def test_a_file_may_define_dataclasses_and_import_its_neighbours(file):
    assert find_method(f"{file}:Mine").name == "mine"
    assert load_attribute(f"{file}:Record")().value == 7


def test_two_files_of_one_name_are_two_modules(file, tmp_path):
    other = tmp_path / "other" / "mine.py"
    other.parent.mkdir()
    other.write_text(FILE.replace('"mine"', '"another"'))
    assert find_method(f"{file}:Mine").name == "mine"
    assert find_method(f"{other}:Mine").name == "another"


@pytest.mark.parametrize(
    ("name", "reason"), [("mine.py:Nothing", "defines no Nothing"), ("none.py:X", "there is no file")]
)
def test_what_is_not_there_is_named(file, name, reason):
    with pytest.raises(RecipeError, match=reason):
        load_attribute(f"{file.parent / name}")


def test_an_error_of_the_file_is_the_files(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("x = None.y\n")
    for _ in range(2):
        with pytest.raises(AttributeError):
            load_attribute(f"{broken}:x")
