"""What `posttrain plan` says about SOAR before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.errors import RecipeError
from posttrain.recipe.library import FOLDER
from posttrain.recipe.load import load_recipe
from posttrain.recipe.plan import format_plan, make_plan
from posttrain.recipe.schema import SoarStage
from posttrain.recipe.soar_plan import soar_cost


def test_the_cost_of_an_outer_step_with_the_papers_numbers() -> None:
    cost = soar_cost(SoarStage(), cap=1024)
    assert (cost.first_students, cost.first_greedy, cost.proposals) == (40_960, 1_088, 256)
    assert cost.first_updates == 160
    # Promotions as early as can be, after 3 and 6 steps: 3 outer steps of 10 updates, 3 of 15, then of 20.
    assert cost.updates == 16 * (3 * 10 + 3 * 15 + 194 * 20)
    assert cost.student_completions == cost.updates * 256
    assert cost.tokens == (cost.student_completions + 200 * 1_088) * 1024 + 200 * 256 * 512


def test_inner_loops_grow_with_promotions() -> None:
    student = SoarStage().student
    assert [student.steps_after(promotions) for promotions in range(4)] == [10, 15, 20, 20]


def test_budgets_end_it_earlier() -> None:
    assert soar_cost(SoarStage(max_student_updates=170), 1024).steps == 2
    assert soar_cost(SoarStage(max_sampled_tokens=1), 1024).steps == 1
    intrinsic = soar_cost(SoarStage(reward="learnability"), 1024)
    assert (intrinsic.updates, intrinsic.hard_answers) == (0, 200 * 256 * 32)


def test_the_plan_of_the_paper_scale_recipe() -> None:
    text = format_plan(make_plan(load_recipe(FOLDER / "soar-math-hard.yaml")))
    assert "4 sets × 64 questions × 4 students × 10 updates = 40,960 completions" in text
    assert "1,088 greedy answers to hard problems" in text
    assert "16.8B sampled tokens" in text
    assert "train a teacher and its students for 200 outer steps" in text


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"reward": "learnability"}, "trains no student to promote"),
        ({"student": {"steps": 30}}, "is below steps 30"),
        ({"correct": {"reward": "exact"}}, "there is no reward 'exact'"),
        ({"teacher": {"loss": {"kind": "reinforce_pp"}}}, "take rloo"),
        ({"data": {"stage": "hard_subset", "split": "test"}}, "for reporting only"),
        ({"data": {"stage": "hard_subset", "split": "validation"}}, "not validation"),
        ({"teacher": {"format": {"question": ["", "x"]}}}, "a tag is empty"),
        ({"datasets": 1}, "datasets"),
    ],
)
def test_what_cannot_work(changes: dict[str, object], problem: str, tmp_path: Path) -> None:
    task = {"task": "string_machine", "size": 8, "format": "text"}
    recipe = {
        "name": "x",
        "model": {"path": str(FOLDER.parent / "data" / "tiny-reasoner")},
        "data": {"train": task},
        "rollout": {"max_tokens": 8},
        "rewards": ["exact_match"],
        "stages": [{"hard_subset": {"samples": 8}}, {"soar": changes}],
    }
    path = tmp_path / "x.yaml"
    path.write_text(json.dumps(recipe))
    with pytest.raises(RecipeError, match=problem):
        make_plan(load_recipe(path))
