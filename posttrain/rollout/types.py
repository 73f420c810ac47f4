"""What flows through a step: requests, completions, rollouts. Plain data; imports nothing heavy.

Example          one dataset row
Sampling         how to sample: number of completions, temperature, caps, stops, seed
RolloutRequest   a prompt to be answered, by whom (role) and for which group
Completion       one sampled answer: token ids are the truth, text is derived from them
Rollout          request + completion + rewards
RolloutBatch     rollouts of one policy version, grouped by key
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Literal

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12


@with_config(ConfigDict(extra="allow"))
class Message(TypedDict):
    """One chat message; further keys (a name, tool calls) stay with it."""

    role: str
    content: str


Prompt = str | list[Message]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Example:
    """One dataset row: what to ask, what the answer is, and every other column for the rewards."""

    id: str
    prompt: Prompt
    answer: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampling:
    """How the completions of one request are sampled.

    `temperature` 0 is greedy. Generation ends at a token of `stop_token_ids`, at the model's
    end-of-sequence token, when the decoded completion contains a string of `stop`, or after `max_tokens`;
    the tokens that ended it are kept. Tokens of `banned_ids` are never sampled, nor are those that the
    model's own configuration reserves. The logits of `scored_ids`, banned or not, are read in the pass that
    predicts each token (`Completion.scored`).
    """

    max_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    banned_ids: tuple[int, ...] = ()
    scored_ids: tuple[int, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Fork:
    """Where a continued rollout leaves the one it continues: after `at` tokens of `parent`'s completion."""

    parent: str
    at: int


@dataclass(frozen=True)
class RolloutRequest:
    """A tokenised prompt to be completed `sampling.n` times.

    `group` is the key over which advantages are normalised; `role` says what the completions are for
    ("solution" unless a method asks for something else). `given` is the text of the answer's beginning where
    the prompt ends with one, as when a rollout is continued: rewards read it before the completion. `fork`
    says which rollout that beginning is of.
    """

    prompt_ids: tuple[int, ...]
    example: Example
    group: str
    sampling: Sampling
    role: str = "solution"
    given: str = ""
    fork: Fork | None = None


@dataclass(frozen=True)
class Turn:
    """A stretch of a completion that the policy wrote: `token_ids[start:stop]`, and its text."""

    start: int
    stop: int
    text: str


@dataclass(frozen=True)
class ToolCall:
    """A call that the policy made in a completion, and what came of it.

    `name` is empty and `arguments`, else JSON, is the text as it was written where the call could not be
    read. `error` says in one word what went wrong (malformed, unknown, arguments, exception, timeout, died);
    None is a call that worked. `output` is what the policy was shown.
    """

    name: str
    arguments: str
    output: str
    seconds: float
    error: str | None = None


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    `logprobs[t]` is the natural log-probability of `token_ids[t]` under the distribution it was sampled
    from (after temperature; for greedy decoding, of the unscaled model). `loss_mask[t]` is 0 where the
    policy did not write the token (tool output), and so is its log-prob; None means the policy wrote all of
    it. `turns` are what it wrote between the tool outputs; empty for a completion sampled without tools.
    `scored[t]` are the log-probabilities of the request's K `scored_ids` among one another, at temperature 1
    and as if none were banned, in the pass that predicted `token_ids[t]`; NaN where no pass did. None without
    scored ids.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    text: str
    loss_mask: tuple[int, ...] | None = None
    turns: tuple[Turn, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    # An NDArray[np.float32] (T, K) or None; Any, because checkpoints have pydantic read these types.
    scored: Any = field(default=None, compare=False)

    @property
    def sampled_tokens(self) -> int:
        """Tokens that the policy wrote."""
        return len(self.token_ids) if self.loss_mask is None else sum(self.loss_mask)

    @property
    def written(self) -> str:
        """The text of what the policy wrote, without tool output: what an answer may be looked for in."""
        return "".join(turn.text for turn in self.turns) if self.turns else self.text


@dataclass
class Rollout:
    """A request, one of its completions, and what was found out about it.

    `rewards` holds one value per reward function: a number, or None where the reward does not apply or
    could not be computed; in the second case `reward_errors` says why. `reward_versions` has the version and
    code hash of each that was asked. `reward` is the weighted sum, None while the rollout is unscored.
    Methods may write into `info`. `redraw` is 0, or for a rollout that another has replaced, because it could
    not be scored, the number of that replacement.
    """

    request: RolloutRequest
    completion: Completion
    index: int
    policy_version: int
    rewards: dict[str, float | None] = field(default_factory=dict)
    reward_errors: dict[str, str] = field(default_factory=dict)
    reward_versions: dict[str, str] = field(default_factory=dict)
    reward: float | None = None
    info: dict[str, Any] = field(default_factory=dict)
    redraw: int = 0

    @property
    def id(self) -> str:
        """Stable name of this rollout within its step."""
        name = f"{self.request.group}/{self.request.role}/{self.index}"
        return f"{name}/drawn-{self.redraw}" if self.redraw else name

    @property
    def truncated(self) -> bool:
        """Whether the completion ran into its cap of tokens or of turns."""
        return self.completion.finish_reason == "length"


@dataclass
class RolloutBatch:
    """Rollouts of one policy version."""

    rollouts: list[Rollout]

    def __len__(self) -> int:
        return len(self.rollouts)

    def __iter__(self) -> Iterator[Rollout]:
        return iter(self.rollouts)

    def __add__(self, other: RolloutBatch) -> RolloutBatch:
        return RolloutBatch([*self.rollouts, *other.rollouts])

    def groups(self) -> dict[str, list[Rollout]]:
        """Rollouts by group key, in order of first appearance."""
        groups: dict[str, list[Rollout]] = {}
        for rollout in self.rollouts:
            groups.setdefault(rollout.request.group, []).append(rollout)
        return groups

    def filter(self, keep: Callable[[Rollout], bool]) -> RolloutBatch:
        """The rollouts for which `keep` is true."""
        return RolloutBatch([rollout for rollout in self.rollouts if keep(rollout)])

    def with_role(self, role: str) -> RolloutBatch:
        """The rollouts of one role."""
        return self.filter(lambda rollout: rollout.request.role == role)


def make_rollouts(
    requests: Sequence[RolloutRequest], completions: Iterable[Sequence[Completion]], policy_version: int
) -> RolloutBatch:
    """Pair requests with an engine's answers (same order, `sampling.n` completions each).

    Requests of one group and role are numbered on, so that every rollout has an id of its own.
    """
    numbers: dict[tuple[str, str], Iterator[int]] = {}
    return RolloutBatch(
        [
            Rollout(request, completion, next(number), policy_version)
            for request, answers in zip(requests, completions, strict=True)
            for number in [numbers.setdefault((request.group, request.role), count())]
            for completion in answers
        ]
    )


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any values: stable across processes, machines and Python versions.

    Every random choice of a run is keyed by what it is for, e.g. `derive_seed(run_seed, step, prompt_id,
    role)`, so that it does not depend on batch composition, world size or restarts.
    """
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def with_seed(request: RolloutRequest, *parts: object) -> RolloutRequest:
    """The same request with its sampling seed derived from `parts`."""
    return replace(request, sampling=replace(request.sampling, seed=derive_seed(*parts)))
