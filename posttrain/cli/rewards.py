"""The reward functions that a recipe can name: list them, try one before a run, score saved rollouts again.

  posttrain rewards list                          built in, or from installed packages
  posttrain rewards list my.yaml                  those of a recipe, its own included
  posttrain rewards test NAME [--from my.py]      gold and adversarial samples; exits with 1 if a check fails
  posttrain rewards score NAME FILE.parquet       saved rollouts again, old values against new ones
  posttrain rewards serve MODEL                   a reward model over HTTP; or NAME --recipe my.yaml

A recipe may also name a function of its own: `package.module:function` or `path/to/file.py:function`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.cli.arguments import one_of
from posttrain.cli.reward_server import add_serve_arguments, serve_model
from posttrain.errors import RecipeError, RewardError

if TYPE_CHECKING:
    from posttrain.recipe.schema import Recipe, RewardModelConfig, RewardSpec
    from posttrain.rewards.registry import RewardInfo
    from posttrain.rewards.rescore import Agreement
    from posttrain.rollout.types import Example

WORDS = {"list": (), "test": ("NAME",), "score": ("NAME", "FILE.parquet"), "serve": ("MODEL",)}
MARKS = {True: "ok", False: "FAIL", None: "-"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `posttrain rewards`."""
    parser.add_argument("action", metavar="list|test|score|serve", type=one_of(list(WORDS)))
    parser.add_argument(
        "words",
        metavar="NAME",
        nargs="*",
        help="the reward, and the file to score again; list: a recipe; serve: a hub name or folder",
    )
    parser.add_argument("--recipe", help="a recipe, whose rewards and data are used")
    parser.add_argument("--from", dest="from_", metavar="FILE", help="file or module that defines the reward")
    parser.add_argument("--args", metavar="JSON", help="arguments of the reward: '{\"budget\": 400}'")
    parser.add_argument("--data", metavar="FILE", help="test: jsonl of prompt, answer and maybe completion")
    parser.add_argument(
        "--accept", type=float, metavar="VALUE", help="test: from here on a value says that a sample is right"
    )
    parser.add_argument(
        "--samples", type=int, default=8, metavar="N", help="test: rows of the data to use (8)"
    )
    parser.add_argument("--out", metavar="FILE", help="score: where to (beside the input)")
    add_serve_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """List, test, score or serve.

    Raises:
        RewardError: a check of `test` failed.
        PosttrainError: something the arguments name is not there.
    """
    if args.action == "list" and args.recipe is None and args.words:
        args.recipe = args.words.pop(0)
    wanted = WORDS[args.action]
    if len(args.words) != len(wanted):
        raise RecipeError(f"posttrain rewards: write posttrain rewards {' '.join([args.action, *wanted])}.")
    {"list": _list, "test": _test, "score": _score, "serve": _serve}[args.action](args)


def _list(args: argparse.Namespace) -> None:
    from posttrain.rewards.registry import RewardInfo, known_rewards, provenance

    if args.recipe is None:
        infos = list(known_rewards().values())
    else:
        from posttrain.rewards.scorer import Scorer

        recipe = _recipe(args.recipe)
        trained = recipe.trained_rewards(len(recipe.stages))
        stages = [spec for stage in recipe.stages for spec in getattr(stage.config, "rewards", None) or []]
        named = {spec.name: spec for spec in [*recipe.rewards, *stages] if spec.code not in trained}
        used = {spec.code for spec in named.values()}
        named |= {name: _plain(name) for name in recipe.reward_models if name not in used}
        specs = [spec.model_copy(update={"only_if": None}) for spec in named.values()]
        with Scorer(specs, recipe.reward_options, models=recipe.reward_models) as scorer:
            infos = list(scorer.infos.values())
        infos += [RewardInfo(n, kind="reward model", origin=f"the stage {n}") for n in trained]
    heads = ("name", "version", "kind", "range", "deterministic", "time-out", "from", "")
    rows = [heads, *((*_cells(info), provenance(info), info.doc) for info in infos)]
    _print_table(rows)


def _plain(name: str) -> RewardSpec:
    from posttrain.recipe.schema import RewardSpec

    return RewardSpec(name=name)


def _cells(info: RewardInfo) -> tuple[str, ...]:
    batched = "batch " if info.batched else ""
    bounds = "any" if info.range is None else f"{info.range[0]:g} to {info.range[1]:g}"
    certain = "yes" if info.deterministic else "no"
    return info.name, info.version, batched + info.kind, bounds, certain, f"{info.timeout:g} s"


def _test(args: argparse.Namespace) -> None:
    from posttrain.rewards.registry import provenance
    from posttrain.rewards.trial import gold_examples, try_reward

    spec, recipe = _spec(args)
    if args.data is not None:
        examples = _read_gold(args.data)
    elif recipe is not None and (source := recipe.data.train or recipe.data.eval) is not None:
        from posttrain.data.sources import load_examples

        examples = load_examples(source)
    else:
        examples = gold_examples(spec)
    models = recipe.reward_models if recipe else None
    trial = try_reward(spec, examples[: args.samples], args.accept, models)
    info = trial.info
    digest = f"sha256 {info.sha256[:16]}, " if info.sha256 else ""
    print(f"{info.name}, version {info.version}, {digest}{provenance(info)}")
    _print_table([(f"  {MARKS[check.passed]}", check.name, check.text) for check in trial.checks])
    if trial.failed:
        raise RewardError(f"reward {info.name!r} failed: {', '.join(trial.failed)}")


def _read_gold(path: str) -> list[Example]:
    from posttrain.data.sources import load_examples
    from posttrain.recipe.schema import Columns, DataSource

    file = Path(path)
    keys: dict[str, Any] = {}
    if file.is_file():
        line = next((line for line in file.read_text().splitlines() if line.strip()), "{}")
        with contextlib.suppress(ValueError):  # the reader says what is wrong with which line
            keys = json.loads(line)
    columns = Columns(
        answer="answer" if "answer" in keys else None,
        completion="completion" if "completion" in keys else None,
    )
    return load_examples(DataSource(jsonl=path, columns=columns, shuffle=False))


def _score(args: argparse.Namespace) -> None:
    from posttrain.rewards.rescore import rescore

    path = Path(args.words[1])
    if not path.is_file():
        raise RecipeError(f"posttrain rewards score: there is no file {path}.")
    folders = path.absolute().parents  # of a run's file: STAGE, rollouts, and the run's
    run_dir = folders[2] if len(folders) > 2 else None
    if args.recipe is None and run_dir is not None and (run_dir / "recipe.yaml").is_file():
        args.recipe = str(run_dir / "recipe.yaml")
    spec, recipe = _spec(args)
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", spec.name)
    out = Path(args.out) if args.out else path.with_name(f"rescored-{name}-{path.name}")
    models = {**recipe.reward_models, **_trained(recipe, run_dir)} if recipe else None
    _print_agreement(spec.name, rescore(path, out, spec, _examples(recipe), models))
    print(f"Written to {out}.")


def _serve(args: argparse.Namespace) -> None:
    serve_model(args, None if args.recipe is None else _recipe(args.recipe))


def _trained(recipe: Recipe, run_dir: Path | None) -> dict[str, RewardModelConfig]:
    """The reward models that stages of a run have trained so far."""
    from posttrain.recipe.schema import RewardModelConfig

    if run_dir is None:
        return {}
    folders = {name: run_dir / "models" / f for name, f in recipe.trained_rewards(len(recipe.stages)).items()}
    return {name: RewardModelConfig(path=str(folder)) for name, folder in folders.items() if folder.is_dir()}


def _examples(recipe: Recipe | None) -> dict[str, Example]:
    """The examples of the recipe's policy and evaluate stages by id."""
    from posttrain.data.sources import load_examples
    from posttrain.recipe.check import data_sources

    sources = data_sources(recipe, ("policy", "evaluate")) if recipe else ()
    return {example.id: example for _, source in sources for example in load_examples(source)}


def _print_agreement(name: str, found: Agreement) -> None:
    from posttrain.rewards.trial import counts_text

    mean = "none" if found.new is None else f"{found.new:.4g}"
    print(f"{name}: {found.rollouts} rollouts, {found.errors} of them unscored by an error now")
    if found.old is None:
        print(f"  no values to compare with; mean now {mean}")
    else:
        print(f"  {found.equal} equal, {found.different} different, by at most {found.largest:g}")
        print(f"  mean {found.old:.4g} then, {mean} now")
    print(f"  {found.gained} have a value now and had none then, {found.lost} the other way round")
    if found.counts:
        print(f"  counted: {counts_text(found.counts)}")
    if found.unknown:
        print(
            f"  {found.unknown} examples are not in the recipe's data: columns besides the answer are missing"
        )


def _spec(args: argparse.Namespace) -> tuple[RewardSpec, Recipe | None]:
    """The reward that is meant, as the recipe has it or as the options say, and the recipe."""
    from posttrain.recipe.schema import RewardSpec

    recipe = None if args.recipe is None else _recipe(args.recipe)
    name = args.words[0]
    known = [spec for spec in (recipe.rewards if recipe else []) if spec.name == name]
    if known and args.from_ is None and args.args is None:
        return known[0].model_copy(update={"weight": 1.0, "clip": None, "only_if": None}), recipe
    try:
        arguments = json.loads(args.args or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise RecipeError(f"posttrain rewards: --args takes a JSON object, not {args.args!r}.")
    return RewardSpec.model_validate({"name": name, "from": args.from_, "args": arguments}), recipe


def _recipe(name: str) -> Recipe:
    from posttrain.recipe.library import find_recipe
    from posttrain.recipe.load import load_recipe

    return load_recipe(find_recipe(name), []).recipe


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
