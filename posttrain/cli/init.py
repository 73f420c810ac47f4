"""Write a commented starter recipe, or turn a TRL GRPO configuration into one.

`--from-trl CONFIG` takes what `trl grpo --config` does (YAML or JSON: GRPOConfig, model, dataset, rewards,
LoRA) and lists what means something else in a recipe and what could not be carried over, with the reasons.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import posttrain.recipe
from posttrain.errors import RecipeError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `posttrain init`."""
    parser.add_argument(
        "path", metavar="PATH", nargs="?", type=Path, default=Path("recipe.yaml"), help="default: recipe.yaml"
    )
    parser.add_argument("--from-trl", metavar="CONFIG", type=Path, help="configuration of TRL's GRPO trainer")
    parser.add_argument(
        "--processes",
        metavar="N",
        type=int,
        help="with --from-trl: processes that the configuration was run with (its own num_processes, or 1)",
    )


def run(args: argparse.Namespace) -> None:
    """Write the file; one that is there already stays as it is."""
    if args.from_trl is not None:
        _from_trl(args)
        return
    if args.processes is not None:
        raise RecipeError("--processes belongs to --from-trl: a recipe has launch.num_processes.")
    _write(args.path, (Path(posttrain.recipe.__path__[0]) / "starter.yaml").read_text(encoding="utf-8"))
    print(f"Wrote {args.path}. Next: posttrain plan {args.path}")


def _from_trl(args: argparse.Namespace) -> None:
    from posttrain.recipe.commented import to_yaml
    from posttrain.recipe.from_trl.config import read_trl
    from posttrain.recipe.from_trl.convert import convert

    if args.processes is not None and args.processes < 1:
        raise RecipeError(f"--processes should be at least 1, found {args.processes}.")
    converted = convert(read_trl(args.from_trl), str(args.from_trl), args.processes)
    notes = [
        *_notes("Carried over, with another meaning", converted.changed),
        *_notes("Not carried over", converted.left_out),
        *_notes("Not needed", converted.unneeded),
    ]
    header = [
        f"# From TRL's {args.from_trl.name}, by posttrain init --from-trl.",
        "#",
        *("# " + n for n in notes),
    ]
    _write(args.path, "\n".join(line.rstrip() for line in header) + "\n\n" + to_yaml(converted.recipe))
    print("\n".join([*notes, "", f"Wrote {args.path}. Next: posttrain plan {args.path}"]))


def _notes(title: str, reasons: Mapping[str, str]) -> list[str]:
    return [f"{title}:", *(f"  {key}: {reason}" for key, reason in reasons.items())] if reasons else []


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError(f"{path} exists already and is not overwritten.") from None
