"""Scoring: mathematics against TRL's, a reward behind HTTP against its bound, a reward model in batches.

What scores is started, and its libraries are imported, before the clock runs. Of mathematics every pair of
runs has problems of its own, in a random order of kinds; in the warm-up pair before them both sides' parsers
learn their grammar, which takes seconds once in a process.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence

from benchmarks.completions import make_rollouts
from benchmarks.harness import Comparison, Sample, Settings, alternate, require

from posttrain.recipe.schema import RewardOptions, RewardSpec
from posttrain.rewards.builtin import answer_pair
from posttrain.rewards.scorer import Scorer
from posttrain.rollout.types import Rollout

PROMPTS, GROUP = 250, 8
MATHS_LIMIT, WITHOUT_SHARING_LIMIT = 0.25, 0.50
WORKERS = 2

Values = list[float | None]


def compare(settings: Settings) -> list[Comparison]:
    return [_maths(settings, share=True), _maths(settings, share=False)]


# --- mathematics ------------------------------------------------------------------------------------------


def _maths(settings: Settings, share: bool) -> Comparison:
    from trl.rewards import accuracy_reward

    seeds = itertools.count(1000 * settings.seed)
    rollouts: list[Rollout] = []
    shapes: list[dict[str, int]] = []

    def ours() -> Sample[Values]:
        rollouts[:] = make_rollouts(next(seeds), PROMPTS, GROUP)
        start = time.perf_counter()
        scorer.score(rollouts)
        seconds = time.perf_counter() - start
        shapes.append(_shape(rollouts))
        return Sample(seconds, [rollout.rewards["math_answer"] for rollout in rollouts])

    def theirs() -> Sample[Values]:
        values: Values = []
        start = time.perf_counter()
        for _, group in itertools.groupby(rollouts, key=lambda rollout: rollout.request.group):
            texts, answers = zip(*((r.completion.text, r.request.example.answer) for r in group), strict=True)
            messages = [[{"role": "assistant", "content": text}] for text in texts]
            values += accuracy_reward(messages, list(answers))
        return Sample(time.perf_counter() - start, values)

    def check(a: Values, b: Values) -> None:
        differ = [at for at, (left, right) in enumerate(zip(a, b, strict=True)) if left != right]
        shown = [
            (rollouts[at].completion.text[-40:], rollouts[at].request.example.answer) for at in differ[:3]
        ]
        require(not differ, f"{len(differ)} of {len(a)} rewards, such as {shown}")

    with Scorer([RewardSpec(name="math_answer")], RewardOptions(workers=WORKERS), share=share) as scorer:
        values = alternate(ours, theirs, settings.pairs(), check)
    return Comparison(
        name=f"mathematics, {'equal answers once' if share else 'every completion by itself'}",
        theirs_is="a loop over groups with TRL's accuracy_reward",
        unit="seconds",
        limit=MATHS_LIMIT if share else WITHOUT_SHARING_LIMIT,
        ours=values[0],
        theirs=values[1],
        shapes={"prompts": PROMPTS, "group": GROUP, "workers": WORKERS, "cores": os.cpu_count()},
        note="" if share else "With Scorer(share=False).",
        details={"completions of each run, the warm-up first": shapes},
    )


def _shape(rollouts: Sequence[Rollout]) -> dict[str, int]:
    pairs = [answer_pair(rollout.completion, rollout.request.example) for rollout in rollouts]
    return {
        "different answers": len(set(pairs)),
        "right": sum(rollout.rewards["math_answer"] == 1 for rollout in rollouts),
        "without an answer": sum(answer is None for answer, _ in pairs),
        "median characters": sorted(len(rollout.completion.text) for rollout in rollouts)[len(rollouts) // 2],
    }
