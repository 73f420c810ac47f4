"""The order in which a policy stage goes through its prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posttrain.rollout.types import Example, derive_seed


class PromptOrder:
    """Which prompt is asked at which place of a run; a pure function of (seed, position).

    Every epoch is a new permutation. Ranks take different positions of the same order, so the prompts of a
    step do not depend on the world size, and a resumed run needs nothing but its step.
    """

    def __init__(self, examples: Sequence[Example], seed: int):
        self.examples = examples
        self.seed = seed
        self._epoch = -1
        self._order = np.zeros(0, dtype=np.int64)

    def at(self, position: int) -> Example:
        """The example at a position of the endless sequence of epochs."""
        epoch, offset = divmod(position, len(self.examples))
        if epoch != self._epoch:
            self._order = np.random.default_rng(derive_seed(self.seed, "epoch", epoch)).permutation(
                len(self.examples)
            )
            self._epoch = epoch
        return self.examples[self._order[offset]]

    def replacement(self, position: int, attempt: int) -> Example:
        """Another example for a position whose first one was of no use."""
        return self.examples[derive_seed(self.seed, "replacement", position, attempt) % len(self.examples)]
