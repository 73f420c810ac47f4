from __future__ import annotations

import ast
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest

from posttrain.data.tasks import TASKS
from posttrain.recipe import data_schema, pareto_schema, preference_schema, schema
from posttrain.recipe.fields import section_of


def test_tasks_of_the_schema_are_those_there_are() -> None:
    assert set(get_args(data_schema.TaskName)) == set(TASKS)


@pytest.mark.parametrize("module", [schema, data_schema, preference_schema, pareto_schema])
def test_every_option_is_documented(module: ModuleType) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text())
    undocumented = []
    for section in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        fields = getattr(module, section.name).model_fields
        for node, after in zip(section.body, [*section.body[1:], None], strict=True):
            if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
                continue
            has_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            is_section = section_of(fields[node.target.id].annotation) is not None
            if not has_text and not is_section:
                undocumented.append(f"{section.name}.{node.target.id}")
    assert undocumented == []
