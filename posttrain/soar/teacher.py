"""The teacher: proposals by rejection sampling, and one update on a step's sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from posttrain.recipe.soar_schema import TeacherConfig
from posttrain.rewards.scorer import Scorer
from posttrain.rollout.types import (
    Completion,
    Example,
    Rollout,
    RolloutRequest,
    Sampling,
    derive_seed,
    make_rollouts,
)
from posttrain.soar.proposals import Question, Unreadable, parse_proposal
from posttrain.training.advantages import Floats

ROLE = "proposal"
ASKED_AGAIN = 1.3
"""Proposals drawn for every one that is missing, as the next round would otherwise be missing some, too."""

BEYOND = "beyond"
"""Reason of readable proposals that were more than needed."""


@dataclass
class Proposals:
    """What the teacher wrote in a step: accepted rollouts and their questions, in the order of sampling.

    `refused` are the others, with `reasons` by rollout id.
    """

    accepted: list[Rollout] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    refused: list[Rollout] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Sampled tokens, those of refused proposals included."""
        return sum(r.completion.sampled_tokens for r in (*self.accepted, *self.refused))

    def metrics(self) -> dict[str, float]:
        """Share of readable proposals, and the refused ones by reason."""
        drawn = len(self.accepted) + len(self.refused)
        counts = Counter(self.reasons.values())
        readable = len(self.accepted) + counts.pop(BEYOND, 0)
        return {"teacher/readable": readable / max(drawn, 1), "teacher/drawn": drawn} | {
            f"teacher/refused/{reason}": count for reason, count in sorted(counts.items())
        }


class Proposer:
    """Asks the teacher's one prompt until enough of its proposals can be read.

    Accepted samples follow the teacher's distribution restricted to what can be read. Their log-probs under
    the teacher itself are enough for its update, since the advantages sum to zero (proposition 1).
    """

    def __init__(
        self,
        config: TeacherConfig,
        *,
        prompt: tuple[int, ...],
        temperature: float,
        generate: Callable[[Sequence[RolloutRequest]], list[list[Completion]]],
        scorer: Scorer,
        threshold: float,
        reward: str,
        admit: Callable[[str], None],
    ):
        """What it needs from around it.

        Args:
            config: the teacher's section of the recipe.
            prompt: the teacher's prompt.
            temperature: of the proposals, 1 in the paper.
            generate: answers requests with the teacher's weights.
            scorer: what answers are checked with.
            threshold: the value of `reward` from which an answer is right.
            reward: the reward that decides.
            admit: raises Unreadable for a question that cannot be asked.
        """
        self.config = config
        self.prompt = prompt
        self.temperature = temperature
        self.generate = generate
        self.scorer = scorer
        self.threshold = threshold
        self.reward = reward
        self.admit = admit

    def propose(self, needed: int, seed: int, group: str) -> Proposals:
        """Proposals of which `needed` are accepted; fewer when `max_draws` for each were not enough.

        Accepted proposals beyond that are not kept: leaving out the last ones is no selection.
        """
        found = Proposals()
        drawn, budget, number = 0, needed * self.config.max_draws, 0
        while len(found.accepted) < needed and drawn < budget:
            missing = needed - len(found.accepted)
            count = min(missing if number == 0 else round(missing * ASKED_AGAIN + 1), budget - drawn)
            rollouts = self._draw(count, derive_seed(seed, number), f"{group}.{number}")
            for rollout, question in zip(rollouts, self._read(rollouts), strict=True):
                if isinstance(question, str):
                    found.refused.append(rollout)
                    found.reasons[rollout.id] = question
                elif len(found.accepted) < needed:
                    found.accepted.append(rollout)
                    found.questions.append(question)
                else:
                    found.refused.append(rollout)
                    found.reasons[rollout.id] = BEYOND
            drawn += count
            number += 1
        return found

    def _draw(self, count: int, seed: int, group: str) -> list[Rollout]:
        request = RolloutRequest(
            self.prompt,
            Example("teacher", self.config.prompt),
            group,
            Sampling(self.config.max_tokens, count, self.temperature, seed=seed),
            role=ROLE,
        )
        return make_rollouts([request], self.generate([request]), 0).rollouts

    def _read(self, rollouts: Sequence[Rollout]) -> list[Question | str]:
        """The question of each proposal, or the reason why it is refused."""
        read: list[Question | str] = []
        for rollout in rollouts:
            try:
                question = parse_proposal(rollout.completion.text, self.config.format)
                self.admit(question.question)
                read.append(question)
            except Unreadable as refused:
                read.append(str(refused))
        asked = [index for index, item in enumerate(read) if isinstance(item, Question)]
        answers = {item.answer for item in read if isinstance(item, Question)}
        checkable = self._checkable(sorted(answers))
        for index in asked:
            item = read[index]
            if isinstance(item, Question) and item.answer not in checkable:
                read[index] = "uncheckable"
        return read

    def _checkable(self, answers: Sequence[str]) -> set[str]:
        """Answers that the reward can compare with: it has to find each equal to itself.

        It runs where rewards do, so that an answer which a library cannot bear costs a time-out and no run.
        """
        request = RolloutRequest((0,), Example("", ""), "", Sampling(1))
        rollouts = [
            Rollout(
                replace(request, example=Example(str(index), "", answer), group=str(index)),
                Completion((0,), (0.0,), "stop", f"\\boxed{{{answer}}}"),
                0,
                0,
            )
            for index, answer in enumerate(answers)
        ]
        if not rollouts:
            return set()
        self.scorer.score(rollouts)
        return {
            answer
            for answer, rollout in zip(answers, rollouts, strict=True)
            if (rollout.rewards[self.reward] or 0.0) >= self.threshold
        }


def spread(advantages: Floats, size: int) -> list[float]:
    """The advantage of every rollout: that of its set, for sets of `size` one after the other."""
    return [float(value) for value in advantages for _ in range(size)]
