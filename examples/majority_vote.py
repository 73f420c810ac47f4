"""A method of your own: reinforcement learning without labels, from the majority's answer.

"TTRL: Test-time reinforcement learning" (Zuo et al., arXiv:2504.16084): the answer that most of a problem's
completions give is taken for the right one, and a completion is paid for agreeing with it. In a recipe:

    methods: [{"examples/majority_vote.py:MajorityVote": {min_share: 0.5}}]
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from posttrain.data.answers import extract_answer
from posttrain.methods.base import Channel, Method, StepContext
from posttrain.rollout.types import RolloutBatch
from posttrain.training.advantages import group_advantages


class MajorityConfig(BaseModel):
    """Options, as a recipe gives them."""

    model_config = ConfigDict(extra="forbid")
    min_share: float = Field(default=0.0, ge=0.0, le=1.0)
    """Leave a problem out when a smaller share of its completions agree."""


class MajorityVote(Method):
    """Replaces the channel of the recipe's rewards: they are still computed and logged, and teach nothing."""

    name = "majority_vote"
    Config = MajorityConfig
    config: MajorityConfig

    def channels(self, batch: RolloutBatch, context: StepContext) -> list[Channel]:
        """One channel: the advantages of agreeing."""
        ids, votes, groups = [], [], []
        for group, rollouts in batch.with_role("solution").groups().items():
            answers = [extract_answer(rollout.completion.written) for rollout in rollouts]
            given = Counter(answer for answer in answers if answer is not None)
            if not given:
                continue
            favourite, count = given.most_common(1)[0]
            context.log("agreement", count / len(answers))
            if count / len(answers) >= self.config.min_share:
                ids += [rollout.id for rollout in rollouts]
                votes += [float(answer == favourite) for answer in answers]
                groups += [group] * len(rollouts)
        advantages = group_advantages(np.array(votes, dtype=np.float64), groups)
        return [Channel("outcome", {key: float(value) for key, value in zip(ids, advantages, strict=True)})]
