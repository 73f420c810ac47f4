"""Score rollouts with a recipe's rewards. A reward that fails leaves its sample without a score."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from posttrain.errors import RecipeError
from posttrain.rewards.builtin import MERGE_KEYS, runs_in_process
from posttrain.rewards.calling import Outcome, Sample, load_reward
from posttrain.rewards.pool import WorkerPool
from posttrain.rewards.registry import RewardInfo, is_builtin, locate
from posttrain.rewards.worker import Job
from posttrain.rollout.types import Rollout

if TYPE_CHECKING:
    from types import TracebackType

    from posttrain.recipe.schema import RewardOptions, RewardSpec

MAX_JOB_UNITS = 32
"""Units a worker gets at a time: enough to hide the messages, few enough to keep all workers busy."""
MAX_ERROR_LINES = 10
"""Error lines kept of each reward; the counts are complete."""


@dataclass
class RewardStats:
    """How one reward did in one call of the scorer."""

    scored: int = 0
    not_applicable: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    """Samples without a value, by kind (`posttrain.rewards.calling.ErrorKind`)."""
    mean: float | None = None
    """Mean value of the scored samples."""
    seconds: float = 0.0
    """Mean seconds a sample took, samples that shared a call included."""
    error_lines: list[str] = field(default_factory=list)
    """The first errors in order of the rollouts, each with reward, version and example."""


@dataclass
class ScoreReport:
    """What one call of the scorer did."""

    samples: int
    unscored: int
    """Rollouts whose `reward` is None."""
    rewards: dict[str, RewardStats]

    @property
    def errors(self) -> int:
        """Samples without a value, over all rewards."""
        return sum(stats.errors.total() for stats in self.rewards.values())

    @property
    def error_lines(self) -> list[str]:
        """The first errors of every reward."""
        return [line for stats in self.rewards.values() for line in stats.error_lines]


class Scorer:
    """The rewards of a recipe, ready to score.

    Function rewards run in `options.workers` processes that are killed when a sample takes too long; only
    built-ins that cannot hang run in this process. The values do not depend on the number of workers. What
    is done about rollouts without a score is the caller's decision. Calls from several threads take turns.
    """

    def __init__(self, specs: Sequence[RewardSpec], options: RewardOptions):
        """Load all rewards.

        Raises:
            RecipeError: an unknown or repeated reward, or wrong arguments.
            RewardError: a reward's code cannot be loaded.
        """
        names = [spec.name for spec in specs]
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise RecipeError(f"reward {repeated[0]!r} is listed twice")
        sources = [locate(spec) for spec in specs]
        self._weights = {spec.name: spec.weight for spec in specs}
        builtin = {source.name for source in sources if is_builtin(source)}
        local = [s for s in sources if s.name in builtin and runs_in_process(s.name, s.args)]
        remote = [source for source in sources if source not in local]
        self._local = {source.name: load_reward(source) for source in local}
        self._remote = [source.name for source in remote]
        self._merge_keys = {name: key for name, key in MERGE_KEYS.items() if name in builtin}
        self._workers = options.workers
        self._pool = WorkerPool(remote, self._workers) if remote else None
        infos = {name: function.info for name, function in self._local.items()}
        infos |= {info.name: info for info, _ in (self._pool.rewards if self._pool else [])}
        self.infos: dict[str, RewardInfo] = {name: infos[name] for name in names}
        self._lock = threading.Lock()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes. The scorer cannot be used afterwards; closing twice is harmless."""
        if self._pool is not None:
            self._pool.close()

    def score(self, rollouts: Sequence[Rollout], step: int | None = None) -> ScoreReport:
        """Fill `rewards`, `reward_errors` and `reward` of every rollout.

        `reward` is the weighted sum over the rewards that apply. It is None, the rollout is unscored, if one
        of them failed or none applies; rewards of weight 0 are only recorded and have no say in this.
        TRL-style rewards see `step` as `trainer_state.global_step`.
        """
        with self._lock:
            outcomes, seconds = self._run(rollouts, step)
        for index, rollout in enumerate(rollouts):
            own = {name: outcomes[name][index] for name in self.infos}
            rollout.rewards |= {name: outcome.value for name, outcome in own.items()}
            for name in own:
                rollout.reward_errors.pop(name, None)
            rollout.reward_errors |= {
                n: f"{o.error}: {o.message}" for n, o in own.items() if o.error is not None
            }
            rollout.reward = self._total(own)
        return ScoreReport(
            samples=len(rollouts),
            unscored=sum(rollout.reward is None for rollout in rollouts),
            rewards={n: _stats(self.infos[n], outcomes[n], seconds[n], rollouts) for n in self.infos},
        )

    def _total(self, outcomes: dict[str, Outcome]) -> float | None:
        used = {name: outcome for name, outcome in outcomes.items() if self._weights[name] != 0}
        if any(outcome.error is not None for outcome in used.values()):
            return None
        parts = [self._weights[n] * outcome.value for n, outcome in used.items() if outcome.value is not None]
        return sum(parts) if parts else None

    def _run(
        self, rollouts: Sequence[Rollout], step: int | None
    ) -> tuple[dict[str, list[Outcome]], dict[str, float]]:
        """Outcomes of every reward in the order of the rollouts, and the total seconds they took."""
        samples: list[Sample] = [(rollout.completion, rollout.request.example) for rollout in rollouts]
        outcomes = {name: [Outcome()] * len(samples) for name in self.infos}
        seconds = dict.fromkeys(self.infos, 0.0)
        for name, function in self._local.items():
            start = time.perf_counter()
            outcomes[name] = [function([sample], step)[0] for sample in samples]
            seconds[name] = time.perf_counter() - start

        units = [self._units(name, rollouts) for name in self._remote]

        def deliver(reward: int, unit: int, results: list[Outcome], elapsed: float) -> None:
            name, indices = self._remote[reward], units[reward][unit]
            seconds[name] += elapsed
            merged = name in self._merge_keys
            for index, outcome in zip(indices, results * len(indices) if merged else results, strict=True):
                outcomes[name][index] = outcome

        if self._pool is not None:
            jobs = [
                job
                for reward in range(len(units))
                for job in self._jobs(reward, units[reward], samples, step)
            ]
            self._pool.run(jobs, deliver)
        return outcomes, seconds

    def _units(self, name: str, rollouts: Sequence[Rollout]) -> list[list[int]]:
        """Indices of the rollouts that one call scores: a group, equal answers, or a single one."""
        units: dict[Hashable, list[int]] = {}
        merge_key = self._merge_keys.get(name)
        for index, rollout in enumerate(rollouts):
            key: Hashable = index
            if self.infos[name].batched:
                key = rollout.request.group
            elif merge_key is not None:
                key = merge_key(rollout.completion, rollout.request.example)
            units.setdefault(key, []).append(index)
        return list(units.values())

    def _jobs(
        self, reward: int, units: list[list[int]], samples: list[Sample], step: int | None
    ) -> list[Job]:
        size = min(max(len(units) // (4 * self._workers), 1), MAX_JOB_UNITS)
        merged = self._remote[reward] in self._merge_keys
        content = [[samples[index] for index in (unit[:1] if merged else unit)] for unit in units]
        return [
            Job(reward, content[at : at + size], list(range(at, min(at + size, len(units)))), step)
            for at in range(0, len(units), size)
        ]


def _stats(
    info: RewardInfo, outcomes: list[Outcome], seconds: float, rollouts: Sequence[Rollout]
) -> RewardStats:
    values = [outcome.value for outcome in outcomes if outcome.value is not None]
    failed = [
        (outcome, rollout) for outcome, rollout in zip(outcomes, rollouts, strict=True) if outcome.error
    ]
    return RewardStats(
        scored=len(values),
        not_applicable=len(outcomes) - len(values) - len(failed),
        errors=Counter(str(outcome.error) for outcome, _ in failed),
        mean=sum(values) / len(values) if values else None,
        seconds=seconds / max(len(outcomes), 1),
        error_lines=[
            f"reward {info.name} (version {info.version}), example {rollout.request.example.id!r}, "
            f"completion {rollout.index}: {outcome.error}: {outcome.message}"
            for outcome, rollout in failed[:MAX_ERROR_LINES]
        ],
    )
