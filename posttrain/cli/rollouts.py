"""Look at the rollouts of a run.

list RUN         one line for each, those of all stages or the ones that the options ask for
show RUN ID      where a rollout's tokens come from and what they were trained with

For every trained token: policy version, sampling seed, fork, rewards with the versions of their code,
advantage and weight in every channel of the loss, loss mask. For every other: why it was not trained on.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

from posttrain.cli.arguments import one_of
from posttrain.errors import PosttrainError, RecipeError

FILTERS = ("role", "status", "example", "group", "text", "low", "high")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `posttrain rollouts`."""
    parser.add_argument("action", metavar="list|show", type=one_of(("list", "show")))
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run, e.g. runs/quickstart")
    parser.add_argument("id", metavar="ID", nargs="?", help="show: a rollout's id, as `list` has it")
    parser.add_argument("--stage", help="of this stage, e.g. 03-policy")
    parser.add_argument("--step", type=int, help="of this step")
    parser.add_argument("--tokens", action="store_true", help="show: every token on a line of its own")
    wanted = parser.add_argument_group("which rollouts to list")
    wanted.add_argument("--role", help="solution, probe, analysis, …")
    wanted.add_argument("--status", help="trained, dropped, unused, or a longer beginning of the reason")
    wanted.add_argument("--example", help="of the example with this id")
    wanted.add_argument("--group", help="of this group")
    wanted.add_argument("--text", help="with this text in prompt or completion")
    wanted.add_argument("--from", dest="low", metavar="REWARD", type=float, help="with at least this reward")
    wanted.add_argument("--to", dest="high", metavar="REWARD", type=float, help="with at most this reward")
    wanted.add_argument("--limit", type=int, default=20, help="list so many (default: 20)")


def run(args: argparse.Namespace) -> None:
    """List rollouts or show one."""
    if not args.run.is_dir():
        raise PosttrainError(f"{args.run}: there is no such run folder.")
    if args.action == "show":
        _show(args)
    elif args.id is not None:
        raise RecipeError(f"posttrain rollouts list: {args.id!r} is one argument too many.")
    else:
        _list(args)


def _show(args: argparse.Namespace) -> None:
    if args.id is None:
        raise RecipeError(
            f"posttrain rollouts show: ID is missing; `posttrain rollouts list {args.run}` has them."
        )
    given = [name for name in FILTERS if getattr(args, name) is not None]
    if given:
        raise RecipeError("posttrain rollouts show: only --stage and --step can narrow down an id.")
    from posttrain.report.describe import described, token_table
    from posttrain.report.lookup import find
    from posttrain.report.run_folder import read_run
    from posttrain.report.tokens import pieces_of

    found_run = read_run(args.run)
    found = find(found_run, args.id, args.stage, args.step)
    print(described(found_run, found))
    if args.tokens:
        print(token_table(found, pieces_of(found_run)))


def _list(args: argparse.Namespace) -> None:
    from posttrain.report.describe import listed, table
    from posttrain.report.lookup import Wanted, select
    from posttrain.report.run_folder import read_run

    wanted = Wanted(
        stage=args.stage,
        step=args.step,
        role=args.role,
        status=args.status,
        example=args.example,
        group=args.group,
        text=args.text or "",
        low=args.low,
        high=args.high,
    )
    rows = list(islice(select(read_run(args.run), wanted), args.limit + 1))
    if not rows:
        print("No rollout is like that.")
        return
    header = ["id", "stage", "step", "reward", "tokens", "status", "completion"]
    print(table(header, [listed(stage, row) for stage, row in rows[: args.limit]]))
    if len(rows) > args.limit:
        print(f"… and more: --limit shows more than {args.limit}, the other options others.")
