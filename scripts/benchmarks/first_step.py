"""From a fresh process to the end of one optimiser step, against a TRL script that does the same.

The quickstart's policy stage with one step. Both processes run to their end, so both also save the model, and
ours writes rollouts and report. Counted are the CPU seconds of the process and all it started.
"""

from __future__ import annotations

import json
import resource
import tempfile
from pathlib import Path

from benchmarks.harness import ROOT, Comparison, Sample, Settings, alternate, require
from benchmarks.quickstart import policy_stage, run_python, write_recipe

from posttrain.recipe.load import load_recipe

LIMIT = 0.8
WEIGHTS = "model.safetensors"


def compare(settings: Settings) -> list[Comparison]:
    with tempfile.TemporaryDirectory() as name:
        recipe = write_recipe(Path(name), "policy", settings.seed, steps=1)
        return [
            side_by_side(settings, recipe, "TRL as installed beside vLLM, which it then imports"),
            side_by_side(settings, recipe, "TRL with vLLM hidden from it", "without-vllm"),
        ]


def side_by_side(settings: Settings, recipe: Path, name: str, *options: str) -> Comparison:
    """Our run and TRL's in turns; `options` are the TRL script's."""
    folder = recipe.parent
    script = ROOT / "scripts" / "benchmarks" / "quickstart.py"

    def ours() -> Sample[int]:
        seconds = run("-m", "posttrain", "train", str(recipe), "--overwrite")
        (weights,) = (folder / "policy" / "models").glob(f"*/{WEIGHTS}")
        metrics = (folder / "policy" / "metrics.jsonl").read_text().splitlines()
        require(len(metrics) == 1, f"ours took {len(metrics)} steps")
        return Sample(seconds, weights.stat().st_size)

    def theirs() -> Sample[int]:
        seconds = run(str(script), str(recipe), str(folder / "trl"), *options)
        return Sample(seconds, (folder / "trl" / "model" / WEIGHTS).stat().st_size)

    def check(a: int, b: int) -> None:
        require(abs(a - b) < 4096, f"saved models of {a} and {b} bytes")

    values = alternate(ours, theirs, settings.pairs(), check)
    loaded = load_recipe(recipe).recipe
    stage = policy_stage(loaded)
    return Comparison(
        name=name,
        theirs_is="a script with GRPOTrainer(…).train() and save_model()",
        unit="CPU seconds",
        limit=LIMIT,
        ours=values[0],
        theirs=values[1],
        shapes={
            "model": json.loads((Path(loaded.model.path) / "config.json").read_text())["model_type"],
            "prompts": stage.prompts_per_step,
            "group": stage.group_size,
            "max_tokens": loaded.rollout.max_tokens,
        },
        note="Ours has two reward workers, and writes rollouts and the report.",
    )


def run(*arguments: str) -> float:
    """Run a Python process; its CPU seconds, with those of all processes it waited for."""
    before = _children()
    run_python(*arguments)
    return _children() - before


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
