"""Make preference pairs for the tiny reasoner's arithmetic: a right worked solution against a wrong one.

Of the training pairs a quarter is labelled the wrong way round, at random; the column `flipped` says which,
for audits alone. The test pairs are clean, and share no problem with the training pairs. `error` says what is
wrong with the wrong solution.

    ./scripts/make_preferences                    # writes data/preferences/{train,test}.jsonl
    ./scripts/make_preferences --output DIR
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.data.tasks import make_task
from posttrain.rollout.types import derive_seed

ROOT = Path(__file__).resolve().parent.parent

TASK = {"min_terms": 3, "max_terms": 3}
ERRORS = ("digit", "extra", "sign")
SIZES = {"train": 800, "test": 500}
FLIPPED = {"train": 0.25, "test": 0.0}


def solution(first: int, terms: list[int], error: str | None, at: int) -> str:
    """A worked solution. `error` happens in the step with index `at`; what follows goes on from there.

    digit: of the result only the last digit is kept; extra: the result gets a ten that it does not have, or
    in the second step a sign, so that neither long nor short solutions are the right ones; sign: the term is
    taken with the other sign.
    """
    value, steps = first, []
    for index, term in enumerate(terms):
        here = error if index == at else None
        result = value - term if here == "sign" else value + term
        if here == "digit":
            result = abs(result) % 10
        if here == "extra":
            result = -result if at % 2 and 0 < result < 10 else result + (10 if result >= 0 else -10)
        steps.append(f"{value}{term:+d}={result}")
        value = result
    return f"<think>{';'.join(steps)}</think>{value}"


def pairs(split: str, size: int, flipped: float, seed: int) -> Iterator[dict[str, Any]]:
    """Preference pairs of one split; the flipped ones are an exact share of them, at random places."""
    rng = np.random.default_rng(derive_seed("preferences", split, seed))
    wrong_labels = set(rng.permutation(size)[: round(flipped * size)].tolist())
    for index, example in enumerate(make_task("arithmetic", size=size, seed=seed, split=split, **TASK)):
        first, *terms = map(int, re.findall(r"[+-]?\d+", str(example.prompt)))
        right = solution(first, terms, None, 0)
        found: dict[str, list[str]] = {}
        for error in ERRORS:
            made = (solution(first, terms, error, at) for at in range(len(terms)))
            # Some errors change nothing, or cancel out.
            if wrong := [text for text in made if text.rpartition(">")[2] != example.answer]:
                found[error] = wrong
        error = str(rng.choice(list(found)))
        wrong_solution = found[error][int(rng.integers(len(found[error])))]
        chosen, rejected = (wrong_solution, right) if index in wrong_labels else (right, wrong_solution)
        row = {"prompt": example.prompt, "chosen": chosen, "rejected": rejected, "error": error}
        yield {**row, "flipped": index in wrong_labels} if flipped else row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "data" / "preferences")
    parser.add_argument("--seed", type=int, default=1, help="0 is what settings were chosen on")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for split, size in SIZES.items():
        path = options.output / f"{split}.jsonl"
        rows = list(pairs(split, size, FLIPPED[split], options.seed))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{path}: {len(rows)} pairs, {sum(row.get('flipped', False) for row in rows)} of them flipped")


if __name__ == "__main__":
    main()
