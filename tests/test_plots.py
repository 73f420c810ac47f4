"""The pictures of the documentation are drawn from the results that are there."""

from __future__ import annotations

import re

import plots
import pytest

PICTURES = sorted(path.stem for path in plots.IMAGES.glob("*.svg"))


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_of_the_result_that_is_there(name):
    drawn = (plots.IMAGES / f"{name}.svg").read_text()
    assert plots.digest((plots.RESULTS / f"{name}.json").read_bytes()) in drawn


@pytest.mark.parametrize("name", PICTURES)
def test_a_page_shows_it(name):
    pages = [page.read_text() for page in plots.IMAGES.parent.rglob("*.md")]
    assert any(f"images/{name}.svg" in page for page in pages)


def test_drawing_twice_gives_the_same_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "IMAGES", tmp_path)
    first = plots.draw("reward_model").read_text()
    assert plots.draw("reward_model").read_text() == first
    assert re.search(r"seed \d", first)


def test_an_unknown_name_is_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        plots.main(["nothing"])
    assert stopped.value.code == 2
    assert "'nothing' is none of hdpo, masa" in capsys.readouterr().err
