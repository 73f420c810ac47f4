"""A verifier that is wrong about some of the completions, for testing what a method does with that."""

from __future__ import annotations

from posttrain.data.answers import extract_answer
from posttrain.rewards.registry import reward
from posttrain.rollout.types import Completion, Example, derive_seed


@reward("noisy_match", version="1", range=(0.0, 1.0), deterministic=False, batched=True)
def noisy_match(completions: list[Completion], examples: list[Example], *, flip: float = 0.3) -> list[float]:
    """Whether the answer equals the example's as text, turned round for a share `flip` of the completions.

    Which ones depends on the group of completions and the place in it, so equal completions fare differently.
    """
    seed = derive_seed(*(completion.token_ids for completion in completions))
    values = []
    for place, (completion, example) in enumerate(zip(completions, examples, strict=True)):
        correct = extract_answer(completion.written) == example.answer
        flipped = derive_seed(seed, example.id, place) / 2**63 < flip
        values.append(float(correct != flipped))
    return values
