"""The documentation site builds without a warning, and every page of it is in the navigation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import site_pages
from mkdocs.commands.build import build
from mkdocs.config import load_config

from posttrain.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parents[2]


def test_every_key_of_the_schema_is_described() -> None:
    missing = [
        f"{section.__name__}.{name}"
        for section, _ in site_pages.sections(Recipe, "")
        for name, field in section.model_fields.items()
        if not site_pages.documented(section).get(name) and not list(site_pages.models_in(field.annotation))
    ]
    assert missing == []


def test_the_site_builds_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    recipe = (tmp_path / "reference" / "recipe.html").read_text()
    for section, _ in site_pages.sections(Recipe, ""):
        assert f'id="{section.__name__.lower()}"' in recipe
    python = (tmp_path / "reference" / "python.html").read_text()
    assert 'id="posttrain.methods.base.Method.channels"' in python
    assert 'id="posttrain.rollout.engine.RolloutEngine.generate"' in python
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', page.read_text())
        assert loaded == [], page  # nothing is loaded from other servers
