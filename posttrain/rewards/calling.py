"""Load a reward's code, call it by its convention, and accept nothing but a number from it.

Runs in the worker processes; for the built-ins that cannot hang, in the trainer's process as well.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import math
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, NoReturn

from posttrain.errors import PosttrainError, RecipeError, RewardError, RewardUnavailable
from posttrain.redaction import redact
from posttrain.rewards.counts import counting
from posttrain.rewards.registry import (
    BUILTIN_MODULES,
    Registered,
    RewardInfo,
    RewardSource,
    declaration_of,
    registered,
)
from posttrain.rollout.types import Completion, Example
from posttrain.user_code import import_file

Sample = tuple[Completion, Example]
Style = Literal["completion", "batch", "trl"]
ErrorKind = Literal["exception", "timeout", "died", "value", "count", "unavailable"]
"""Why a sample has no score: the reward raised, took too long, ended its process, gave a value that is not a
finite number in its range, gave another number of values than there are completions, or said that what it
depends on is away."""

MAX_MESSAGE = 300


class Outcome(NamedTuple):
    """What a reward said about one sample: a value, None (does not apply), or an error."""

    value: float | None = None
    error: ErrorKind | None = None
    message: str = ""


@dataclass(frozen=True)
class Result:
    """What one call of a reward gave: an outcome for each sample, the seconds it took, what it counted."""

    outcomes: list[Outcome]
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def unavailable(self) -> str:
        """Why the call may be answered later; empty if it has been answered, or has failed."""
        outcome = self.outcomes[0]
        return outcome.message if outcome.error == "unavailable" else ""


class BoundReward:
    """A reward with its arguments, ready to be called.

    `function` is what is called, `style` its calling convention, `concurrent` whether it is async,
    `sees_step` whether it can tell the step by its arguments.
    """

    def __init__(self, info: RewardInfo, function: Callable[..., Any], style: Style, args: Mapping[str, Any]):
        self.info = info
        self.style = style
        self.function = function
        self._args = args
        self.sees_step = style == "trl" and _takes(function, "trainer_state")
        self.concurrent = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 - async instances have an async __call__
        )

    def __call__(self, samples: Sequence[Sample], step: int | None) -> Result:
        """Score samples: exactly one for the style `completion`, a batch for the others. Never raises."""
        start = time.perf_counter()
        with counting() as counts:
            try:
                outcomes = self.outcomes(self._invoke(samples, step), len(samples))
            except (Exception, SystemExit) as error:
                outcomes = [_failure(error)] * len(samples)
        return Result(outcomes, time.perf_counter() - start, counts)

    async def call_async(self, samples: Sequence[Sample], step: int | None) -> Result:
        """The same for an async reward, which gets its time-out here as long as it does not block."""
        import asyncio  # slow to import, and `posttrain plan` gets here

        start = time.perf_counter()
        budget = self.info.timeout * len(samples)
        limit = asyncio.timeout(budget)
        with counting() as counts:
            try:
                async with limit:
                    result = await self._invoke(samples, step)
                outcomes = self.outcomes(result, len(samples))
            except (Exception, SystemExit) as error:
                late = limit.expired()
                outcomes = [timeout_outcome(budget) if late else _failure(error)] * len(samples)
        return Result(outcomes, time.perf_counter() - start, counts)

    def _invoke(self, samples: Sequence[Sample], step: int | None) -> Any:
        completions = [completion for completion, _ in samples]
        examples = [example for _, example in samples]
        if self.style == "completion":
            return self.function(completions[0], examples[0], **self._args)
        if self.style == "batch":
            return self.function(completions, examples, **self._args)
        return self.function(**trl_arguments(self.function, completions, examples, step, self._args))

    def outcomes(self, result: Any, count: int) -> list[Outcome]:
        """What the reward's result says about each of `count` samples."""
        if self.style == "completion":
            return [to_outcome(result, self.info.range)]
        values = list(result)
        if len(values) != count:
            message = f"returned {len(values)} values for {count} completions"
            return [Outcome(None, "count", message)] * count
        return [to_outcome(value, self.info.range) for value in values]


class NoLogprobs(tuple[float, ...]):
    """Stands in for the log-probs of a completion whose value is cached under its text and tokens.

    Raises:
        RewardError: on every use.
    """

    def _refuse(self, *args: object) -> NoReturn:
        raise RewardError(
            "a deterministic reward is not shown log-probs, which change with the policy while its values "
            "are cached; declare it with deterministic=False"
        )

    __getitem__ = __iter__ = __len__ = __bool__ = _refuse


def without_logprobs(sample: Sample) -> Sample:
    """The sample as a deterministic reward gets to see it."""
    completion, example = sample
    return replace(completion, logprobs=NoLogprobs()), example


def to_outcome(value: Any, bounds: tuple[float, float] | None) -> Outcome:
    """Accept None, a bool, int, float, NumPy scalar or 0-d tensor; anything else is an error.

    In a batch an exception in place of a value says why there is none.
    """
    if value is None:
        return Outcome()
    if isinstance(value, Exception):
        return _failure(value)
    number = value
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        number = value.item()
    if not isinstance(number, (bool, int, float)):
        return Outcome(None, "value", f"returned {type(value).__name__} instead of a number or None")
    try:
        number = float(number)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        return Outcome(None, "value", f"returned {number}")
    if bounds is not None and not bounds[0] <= number <= bounds[1]:
        return Outcome(None, "value", f"returned {number}, outside of its range [{bounds[0]}, {bounds[1]}]")
    return Outcome(number)


def timeout_outcome(seconds: float) -> Outcome:
    """The outcome of a sample that took too long."""
    return Outcome(None, "timeout", f"took longer than {seconds:g} s")


def _failure(error: BaseException) -> Outcome:
    """The outcome of a sample whose reward raised."""
    if isinstance(error, RewardUnavailable):
        return Outcome(None, "unavailable", _one_line(redact(str(error))))
    return Outcome(None, "exception", describe(error))


def describe(error: BaseException) -> str:
    """An exception in one line with the place it comes from, whatever its `__str__` does; without secrets."""
    text = _one_line(redact("".join(traceback.format_exception_only(error))))
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else text


def _one_line(text: str) -> str:
    return " ".join(text.split())[:MAX_MESSAGE]


# --- calling conventions ----------------------------------------------------------------------------------


def trl_arguments(
    function: Callable[..., Any],
    completions: Sequence[Completion],
    examples: Sequence[Example],
    step: int | None,
    args: Mapping[str, Any],
) -> dict[str, Any]:
    """The keyword arguments of TRL's convention (`GRPOTrainer._calculate_rewards`) that a function accepts.

    `prompts`, `completions` (texts; for chat prompts lists of one assistant message), `completion_ids`,
    every dataset column as a list (`answer` among them), `trainer_state` with `global_step`, and
    `log_extra` and `log_metric`, whose values are discarded.
    """
    names = dict.fromkeys(name for example in examples for name in example.columns)
    columns = {name: [example.columns.get(name) for example in examples] for name in names}
    available: dict[str, Any] = {
        **{name: values for name, values in columns.items() if name not in ("prompt", "completion")},
        "answer": [example.answer for example in examples],
        "prompts": [example.prompt for example in examples],
        "completions": [
            completion.text
            if isinstance(example.prompt, str)
            else [{"role": "assistant", "content": completion.text}]
            for completion, example in zip(completions, examples, strict=True)
        ],
        "completion_ids": [list(completion.token_ids) for completion in completions],
        "trainer_state": SimpleNamespace(global_step=step or 0),
        "log_extra": _discard,
        "log_metric": _discard,
        **args,
    }
    parameters = inspect.signature(function).parameters
    missing = [
        p.name
        for p in parameters.values()
        if p.name not in available
        and p.default is p.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if missing:
        raise TypeError(
            f"wants {', '.join(missing)}; the data has the columns {', '.join(['answer', *names])}"
        )
    return {name: value for name, value in available.items() if _takes(function, name)}


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function accepts a keyword argument."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _discard(*args: Any, **kwargs: Any) -> None:
    """Stands in for TRL's `log_extra` and `log_metric`."""


def _style_of(function: Callable[..., Any], declared: RewardInfo | None) -> Style | None:
    """Calling convention by parameter names; None: this is not a reward function (but may return one)."""
    names = inspect.signature(function).parameters
    if "examples" in names and "completions" in names:
        return "batch"
    if not names.keys().isdisjoint(("prompts", "completions", "completion_ids")):
        return "trl"
    if declared is not None:
        return "batch" if declared.batched else "completion"
    return "completion" if "completion" in names else None


# --- loading ----------------------------------------------------------------------------------------------


def load_reward(source: RewardSource) -> BoundReward:
    """Import a reward's code and bind its arguments.

    A class is constructed with the arguments; so is a function that takes no completions, whose result is
    then the reward (`trl.rewards:get_cosine_scaled_reward`).

    Raises:
        RecipeError: the code has no such reward, or does not take the arguments.
        RewardError: importing or constructing it failed.
    """
    try:
        target, declared = _find(source)
        if not callable(target):
            raise RecipeError(f"reward {source.name!r} is a {type(target).__name__}, not a function or class")
        function, args = target, source.args
        if inspect.isclass(target) or _style_of(target, declared) is None:
            _check_args(source, target, (), args)
            function, args = target(**args), {}
        style = _style_of(function, declared) if callable(function) else None
        if style is None:
            raise RecipeError(
                f"reward {source.name!r} takes neither (completion, example) nor (completions, examples) nor "
                "TRL's (prompts, completions, …)"
            )
        _check_args(source, function, None if style == "trl" else (None, None), args)
    except PosttrainError:
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(f"reward {source.name!r} cannot be loaded: {describe(error)}") from error
    info = declared or RewardInfo(source.name, origin=source.file or source.module or "")
    info = replace(info, batched=style != "completion")
    if inspect.isclass(target) and hasattr(function, "declare"):
        info = function.declare(info)
    sha256, place = _code_of(target, source)
    info = replace(
        info,
        name=source.name,
        timeout=source.timeout or info.timeout,
        kind="class" if inspect.isclass(target) else info.kind,
        sha256=sha256,
        place=place,
    )
    return BoundReward(info, function, style, args)


def _code_of(target: Callable[..., Any], source: RewardSource) -> tuple[str, str]:
    """SHA-256 of the file that defines a reward, and `file.py:line` or what is known of that."""
    if source.pickled is not None:
        return hashlib.sha256(source.pickled).hexdigest(), ""
    code: Any = target
    while isinstance(code, functools.partial):
        code = code.func
    code = inspect.unwrap(code)
    code = code if hasattr(code, "__qualname__") else type(code)
    try:
        file = inspect.getsourcefile(code)
        place = f"{file}:{inspect.getsourcelines(code)[1]}"
    except (TypeError, OSError):  # it is not written in Python
        file = place = source.file or sys.modules[source.module or ""].__file__ or ""
    if file is None or not Path(file).is_file():
        return hashlib.sha256(place.encode()).hexdigest(), place
    return hashlib.sha256(Path(file).read_bytes()).hexdigest(), place


def _check_args(
    source: RewardSource,
    function: Callable[..., Any],
    positional: tuple[None, ...] | None,
    args: Mapping[str, Any],
) -> None:
    """Refuse arguments that do not fit the signature; `positional` None leaves the rest of it open."""
    signature = inspect.signature(function)
    try:
        signature.bind_partial(**args) if positional is None else signature.bind(*positional, **args)
    except TypeError as error:
        raise RecipeError(f"reward {source.name!r} does not take its args: {error}") from error


def _find(source: RewardSource) -> tuple[Callable[..., Any], RewardInfo | None]:
    """The code of a reward and, where it was declared with `@reward`, its declaration."""
    if source.pickled is not None:
        import dill  # type: ignore[import-untyped]

        entry: Registered = dill.loads(source.pickled)
        return entry.target, entry.info
    module = import_file(Path(source.file)) if source.file else importlib.import_module(source.module or "")
    name = source.attribute or source.registered or source.name
    known = registered(name)
    home = known.info.origin.partition(":")[0] if known else None
    if known is not None and home == module.__name__:
        return known.target, known.info
    if hasattr(module, name):
        target = getattr(module, name)
        return target, declaration_of(target)
    if known is not None and home not in BUILTIN_MODULES:  # registered by a module that this one imports
        return known.target, known.info
    raise RecipeError(f"reward {source.name!r}: {module.__name__} neither registers nor defines {name!r}")
