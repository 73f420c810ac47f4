"""Sampled and greedy accuracy before and after GRPO, on problems the model has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reproductions.common import ROOT, claim, metric, run, summary

SEEDS = (0, 1, 2)
RECIPE = ROOT / "recipes" / "tiny" / "quickstart.yaml"
FAST = ("stages[0].sft.max_steps=2", "stages[2].policy.steps=1", "data.eval.size=16")


def measure(seeds: Sequence[int], fast: bool) -> dict[str, Any]:
    """About three minutes for each seed."""
    kind = "-fast" if fast else ""
    folders = [
        run(RECIPE, f"reproduce-quickstart{kind}-{seed}", [f"seed={seed}", *(FAST if fast else ())])
        for seed in seeds
    ]
    summaries = [summary(folder) for folder in folders]

    def values(stage: int, name: str) -> list[float]:
        return [metric(folder, stage, name) for folder in folders]

    before, after = values(0, "pass@1"), values(-1, "pass@1")
    greedy_before, greedy_after = values(0, "greedy"), values(-1, "greedy")
    gains = [b - a for a, b in zip(greedy_before, greedy_after, strict=True)]
    training = [
        sum(stage["seconds"] for stage in found["stages"] if stage["kind"] != "evaluate")
        for found in summaries
    ]
    return {
        "budgets": {"tokens_sampled": [found["tokens_sampled"] for found in summaries]},
        "arms": {
            "warm start": {"pass@1": before, "greedy": greedy_before},
            "grpo": {"pass@1": after, "greedy": greedy_after},
        },
        "seconds": {"training": training, "all": [found["seconds"] for found in summaries]},
        "versions": summaries[0]["versions"],
        "claims": [
            claim("sampled accuracy after the warm start", "< 0.45", before, max(before) < 0.45),
            claim("sampled accuracy after GRPO", "> 0.70", after, min(after) > 0.70),
            claim("gain in greedy accuracy", ">= 0.10", gains, min(gains) >= 0.10),
        ],
    }
