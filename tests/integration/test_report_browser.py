"""The report in a real browser: its script runs, its controls work, and nothing the model wrote runs."""

import html
import json
import re
import shutil
import subprocess

import pyarrow.parquet as pq
import pytest
from synthetic_run import write_forks, write_run

from posttrain.report.html import write_report
from posttrain.training.record import write_rollouts

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

USE = """
const out = {};
const detail = () => document.querySelector(".detail").textContent;
const found = () => document.querySelector(".found").textContent;
const form = document.querySelector(".filters");
const set = (name, value) => {
  form.elements.namedItem(name).value = value;
  form.dispatchEvent(new Event("input", { bubbles: true }));
};
const press = (target, key) => target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
out.charts = document.querySelectorAll("[data-chart] svg").length;
const paths = [...document.querySelectorAll("[data-chart] path.smooth")];
out.drawn = paths.every((path) => path.getAttribute("d").length > 0);
out.histograms = document.querySelectorAll("[data-histogram] rect.late").length;
out.all = found();
const first = detail();
[...document.querySelectorAll(".detail header button")][1].click();
out.next = detail() !== first;
press(document.body, "k");
out.back = detail() === first;
press(document.querySelector("[role=listbox]"), "ArrowDown");
out.down = detail() !== first;
set("stage", "03-policy");
out.stage = found();
set("step", "2");
out.step = found();
set("kind", "unscored");
out.unscored = detail();
set("kind", "any");
set("low", "1");
out.rewards = [...document.querySelectorAll(".list li b")].map((b) => +b.textContent);
set("text", "no such text anywhere");
out.none = detail();
form.querySelector("[type=reset]").click();
out.cleared = found();
const plot = document.querySelector("[data-sync]:last-of-type .plot");
plot.focus();
press(plot, "Home");
out.readouts = [...document.querySelectorAll("[data-sync]:last-of-type .readout")].map((p) => p.textContent);
form.querySelector("[type=reset]").click();
set("stage", "05-policy");
const lanes = () => [...document.querySelectorAll(".tree .lane")];
out.lanes = lanes().length;
out.joints = document.querySelectorAll(".tree path.given").length;
const views = () => [...document.querySelectorAll(".views button")];
out.views = views().map((button) => button.textContent);
const spans = () => [...document.querySelectorAll(".coloured span")];
const colours = () => new Set(spans().map((span) => span.style.background));
out.summed = colours().size;
views().find((button) => button.textContent === "Advantage, outcome").click();
out.outcome = colours().size;
out.spelled = document.querySelector(".coloured").textContent;
lanes()[1].dispatchEvent(new MouseEvent("click", { bubbles: true }));
out.lane = document.querySelector(".detail h3").textContent;
set("role", "probe");
out.probes = found();
out.fork = detail();
document.title = JSON.stringify(out);
"""


def load(path, tmp_path):
    """The document after its scripts have run, as text."""
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1280,2000",
        "--virtual-time-budget=2000",
        "--dump-dom",
        path.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def title(document):
    return html.unescape(re.search(r"<title>(.*?)</title>", document, re.DOTALL)[1])


def test_charts_and_rollout_browser_work(tmp_path):
    run = write_run(tmp_path / "run")
    write_forks(run)
    report = write_report(run)
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", report.read_text())
    report.write_text(text.replace("</body>", f"<script>{USE}</script></body>"))
    out = json.loads(title(load(report, tmp_path)))
    assert out["charts"] > 10
    assert out["drawn"]
    assert out["histograms"] > 4
    total = int(out["all"].split()[0])
    assert (out["next"], out["back"], out["down"]) == (True, True, True)
    in_stage, in_step = (int(out[key].split(" of ")[0]) for key in ("stage", "step"))
    assert 0 < in_step < in_stage < total
    assert "no result within 5 s" in out["unscored"]
    assert out["rewards"]
    assert min(out["rewards"]) >= 1
    assert "No rollout matches" in out["none"]
    assert out["cleared"] == out["all"]
    assert out["readouts"]
    assert all("step 1" in readout for readout in out["readouts"])
    assert out["lanes"] == 7  # three solutions, one of them drawn twice, and three forks
    assert out["views"] == [
        "Text",
        "All channels, weighted",
        "Advantage, outcome",
        "Advantage, progress",
        "Surprise",
    ]
    assert (out["summed"], out["outcome"]) == (2, 1)  # progress was made in the second half
    assert out["spelled"].startswith("First ")
    assert "#" in out["lane"]
    assert out["probes"].startswith("3 of ")
    assert "of 7/solution/0, after 8 tokens" in out["fork"]


def test_neither_completions_nor_added_scripts_run(tmp_path):
    run_dir = write_run(tmp_path / "run")
    path = run_dir / "rollouts/02-evaluate/samples.parquet"
    hostile = "</script><script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"
    rows = [row | {"completion": hostile, "prompt": hostile} for row in pq.read_table(path).to_pylist()]
    write_rollouts(path, rows)
    report = write_report(run_dir)
    report.write_text(
        report.read_text().replace("</body>", "<script>document.title = 'added'</script></body>")
    )
    document = load(report, tmp_path)
    assert 'data-ready="true"' in document
    assert title(document) == "arithmetic · posttrain report"
    assert "&lt;img src=x onerror=" in document
