from __future__ import annotations

import importlib.util
import socket
from pathlib import Path

import pytest

from posttrain.errors import RecipeError
from posttrain.recipe.devices import layout_of
from posttrain.recipe.library import FOLDER, LibraryRecipe, find_in_library, find_recipe, library
from posttrain.recipe.load import dump_recipe, load_recipe
from posttrain.recipe.plan import format_plan, make_plan
from posttrain.recipe.risks import device_needed


@pytest.mark.parametrize("recipe", library(), ids=lambda recipe: recipe.name)
def test_every_recipe_loads_and_round_trips(recipe: object, tmp_path: Path) -> None:
    path = recipe.path  # type: ignore[attr-defined]
    loaded = load_recipe(path)
    assert loaded.recipe.description
    (tmp_path / "dumped.yaml").write_text(dump_recipe(loaded.recipe))
    assert load_recipe(tmp_path / "dumped.yaml").recipe == loaded.recipe


@pytest.mark.parametrize("recipe", library(), ids=lambda recipe: recipe.name)
def test_every_recipe_passes_plan_without_a_network(
    recipe: LibraryRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what it needs on the machine: vLLM, and for some the run of another recipe."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "vllm" else find(name))
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for folder in ("recipes", "data"):
        (tmp_path / folder).symlink_to(FOLDER.parent / folder)
    monkeypatch.chdir(tmp_path)
    for file in ("01-hard_subset/rows.parquet", "01-hard_subset/rows-test.parquet", "03-soar/rows.parquet"):
        path = Path("runs/soar-math-hard/data") / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    plan = make_plan(load_recipe(recipe.path))
    assert plan.memory
    assert all(phase.total > 0 for phases in plan.memory for phase in phases if phase.parts)
    # SOAR has the whole training state on every device, and says so.
    assert device_needed(plan.loaded.recipe, plan.memory) <= (141e9 if "soar" in recipe.name else 80e9)
    assert plan.disk
    assert not any("memory is not known" in risk or "out of memory:" in risk for risk in plan.risks)
    assert format_plan(plan).splitlines()[-1].startswith("This will ")


def test_the_recipes_at_paper_scale_cover_methods_families_and_layouts() -> None:
    loaded = [load_recipe(recipe.path).recipe for recipe in library() if "/" not in recipe.name]
    stages = [spec for recipe in loaded for spec in recipe.stages]
    methods = {name for spec in stages if spec.policy for name in spec.policy.method_names}
    assert {"masa", "hdpo", "mrt", "amft", "mel"} <= methods
    assert {"policy", "sft", "star", "soar", "zip_rc", "evaluate"} <= {spec.kind for spec in stages}
    assert {"Qwen", "Llama"} <= {
        part for recipe in loaded for part in ("Qwen", "Llama") if part in recipe.model.path
    }
    assert {True, False} == {recipe.model.lora is not None for recipe in loaded}
    assert {"vllm", "vllm_server"} <= {recipe.rollout.engine for recipe in loaded}
    layouts = [layout_of(recipe) for recipe in loaded]
    assert {1, 8} <= {layout.processes for layout in layouts}
    assert {"ddp", "zero3", "fsdp2"} <= {layout.backend for layout in layouts}


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
