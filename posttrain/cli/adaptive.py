"""`posttrain generate --adaptive`: its options, and what it shows while it samples."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from posttrain.errors import RecipeError
from posttrain.recipe.spelling import did_you_mean

if TYPE_CHECKING:
    from posttrain.rollout.engine import RolloutEngine
    from posttrain.rollout.types import RolloutRequest
    from posttrain.zip_rc.controller import UtilityPolicy
    from posttrain.zip_rc.grid import Grid
    from posttrain.zip_rc.sampler import AdaptiveAnswer, Progress

SAMPLES = 8
"""Samples that a prompt may have unless --n says otherwise, as in the paper."""
INTERVAL = 64
"""Tokens between decisions unless --interval says otherwise, as in the paper."""
MARKS = {"waiting": "·", "running": "●", "paused": "‖", "finished": "✓", "truncated": "✗"}
PROMPT_WIDTH = 40


def utility(text: str) -> UtilityPolicy:
    """`alpha=0.1,beta=0.01` or a part of it; the rest is the paper's.

    Raises:
        argparse.ArgumentTypeError: another name, no number, or a weight out of range.
    """
    from posttrain.zip_rc.controller import UtilityPolicy

    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in ("alpha", "beta"):
            hint = did_you_mean(name, ["alpha", "beta"])
            raise argparse.ArgumentTypeError(f"there is no weight {name!r}; write alpha=0.1,beta=0.01.{hint}")
        try:
            weights[name] = float(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{name} should be a number; found {value!r}") from None
    if not 0 <= weights.get("alpha", 0) <= 1:
        raise argparse.ArgumentTypeError("alpha should be from 0 to 1")
    if not 0 <= weights.get("beta", 0) < float("inf"):
        raise argparse.ArgumentTypeError("beta should be 0 or more")
    return UtilityPolicy(**weights)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    group = parser.add_argument_group(
        "adaptive sampling", "several samples of a prompt as long as they are worth it; needs a ZIP-RC model"
    )
    group.add_argument(
        "--adaptive", action="store_true", help="print the best of up to --n samples (default: 8)"
    )
    group.add_argument(
        "--utility",
        metavar="alpha=A,beta=B",
        type=utility,
        help="beta: what a sample costs in reward; alpha: share of compute in it, the rest is latency "
        "(default: alpha=0.1,beta=0.01)",
    )
    group.add_argument("--interval", metavar="N", type=int, help="tokens between decisions (default: 64)")
    group.add_argument("--budget", metavar="N", type=int, help="most tokens of a prompt, over its samples")


def check(args: argparse.Namespace) -> None:
    """Refuse options that do not go together or are out of range.

    Raises:
        RecipeError: naming the option.
    """
    for name in ("utility", "interval", "budget"):
        if getattr(args, name) is not None and not args.adaptive:
            raise RecipeError(f"posttrain generate: --{name} is for --adaptive.")
    for name in ("interval", "budget"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise RecipeError(f"posttrain generate: --{name} should be at least 1.")
    if args.adaptive and args.temperature == 0:
        raise RecipeError("posttrain generate: --adaptive needs a --temperature above 0.")
    if args.adaptive and args.budget is not None and args.budget < args.max_tokens:
        raise RecipeError(
            f"posttrain generate: --budget {args.budget} does not pay for one sample of --max-tokens "
            f"{args.max_tokens}."
        )


def sample(
    args: argparse.Namespace,
    requests: Sequence[RolloutRequest],
    engine: RolloutEngine,
    tokenizer: Any,
    grid: Grid,
) -> list[AdaptiveAnswer]:
    """The answer to every request, with a display of how sampling goes."""
    from posttrain.zip_rc.controller import UtilityPolicy
    from posttrain.zip_rc.sampler import AdaptiveSampler

    sampler = AdaptiveSampler(
        engine,
        tokenizer,
        grid,
        policy=args.utility or UtilityPolicy(),
        interval=args.interval or INTERVAL,
        budget=args.budget,
    )
    with Display([str(request.example.prompt) for request in requests]) as display:
        return sampler.sample(requests, display.show)


class Display:
    """How sampling goes, on standard error: a live table on a terminal, else a line for each answer."""

    def __init__(self, prompts: Sequence[str], console: Any = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self._prompts = [" ".join(prompt.split()) for prompt in prompts]
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._live = Live(console=self._console, transient=True) if self._console.is_terminal else None
        self._active: dict[int, Progress] = {}
        self._done = 0

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, progress: Progress) -> None:
        """Take note of a prompt's progress."""
        self._active[progress.prompt] = progress
        if progress.done:
            del self._active[progress.prompt]
            self._done += 1
            if self._live is None:
                self._console.print(self._line(progress), markup=False)
        if self._live is not None:
            self._live.update(self._table())

    def _line(self, progress: Progress) -> str:
        states = [sample.state for sample in progress.samples]
        begun = len(states) - states.count("waiting")
        return (
            f"{self._done}/{len(self._prompts)}  confidence {progress.confidence:.2f} "
            f"with {progress.tokens:,} tokens in {begun} samples, {states.count('finished')} finished: "
            f"{self._prompts[progress.prompt][:PROMPT_WIDTH]}"
        )

    def _table(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(caption=f"{self._done} of {len(self._prompts)} prompts answered", box=None)
        table.add_column("prompt", no_wrap=True, max_width=PROMPT_WIDTH)
        for name in ("samples", "confidence", "to go", "tokens"):
            table.add_column(name, justify="left" if name == "samples" else "right", no_wrap=True)
        room = max(1, self._console.height - 4)
        for place, progress in sorted(self._active.items())[:room]:
            table.add_row(
                Text(self._prompts[place]),
                "".join(MARKS[sample.state] for sample in progress.samples),
                f"{progress.confidence:.2f}",
                f"{progress.remaining:,.0f}",
                f"{progress.tokens:,}",
            )
        return table
