from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.errors import RecipeError
from posttrain.recipe.library import FOLDER, find_in_library, find_recipe, library
from posttrain.recipe.load import dump_recipe, load_recipe


@pytest.mark.parametrize("recipe", library(), ids=lambda recipe: recipe.name)
def test_every_recipe_loads_and_round_trips(recipe: object, tmp_path: Path) -> None:
    path = recipe.path  # type: ignore[attr-defined]
    loaded = load_recipe(path)
    assert loaded.recipe.description
    (tmp_path / "dumped.yaml").write_text(dump_recipe(loaded.recipe))
    assert load_recipe(tmp_path / "dumped.yaml").recipe == loaded.recipe


def test_no_yaml_of_the_library_is_overlooked() -> None:
    others = {path for path in FOLDER.rglob("*.y*ml") if path.parent.name != "accelerate"}
    assert others == {recipe.path for recipe in library()}


def test_find_by_name_or_last_part() -> None:
    assert find_in_library("tiny/quickstart").path == FOLDER / "tiny" / "quickstart.yaml"
    assert find_in_library("quickstart.yaml").name == "tiny/quickstart"


def test_nearest_name_is_suggested() -> None:
    with pytest.raises(RecipeError, match=r"quikstart: there is no such recipe. Did you mean quickstart\?"):
        find_recipe("quikstart")


def test_a_file_goes_before_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart.yaml").write_text("")
    assert find_recipe("quickstart.yaml") == "quickstart.yaml"


def test_paths_in_messages_are_relative_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parent)
    assert find_recipe("quickstart") == "recipes/tiny/quickstart.yaml"
