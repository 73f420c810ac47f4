"""The reward registry: declare a reward, list the ones there are, find the one a recipe names.

Nothing heavy is imported here and no user code is run: `locate` says where a reward's code is, and a worker
process loads it from there (`posttrain.rewards.calling`).
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from posttrain.errors import RecipeError, RewardError

if TYPE_CHECKING:
    from posttrain.recipe.schema import RewardModelConfig, RewardSpec

BUILTIN_MODULES = (
    "posttrain.rewards.builtin",
    "posttrain.rewards.http",
    "posttrain.rewards.judge",
    "posttrain.soar.graded",
)
"""Those that register posttrain's own rewards; they import nothing heavy."""
MODEL_MODULE = "posttrain.rewards.model_reward"
ENTRY_POINT_GROUP = "posttrain.rewards"
DEFAULT_TIMEOUT = 10.0
UNDECLARED = "0"
"""Version of a reward that was never declared with `@reward`."""

Target = TypeVar("Target", bound=Callable[..., Any])


@dataclass(frozen=True)
class RewardInfo:
    """What a reward declares about itself (see `reward`).

    `range` is closed; a value outside of it is an error. `timeout` is in seconds for one sample, `cost` is
    the price of one call. `origin` is the code's `module:name`, `kind` what it is: `function`, `class`, or
    what a package that offers other kinds calls them. `sha256` and `place` (`file.py:12`) are known once the
    code is loaded: the hash is that of the file that defines the reward, or of its own source text where
    there is no file. `model` is what a reward model is run with (`RewardModelConfig`); then the hash is that
    of the model's files, or empty where nobody can tell.
    """

    name: str
    version: str = UNDECLARED
    origin: str = ""
    doc: str = ""
    deterministic: bool = False
    range: tuple[float, float] | None = None
    timeout: float = DEFAULT_TIMEOUT
    batched: bool = False
    concurrency: int | None = None
    cost: float | None = None
    kind: str = "function"
    sha256: str = ""
    place: str = ""
    model: dict[str, Any] | None = None

    @property
    def fingerprint(self) -> str:
        """Version and code in short, as rollouts keep it: `1 sha256:0123456789abcdef`."""
        return f"{self.version} sha256:{self.sha256[:16]}" if self.sha256 else self.version


@dataclass(frozen=True)
class Registered:
    """A declared reward and its code."""

    info: RewardInfo
    target: Callable[..., Any]


@dataclass(frozen=True)
class RewardSource:
    """Where a fresh process finds a reward's code, and what to bind to it.

    `name` is what the recipe calls it. Exactly one of `module` (import path), `file` and `pickled` (for code
    that cannot be imported: functions of a script, a notebook or another function) is set. There the reward
    is `attribute`, or the one `registered` under a name.
    """

    name: str
    module: str | None = None
    file: str | None = None
    pickled: bytes | None = None
    attribute: str | None = None
    registered: str | None = None
    args: dict[str, Any] = field(default_factory=dict)
    timeout: float | None = None


_registered: dict[str, Registered] = {}


def reward(
    name: str,
    *,
    version: str = "1",
    range: tuple[float, float] | None = None,
    deterministic: bool = True,
    timeout: float = DEFAULT_TIMEOUT,
    batched: bool = False,
    concurrency: int | None = None,
    cost: float | None = None,
) -> Callable[[Target], Target]:
    """Register a reward function, or a class whose instances are reward functions, under a name.

    The function is one of
        f(completion: Completion, example: Example) -> float | None            per completion
        f(completions: list[Completion], examples: list[Example]) -> list      `batched=True`
        f(prompts, completions, completion_ids, **columns) -> list             TRL's convention, by its names
    and may be `async`. A class is constructed with the recipe's `args`; to a function they are passed as
    keyword arguments. An instance may have a method `declare(info: RewardInfo) -> RewardInfo`, which returns
    what is declared here with what depends on its arguments. None means that the reward does not apply to
    the sample, and in a batch an exception in place of a value that there is none for this sample. A batch is
    the completions of one group, so that values depend neither on the number of workers nor on what else is
    in the step; with `batched=False` from `declare` it is one completion.

    Args:
        name: what recipes call it.
        version: to be raised whenever values change.
        range: lowest and highest value; anything outside is an error.
        deterministic: the value follows from the arguments, the example and the completion's text, tokens
            and finish reason alone. Such values are cached: equal samples share one call, now and after the
            run was resumed. Log-probabilities are not shown to such a reward.
        timeout: seconds for one sample, after which the process that computes it is killed.
        batched: the function takes lists.
        concurrency: calls under way at once, over all worker processes of a trainer; None is one for each
            worker, or 32 for an async reward.
        cost: price of one call, in whatever currency you count.

    Raises:
        RewardError: the name is taken by other code, or the declaration makes no sense.
    """
    if range is not None and not range[0] < range[1]:
        raise RewardError(f"reward {name!r}: its range is (lowest, highest), not {range}")
    if timeout <= 0 or (concurrency is not None and concurrency < 1):
        raise RewardError(f"reward {name!r}: timeout and concurrency must be positive")

    def register(target: Target) -> Target:
        module, qualname = target.__module__, getattr(target, "__qualname__", type(target).__qualname__)
        info = RewardInfo(
            name=name,
            version=version,
            origin=f"{module}:{qualname}",
            doc=_first_line(target),
            deterministic=deterministic,
            range=range,
            timeout=timeout,
            batched=batched,
            concurrency=concurrency,
            cost=cost,
            kind="class" if isinstance(target, type) else "function",
        )
        add(Registered(info, target))
        return target

    return register


def add(entry: Registered) -> None:
    """Register a reward under its name.

    Raises:
        RewardError: the name is taken by other code.
    """
    name, origin = entry.info.name, entry.info.origin
    known = _registered.get(name)
    if known is not None and known.info.origin != origin:
        raise RewardError(f"reward {name!r} of {origin} is already registered by {known.info.origin}")
    _registered[name] = entry


def registered(name: str) -> Registered | None:
    """The reward declared under a name in this process, if there is one."""
    _import_builtins(until=name)
    return _registered.get(name)


def declaration_of(target: object) -> RewardInfo | None:
    """What `@reward` said about a function or class, if it is declared."""
    return next((entry.info for entry in _registered.values() if entry.target is target), None)


def known_rewards() -> dict[str, RewardInfo]:
    """All rewards that can be named without saying where they are, by name.

    Those of entry points are not imported: their version is that of the distribution.
    """
    _import_builtins()
    infos = {name: entry.info for name, entry in _registered.items()}
    for name, point in _entry_points().items():
        version = point.dist.version if point.dist else UNDECLARED
        infos.setdefault(name, RewardInfo(name, version, origin=point.value))
    return dict(sorted(infos.items()))


def locate(spec: RewardSpec, models: Mapping[str, RewardModelConfig] | None = None) -> RewardSource:
    """Find the code of a recipe's reward without running user code or importing anything heavy.

    `spec.code` (`use`, or the name) is looked up in the file or module `spec.from_` if that is given;
    otherwise it is a reward model of `models`, `package.module:attribute`, `path/to/file.py:attribute` (from
    the working directory), a registered name, or a name of the entry-point group `posttrain.rewards`.

    Raises:
        RecipeError: no such reward, file, module, or name in the file (the message names the nearest), or a
            built-in that refuses its arguments.
    """
    bound: dict[str, Any] = {"args": dict(spec.args), "timeout": spec.timeout}
    if models and spec.from_ is None and spec.code in models:
        return _source_of_model(spec.name, models[spec.code].model_dump(mode="json"), bound)
    if spec.from_ is not None or ":" in spec.code:
        place, _, attribute = spec.code.rpartition(":")
        if spec.from_ is not None:
            place, attribute = spec.from_, spec.code
        if place.endswith(".py"):
            _check_file(spec.name, Path(place), attribute)
            return RewardSource(spec.name, file=str(Path(place).absolute()), attribute=attribute, **bound)
        _check_module(spec.name, place)
        return RewardSource(spec.name, module=place, attribute=attribute, **bound)
    entry = registered(spec.code)
    if entry is not None:
        source = _source_of(spec.name, entry, bound)
        _check_builtin(source)
        return source
    point = _entry_points().get(spec.code)
    if point is not None:
        return RewardSource(spec.name, module=point.module, attribute=point.attr or spec.code, **bound)
    names = [*(models or ()), *known_rewards()]
    raise RecipeError(
        f"no reward named {spec.code!r}{nearest(spec.code, names)}; registered: {', '.join(names)}"
    )


def provenance(info: RewardInfo) -> str:
    """Where a reward comes from: `built in`, `my_rewards.py:12`, `entry point some_package:function`."""
    if info.origin.startswith("posttrain.rewards."):
        return "built in"
    point = _entry_points().get(info.name)
    if point is not None:
        return f"entry point {point.value}"
    return info.place or info.origin


def is_builtin(source: RewardSource) -> bool:
    """Whether the reward is one of posttrain's own, found by its registered name."""
    return source.module in BUILTIN_MODULES and source.registered is not None


def nearest(name: str, names: Sequence[str]) -> str:
    """`. Did you mean 'x'?` as an insertion, or nothing."""
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _check_builtin(source: RewardSource) -> None:
    from posttrain.rewards.builtin import HEAVY
    from posttrain.rewards.calling import load_reward

    if is_builtin(source) and (source.args or source.registered not in HEAVY):
        load_reward(source)


def _import_builtins(until: str | None = None) -> None:
    """Import what comes with posttrain; no further than to a name, as `posttrain plan` has little time."""
    for module in BUILTIN_MODULES:
        if until in _registered:
            return
        importlib.import_module(module)


def _source_of(name: str, entry: Registered, bound: dict[str, Any]) -> RewardSource:
    if entry.info.model is not None:
        return _source_of_model(name, entry.info.model, bound)
    module, _, qualname = entry.info.origin.partition(":")
    if module != "__main__" and "<locals>" not in qualname:
        return RewardSource(name, module=module, registered=entry.info.name, **bound)
    import dill  # type: ignore[import-untyped]

    try:
        pickled = dill.dumps(entry, recurse=True)
    except Exception as error:
        raise RewardError(
            f"reward {entry.info.name!r} cannot be sent to a worker process ({error}); define it at the top "
            "level of a file or module"
        ) from error
    return RewardSource(name, pickled=pickled, **bound)


def _source_of_model(name: str, model: dict[str, Any], bound: dict[str, Any]) -> RewardSource:
    if bound["args"]:
        raise RecipeError(
            f"reward {name!r} is a reward model, which takes no args: its settings are its model's"
        )
    bound = {**bound, "args": {"model": model}}
    return RewardSource(name, module=MODEL_MODULE, attribute="ModelReward", **bound)


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}


def _check_module(name: str, module: str) -> None:
    # Only the top package is looked for: looking deeper would import it.
    top = module.partition(".")[0]
    if not top or not (find_spec(top) or PathFinder.find_spec(top, [str(Path.cwd())])):
        raise RecipeError(f"reward {name!r}: there is no module {module!r}")


def _check_file(name: str, path: Path, attribute: str) -> None:
    if not path.is_file():
        raise RecipeError(f"reward {name!r}: there is no file {str(path)!r} in {Path.cwd()}")
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise RecipeError(f"reward {name!r}: {path} is not valid Python: {error}") from error
    names = _names_in(tree)
    if attribute not in names and "*" not in names:
        raise RecipeError(
            f"reward {name!r}: {path} neither registers nor defines {attribute!r}{nearest(attribute, names)}"
        )


def _names_in(tree: ast.Module) -> list[str]:
    """Everything a file could mean by a name: what it defines or imports, and its strings."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append(node.id)
        elif isinstance(node, ast.alias):
            names.append(node.asname or node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 100:
            names.append(node.value)
    return names


def _first_line(target: object) -> str:
    return (getattr(target, "__doc__", None) or "").strip().partition("\n")[0]
