"""The page itself: one safe file, with the parts that the run has."""

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from importlib import resources

import pyarrow.parquet as pq
import pytest
from synthetic_run import write_run

from posttrain.errors import PosttrainError
from posttrain.report.html import embed, write_report
from posttrain.report.results import results
from posttrain.report.run_folder import read_run
from posttrain.training.record import write_rollouts

HOSTILE = "</script><script>document.title='pwned'</script><img src=x onerror=alert(1)>\u2028<!--<script>"


class Page(HTMLParser):
    """Elements of a page with their attributes, the text of scripts, and all other text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.text, self.stack = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.stack.append(tag)

    def handle_endtag(self, tag):
        if self.stack and self.stack[-1] == tag:
            self.stack.pop()

    def handle_data(self, data):
        if self.stack and self.stack[-1] == "script":
            self.scripts.append(data)
        elif not self.stack or self.stack[-1] != "style":
            self.text += data

    def ids(self):
        return {attrs["id"] for _, attrs in self.elements if "id" in attrs}

    def data(self):
        return json.loads(self.scripts[0])


def page_of(run_dir):
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    text = path.read_text()
    return Page(text), text


def test_whole_run_has_every_part(run_dir):
    page, text = page_of(run_dir)
    assert {"main", "results", "curves", "distributions", "time", "rollouts", "recipe", "data"} <= page.ids()
    table = results(read_run(run_dir))
    for row in table.rows:
        for value in (row.cells[0].value, row.cells[1].interval, row.change, row.change_interval):
            assert value in page.text
    for words in ("arithmetic", "2 × CPU, 8 GiB", "2.13.0", "4 min 23 s", "1.23M", "name: math_answer"):
        assert words in page.text
    charts = [attrs["data-chart"] for _, attrs in page.elements if "data-chart" in attrs]
    assert charts == [str(i) for i in range(len(page.data()["charts"]))]
    assert len(text) < 3_000_000


def test_every_picture_and_control_has_a_name(run_dir):
    page, _ = page_of(run_dir)
    for tag, attrs in page.elements:
        if attrs.get("role") in ("img", "listbox", "region") or tag in ("nav", "form", "article"):
            assert attrs.get("aria-label"), (tag, attrs)
    assert page.elements[0] == ("html", {"lang": "en"})


def test_page_asks_for_nothing_from_outside(run_dir):
    page, text = page_of(run_dir)
    for _, attrs in page.elements:
        for name in ("src", "href", "srcset", "action", "data"):
            assert attrs.get(name) is None or attrs[name].startswith("#")
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", text)
    assert {tag for tag, _ in page.elements} & {"link", "iframe", "object", "base"} == set()


def test_policy_of_the_page_lets_only_its_own_script_run(run_dir):
    page, _ = page_of(run_dir)
    policy = next(attrs["content"] for _, attrs in page.elements if "http-equiv" in attrs)
    digest = base64.b64encode(hashlib.sha256(page.scripts[-1].encode()).digest()).decode()
    assert policy.startswith("default-src 'none';")
    assert f"script-src 'sha256-{digest}';" in policy


def test_what_the_model_wrote_stays_text(run_dir):
    path = run_dir / "rollouts/03-policy/step-000001.parquet"
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        row |= dict.fromkeys(("prompt", "completion", "answer", "example_id", "group", "status"), HOSTILE)
        row["reward_errors"] = json.dumps({HOSTILE: HOSTILE})
    write_rollouts(path, rows)
    recipe = run_dir / "recipe.yaml"
    recipe.write_text(recipe.read_text() + f"report_to: [{json.dumps(HOSTILE)}]\n")
    summary = json.loads((run_dir / "summary.json").read_text())
    summary["machine"] = summary["name"] = HOSTILE
    (run_dir / "summary.json").write_text(json.dumps(summary))
    page, _ = page_of(run_dir)
    clean, _ = page_of(write_run(run_dir.parent / "clean"))
    assert len(page.scripts) == len(clean.scripts) == 2
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in clean.elements}
    assert HOSTILE in page.text
    shown = [row for row in page.data()["rollouts"] if row["completion"] == HOSTILE]
    assert shown
    assert shown[0]["errors"] == {HOSTILE: HOSTILE}
    assert page.data()["prompts"][shown[0]["p"]] == HOSTILE


def test_embedded_json_cannot_leave_its_element():
    text = embed({"x": HOSTILE})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {"x": HOSTILE}


def test_script_never_turns_text_into_markup(run_dir):
    page, _ = page_of(run_dir)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\(", page.scripts[-1]
    )


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        (["rollouts"], {"distributions", "rollouts"}),
        (["metrics.jsonl"], {"curves"}),
        (["summary.json"], {"results", "time"}),
        (["recipe.yaml"], set()),
        (["rollouts/03-policy"], {"distributions"}),
        (["rollouts", "metrics.jsonl"], {"curves", "distributions", "rollouts"}),
        (
            ["rollouts", "metrics.jsonl", "summary.json"],
            {"results", "curves", "distributions", "time", "rollouts"},
        ),
        (["rollouts", "recipe.yaml", "summary.json"], {"results", "distributions", "time", "rollouts"}),
    ],
)
def test_missing_parts_are_left_out(run_dir, missing, gone):
    everything = {"results", "curves", "distributions", "time", "rollouts", "recipe"}
    for name in missing:
        path = run_dir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page, _ = page_of(run_dir)
    assert page.ids() & everything == everything - gone
    links = {attrs["href"][1:] for tag, attrs in page.elements if tag == "a"}
    assert links <= page.ids()


def test_empty_files_give_a_report(tmp_path):
    for name in ("summary.json", "recipe.yaml", "metrics.jsonl"):
        (tmp_path / name).write_text("")
    page, _ = page_of(tmp_path)
    assert tmp_path.name in page.text


def test_run_of_one_step_gives_a_report(tmp_path):
    page, _ = page_of(write_run(tmp_path, steps=1, problems=2, samples=4, prompts=2))
    assert re.search(r"03-policy\s+1 step\b(?!s)", page.text)
    assert page.data()["charts"][-1]["lines"][0]["x"] == [1]


def test_one_evaluation_has_no_change(run_dir):
    path = run_dir / "summary.json"
    summary = json.loads(path.read_text())
    summary["evaluations"] = summary["evaluations"][1:]
    summary["accuracy_before"] = None
    path.write_text(json.dumps(summary))
    page, _ = page_of(run_dir)
    assert "Change" not in page.text
    assert "95 % interval" in page.text


def test_metrics_without_a_value_are_dashes(run_dir):
    path = run_dir / "summary.json"
    summary = json.loads(path.read_text())
    for entry in summary["evaluations"]:
        entry["metrics"]["pass@1"] = {"value": None, "low": None, "high": None, "confidence": 0.95, "n": 0}
        entry["metrics"]["pass@4"] = {"value": "NaN", "low": "NaN", "high": "NaN", "confidence": 0.95, "n": 0}
    path.write_text(json.dumps(summary))
    page, _ = page_of(run_dir)
    rows = results(read_run(run_dir)).rows
    assert rows[0].cells == rows[1].cells == [None, None]
    assert "nan" not in page.text


def test_no_run_folder_is_named_and_nothing_written(tmp_path):
    with pytest.raises(PosttrainError, match=str(tmp_path)):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_report_is_the_same_each_time(run_dir):
    assert write_report(run_dir).read_text() == write_report(run_dir).read_text()


def colours(css):
    return dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", css))


def contrast(one, other):
    """WCAG 2.2 contrast ratio of two colours."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_and_lines_stand_out_from_their_background(mode):
    css = resources.files("posttrain.report").joinpath("style.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    palette = colours(light) | (colours(dark) if mode == "dark" else {})
    for ground in ("page", "card"):
        for text in ("text", "muted", "accent", "good", "bad", "warn"):
            assert contrast(palette[text], palette[ground]) >= 4.5, (text, ground)
    for text, ground in (("bad", "bad-soft"), ("warn", "warn-soft"), ("muted", "accent-soft")):
        assert contrast(palette[text], palette[ground]) >= 4.5, (text, ground)
    for line in ("c0", "c1", "c2", "c3", "c4", "c5", "was"):
        assert contrast(palette[line], palette["card"]) >= 3, line
