"""Score rollouts with a recipe's rewards. A reward that fails leaves its sample without a score."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import RecipeError
from posttrain.rewards.builtin import CANONICAL_INPUTS, runs_in_process
from posttrain.rewards.cache import CacheKeys, RewardCache
from posttrain.rewards.calling import Outcome, Result, Sample, load_reward, without_logprobs
from posttrain.rewards.combine import Combination
from posttrain.rewards.model_reward import prompt_and_text
from posttrain.rewards.model_server import ModelServers
from posttrain.rewards.outage import Pause
from posttrain.rewards.pool import WorkerPool
from posttrain.rewards.registry import RewardInfo, is_builtin, locate
from posttrain.rewards.shared import SharedEngine, asks_engine, judge_units
from posttrain.rewards.worker import Job
from posttrain.rollout.types import Completion, Rollout

if TYPE_CHECKING:
    from types import TracebackType

    from posttrain.recipe.schema import RewardModelConfig, RewardOptions, RewardSpec

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
    slowest: float = 0.0
    """Seconds of the longest call."""
    cached: int = 0
    """Samples whose value was known from an earlier step or an earlier attempt at the run."""
    counts: Counter[str] = field(default_factory=Counter)
    """What the reward counted itself (`posttrain.rewards.counts`)."""
    paused_seconds: float = 0.0
    """Seconds for which what the reward depends on was waited for."""
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
    def counts(self) -> dict[str, float]:
        """What there is to report, by the name of the metric: cache hits, errors of each kind, what rewards
        counted, seconds that they were waited for.
        """
        found: dict[str, float] = {"rewards/cache_hits": sum(stats.cached for stats in self.rewards.values())}
        for name, stats in self.rewards.items():
            found |= {f"rewards/{name}/errors/{kind}": count for kind, count in stats.errors.items()}
            found |= {f"rewards/{name}/counts/{key}": count for key, count in stats.counts.items()}
            if stats.paused_seconds:
                found |= {f"rewards/{name}/paused": 1, f"rewards/{name}/paused_seconds": stats.paused_seconds}
        return found

    @property
    def error_lines(self) -> list[str]:
        """The first errors of every reward."""
        return [line for stats in self.rewards.values() for line in stats.error_lines]


class Scorer:
    """The rewards of a recipe, ready to score.

    Function rewards run in `options.workers` processes that are killed when a sample takes too long; only
    built-ins that cannot hang and judges that ask the run's own engine run in this process. The values do not
    depend on the number of workers. What is done about rollouts without a score is the caller's decision.
    Calls from several threads take turns.

    A reward that raises RewardUnavailable is waited for: its calls without an answer are repeated until they
    have one, for at most `options.max_outage` seconds; all other results are kept. With `max_outage` 0 its
    samples have failed.
    """

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        options: RewardOptions,
        cache: Path | None = None,
        share: bool = True,
        say: Callable[[str], None] = print,
        check: Callable[[], None] = lambda: None,
        engine: SharedEngine | None = None,
        models: Mapping[str, RewardModelConfig] | None = None,
        logs: Path | None = None,
    ):
        """Load all rewards.

        Args:
            specs: the rewards.
            options: what happens around them.
            cache: this process's file of known values; None keeps none between two calls.
            share: whether equal samples of a reward that is declared deterministic share one call.
            say: takes lines about rewards that are waited for.
            check: called while one is; may raise to end that.
            engine: what judges ask that are to ask the run's own engine; without it they cannot score.
            models: reward models that the rewards may name.
            logs: folder for the logs of servers that are started for them.

        Raises:
            RecipeError: an unknown or repeated reward, or wrong arguments.
            RewardError: a reward's code cannot be loaded, or the cache cannot be used.
        """
        names = [spec.name for spec in specs]
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise RecipeError(f"reward {repeated[0]!r} is listed twice")
        sources = [locate(spec, models) for spec in specs]
        self.combination = Combination(specs)
        builtin = {source.name: source.registered or "" for source in sources if is_builtin(source)}
        local = [s for s in sources if s.name in builtin and runs_in_process(builtin[s.name], s.args)]
        shared = [source for source in sources if source.name in builtin and asks_engine(source)]
        self._remote = [source for source in sources if source not in local and source not in shared]
        self._local = {source.name: load_reward(source) for source in local}
        self._shared = {source.name: load_reward(source) for source in shared}
        self._engine = engine
        self._canonical = {name: CANONICAL_INPUTS.get(known) for name, known in builtin.items()}
        self._workers = options.workers
        self._share = share
        self._max_outage = options.max_outage
        self._say = say
        self._check = check
        self._cache = RewardCache(cache) if cache is not None and self._remote else None
        self._pool = WorkerPool(self._remote, self._workers, options.memory_gib) if self._remote else None
        infos = {name: function.info for name, function in {**self._local, **self._shared}.items()}
        infos |= {loaded.info.name: loaded.info for loaded in (self._pool.rewards if self._pool else [])}
        pause = Pause(self._max_outage, say, check) if self._max_outage else None
        try:
            self._models = ModelServers(infos.values(), logs, pause)
        except BaseException:
            if self._pool is not None:
                self._pool.close()
            raise
        infos |= self._models.infos
        self._canonical |= dict.fromkeys(self._models.infos, prompt_and_text)
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
        if self._cache is not None:
            self._cache.close()
            self._cache = None
        self._models.close()

    def score(self, rollouts: Sequence[Rollout], step: int | None = None) -> ScoreReport:
        """Fill `rewards`, `reward_errors`, `reward_versions` and `reward` of every rollout.

        `reward` is the weighted sum over the rewards that apply at `step` (`Combination.total`). It is None,
        the rollout is unscored, if one of them failed or none applies; rewards of weight 0 are only recorded.
        TRL-style rewards see `step` as `trainer_state.global_step`.

        Raises:
            RewardError: what a reward depends on was away for longer than `max_outage`.
        """
        with self._lock:
            tally = _Tally(self.infos, len(rollouts))
            self._run(rollouts, step, tally)
        for index, rollout in enumerate(rollouts):
            own = {name: tally.outcomes[name][index] for name in self.infos}
            rollout.rewards |= {name: outcome.value for name, outcome in own.items()}
            rollout.reward_versions |= {name: info.fingerprint for name, info in self.infos.items()}
            for name in own:
                rollout.reward_errors.pop(name, None)
            failed = {n: f"{o.error}: {o.message}" for n, o in own.items() if o.error is not None}
            rollout.reward_errors |= failed
            rollout.reward = self.combination.total(rollout.rewards, failed, step)
        return ScoreReport(
            samples=len(rollouts),
            unscored=sum(rollout.reward is None for rollout in rollouts),
            rewards={name: _stats(info, tally, rollouts) for name, info in self.infos.items()},
        )

    def _run(self, rollouts: Sequence[Rollout], step: int | None, tally: _Tally) -> None:
        """Have every reward score every rollout."""
        samples: list[Sample] = [(_whole(rollout), rollout.request.example) for rollout in rollouts]
        for name, function in self._local.items():
            for index, sample in enumerate(samples):
                tally.deliver(name, [[index]], function([sample], step))
        for name, judge in self._shared.items():
            units = _units(judge.info, rollouts)
            contents = [[samples[index] for index in unit] for unit in units]
            for unit, result in zip(units, judge_units(judge, contents, self._engine), strict=True):
                tally.deliver(name, [unit], result)
        if self._pool is None:
            return
        calls = [self._calls(reward, rollouts, samples, step, tally) for reward in range(len(self._remote))]
        waiting: dict[int, list[int]] = {}
        away: dict[str, str] = {}

        def deliver(reward: int, number: int, result: Result) -> None:
            call, name = calls[reward][number], self._remote[reward].name
            if self._max_outage and result.unavailable:
                waiting.setdefault(reward, []).append(number)
                away.setdefault(name, result.unavailable)
                tally.counts[name].update(result.counts)
                return
            tally.deliver(name, call.units, result)
            if self._cache is not None and call.key and all(o.error is None for o in result.outcomes):
                self._cache.add(call.key, [outcome.value for outcome in result.outcomes])

        def jobs(numbers: Mapping[int, Sequence[int]]) -> list[Job]:
            return [
                job
                for reward in numbers
                for job in self._jobs(reward, calls[reward], numbers[reward], samples, step)
            ]

        self._models.ensure(
            (self._remote[reward].name for reward, own in enumerate(calls) if own), self._check
        )
        self._pool.run(jobs({reward: range(len(own)) for reward, own in enumerate(calls)}), deliver)
        pause = Pause(self._max_outage, self._say, self._check)
        pause.note(away)
        while waiting:
            pause.wait()
            self._models.ensure((self._remote[reward].name for reward in waiting), self._check)
            again = jobs(waiting)
            waiting.clear()
            away.clear()
            self._pool.run(again, deliver, self._check)
            pause.note(away)
        tally.paused |= pause.seconds

    def _calls(
        self,
        reward: int,
        rollouts: Sequence[Rollout],
        samples: list[Sample],
        step: int | None,
        tally: _Tally,
    ) -> list[_Call]:
        """What has to be computed: one call for all units with equal input, none for those that are known."""
        assert self._pool is not None
        source, sees_step = self._remote[reward], self._pool.rewards[reward].sees_step
        info = self.infos[source.name]
        units = _units(info, rollouts)
        if not (info.deterministic and self._share):
            return [_Call([unit]) for unit in units]
        keys = CacheKeys(info, source.args, self._canonical.get(info.name), step if sees_step else None)
        calls: dict[str, _Call] = {}
        for unit in units:
            key = keys.of([samples[index] for index in unit])
            known = None if self._cache is None else self._cache.get(key)
            if known is not None:
                tally.deliver(info.name, [unit], Result([Outcome(value) for value in known]))
                tally.cached[info.name] += len(unit)
            else:
                calls.setdefault(key, _Call([], key)).units.append(unit)
        return list(calls.values())

    def _jobs(
        self,
        reward: int,
        calls: Sequence[_Call],
        numbers: Sequence[int],
        samples: Sequence[Sample],
        step: int | None,
    ) -> Iterator[Job]:
        """Jobs that make the calls of these numbers: one for an async reward, else enough for all workers."""
        assert self._pool is not None
        info, concurrent = self.infos[self._remote[reward].name], self._pool.rewards[reward].concurrent
        share = len(numbers) if concurrent else min(len(numbers) // (4 * self._workers), MAX_JOB_UNITS)
        size = max(share, 1)
        visible = without_logprobs if info.deterministic else _as_it_is
        for start in range(0, len(numbers), size):
            ids = list(numbers[start : start + size])
            content = [[visible(samples[index]) for index in calls[number].units[0]] for number in ids]
            yield Job(reward, content, ids, step)


@dataclass
class _Call:
    """One call of a reward: units (indices of rollouts) with equal input, the first of which is computed."""

    units: list[list[int]]
    key: str = ""


class _Tally:
    """What the rewards gave in one call of the scorer, by their names."""

    def __init__(self, names: Iterable[str], samples: int):
        self.outcomes = {name: [Outcome()] * samples for name in names}
        self.seconds = dict.fromkeys(self.outcomes, 0.0)
        self.slowest = dict.fromkeys(self.outcomes, 0.0)
        self.cached = dict.fromkeys(self.outcomes, 0)
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in self.outcomes}
        self.paused = dict.fromkeys(self.outcomes, 0.0)

    def deliver(self, name: str, units: Iterable[Sequence[int]], result: Result) -> None:
        """Note the result of one call, whose outcomes are those of all its units."""
        self.seconds[name] += result.seconds
        self.slowest[name] = max(self.slowest[name], result.seconds)
        self.counts[name].update(result.counts)
        for unit in units:
            for index, outcome in zip(unit, result.outcomes, strict=True):
                self.outcomes[name][index] = outcome


def _whole(rollout: Rollout) -> Completion:
    """The completion as a reward sees it: with the beginning that the prompt gave."""
    given, completion = rollout.request.given, rollout.completion
    return replace(completion, text=given + completion.text) if given else completion


def _units(info: RewardInfo, rollouts: Sequence[Rollout]) -> list[list[int]]:
    """What a reward is called with at a time: indices of single rollouts, or of those of a group."""
    units: dict[Hashable, list[int]] = {}
    for index, rollout in enumerate(rollouts):
        units.setdefault(rollout.request.group if info.batched else index, []).append(index)
    return list(units.values())


def _as_it_is(sample: Sample) -> Sample:
    return sample


def _stats(info: RewardInfo, tally: _Tally, rollouts: Sequence[Rollout]) -> RewardStats:
    outcomes = tally.outcomes[info.name]
    values = [outcome.value for outcome in outcomes if outcome.value is not None]
    failed = [
        (outcome, rollout) for outcome, rollout in zip(outcomes, rollouts, strict=True) if outcome.error
    ]
    return RewardStats(
        scored=len(values),
        not_applicable=len(outcomes) - len(values) - len(failed),
        errors=Counter(str(outcome.error) for outcome, _ in failed),
        mean=sum(values) / len(values) if values else None,
        seconds=tally.seconds[info.name] / max(len(outcomes), 1),
        slowest=tally.slowest[info.name],
        cached=tally.cached[info.name],
        counts=tally.counts[info.name],
        paused_seconds=tally.paused[info.name],
        error_lines=[
            f"reward {info.name} (version {info.version}), example {rollout.request.example.id!r}, "
            f"completion {rollout.index}: {outcome.error}: {outcome.message}"
            for outcome, rollout in failed[:MAX_ERROR_LINES]
        ],
    )
