"""Which fields the schema has at a place, and which valid one a wrong key may have meant."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from posttrain.recipe.nodes import key_path
from posttrain.recipe.schema import Recipe
from posttrain.recipe.spelling import nearest

Path = tuple[str | int, ...]

ELSEWHERE = {
    "lr": "learning_rate",
    "beta": "kl",
    "epsilon": "clip_low",
    "loss_type": "kind",
    "num_generations": "group_size",
    "num_iterations": "updates_per_batch",
    "max_completion_length": "max_tokens",
    "max_new_tokens": "max_tokens",
}
"""Names that other trainers have for our fields."""


def fields_of(model: type[BaseModel]) -> dict[str, Any]:
    """Annotation of each field, by the name it has in a recipe."""
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section in an annotation such as `X`, `X | None` or `list[X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_of(part))), None)


def container_of(annotation: Any) -> Any:
    """The list or mapping in an annotation such as `list[X]` or `dict[str, X] | None`; None without one."""
    if get_origin(annotation) in (list, dict):
        return annotation
    if get_origin(annotation) in (Union, UnionType):
        return next((found for part in get_args(annotation) if (found := container_of(part))), None)
    return None


def annotation_at(path: Path) -> Any:
    """The annotation of the field that a path ends in; None where the schema has no such field."""
    section: type[BaseModel] | None = Recipe
    annotation: Any = Recipe
    for part in path:
        many = container_of(annotation)
        if isinstance(part, int):
            annotation = get_args(many)[0] if get_origin(many) is list else None
        elif get_origin(many) is dict:
            annotation = get_args(many)[1]
        else:
            annotation = fields_of(section).get(part) if section is not None else None
        section = section_of(annotation)
    return annotation


def choices_of(annotation: Any) -> list[str]:
    """The words a `Literal` (within an optional or a list) allows."""
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in choices_of(part)]


def explain_unknown(path: Path) -> str:
    """One sentence about a key the schema does not have at this place: what it may have meant.

    In this order: the same name deeper in the section, a similar name in the section, a similar name
    deeper, the same name elsewhere in the recipe, and else the names that are valid here.
    """
    section = section_of(annotation_at(path[:-1]))
    if section is None:
        return "unknown field."
    here = list(fields_of(section))
    name = ELSEWHERE.get(str(path[-1]), str(path[-1]))
    if name in here:
        return f"unknown field. Did you mean {name}?"
    deeper = {names[-1]: ".".join(names) for names in reversed(list(_nested(section)))}
    if name in deeper:
        return f"unknown field. It belongs at {_join(path[:-1], deeper[name])}."
    if similar := nearest(name, here):
        return f"unknown field. Did you mean {similar}?"
    if similar := nearest(name, list(deeper), cutoff=0.8):
        return f"unknown field. Did you mean {deeper[similar]}?"
    anywhere = {names[-1]: ".".join(names) for names in reversed(list(_nested(Recipe)))}
    anywhere.update({field: field for field in fields_of(Recipe)})
    if name in anywhere:
        return f"unknown field. It belongs at {anywhere[name]}."
    return f"unknown field. Valid here: {', '.join(here)}."


def _nested(section: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """Names of the fields below a section's own, nearest first; `stages[]` stands for any entry."""
    level: list[tuple[tuple[str, ...], type[BaseModel]]] = [((), section)]
    while level:
        below: list[tuple[tuple[str, ...], type[BaseModel]]] = []
        for names, model in level:
            for field, annotation in fields_of(model).items():
                if names:
                    yield (*names, field)
                if (child := section_of(annotation)) is not None:
                    many = get_origin(container_of(annotation))
                    mark = "[]" if many is list else ".NAME" if many is dict else ""
                    below.append(((*names, f"{field}{mark}"), child))
        level = below


def _join(path: Path, names: str) -> str:
    return ".".join(part for part in (key_path(path), names) if part)
