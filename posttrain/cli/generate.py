"""Sample completions of a model, through the same engine as a recipe's stages."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from posttrain.cli import adaptive
from posttrain.cli.arguments import one_of
from posttrain.errors import RecipeError
from posttrain.recipe.schema import Columns, DataSource, ModelConfig, RolloutConfig
from posttrain.rollout.types import (
    Completion,
    Example,
    RolloutRequest,
    Sampling,
    derive_seed,
)

if TYPE_CHECKING:
    from posttrain.rollout.engine import RolloutEngine
    from posttrain.zip_rc.sampler import AdaptiveAnswer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `posttrain generate`."""
    parser.add_argument("model", metavar="MODEL", help="hub name or folder")
    parser.add_argument("prompt", metavar="PROMPT", nargs="*", default=[], help="one or more prompts")
    parser.add_argument("--prompts", metavar="FILE", help="jsonl file with a prompt column, instead")
    parser.add_argument("--max-tokens", metavar="N", type=int, default=256, help="cap (default: 256)")
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=1.0, help="0 is greedy (default: 1)"
    )
    parser.add_argument("--n", metavar="N", type=int, help="completions of a prompt (default: 1)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the sampling (default: 0)")
    engines = ("transformers", "vllm")
    parser.add_argument(
        "--engine",
        metavar="|".join(engines),
        type=one_of(engines),
        default="transformers",
        help="default: transformers",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object for each completion")
    adaptive.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Print the completions, in the order of the prompts."""
    check(args)
    examples = read_prompts(args)
    if args.adaptive:
        for example, answer in zip(examples, sample_adaptively(args, examples), strict=True):
            text = as_text(example, answer.completion, len(examples) > 1)
            print(adaptive_json(example, answer) if args.json else text)
        return
    several = len(examples) > 1 or (args.n or 1) > 1
    for example, completions in zip(examples, sample(args, examples), strict=True):
        for completion in completions:
            print(as_json(example, completion) if args.json else as_text(example, completion, several))


def check(args: argparse.Namespace) -> None:
    """Refuse arguments that cannot be used together or are out of range.

    Raises:
        RecipeError: naming the argument.
    """
    if bool(args.prompt) == (args.prompts is not None):
        raise RecipeError("posttrain generate: give either prompts or --prompts FILE.")
    for name, least in (("max_tokens", 1), ("n", 1), ("temperature", 0)):
        value = getattr(args, name)
        if value is not None and not value >= least:
            option = name.replace("_", "-")
            raise RecipeError(f"posttrain generate: --{option} should be at least {least}.")
    adaptive.check(args)


def read_prompts(args: argparse.Namespace) -> list[Example]:
    """The prompts of the command line or of the file."""
    if args.prompts is None:
        return [Example(str(index), prompt) for index, prompt in enumerate(args.prompt)]
    from posttrain.data.sources import load_examples

    return load_examples(DataSource(jsonl=args.prompts, columns=Columns(answer=None), shuffle=False))


def sample(args: argparse.Namespace, examples: list[Example]) -> list[list[Completion]]:
    """`--n` completions of every example."""
    from posttrain.rollout.engine import require_finite

    with opened(args, examples, args.n or 1) as (engine, _, requests):
        answers = engine.generate(requests)
        require_finite(requests, answers)
        return answers


def sample_adaptively(args: argparse.Namespace, examples: list[Example]) -> list[AdaptiveAnswer]:
    """The best of up to `--n` samples of every example.

    Raises:
        DataError: the model has no grid.
    """
    from posttrain.rollout.build import load_grid

    grid = load_grid(ModelConfig(path=args.model))
    with opened(args, examples, args.n or adaptive.SAMPLES) as (engine, tokenizer, requests):
        return adaptive.sample(args, requests, engine, tokenizer, grid)


@contextmanager
def opened(
    args: argparse.Namespace, examples: list[Example], n: int
) -> Iterator[tuple[RolloutEngine, Any, list[RolloutRequest]]]:
    """The engine, the tokenizer, and a request for `n` completions of every example."""
    from posttrain.data.prompts import encode_prompt
    from posttrain.rollout.build import build_engine, load_tokenizer

    model = ModelConfig(path=args.model)
    tokenizer = load_tokenizer(model)
    requests = [
        RolloutRequest(
            prompt_ids=encode_prompt(example, tokenizer),
            example=example,
            group=example.id,
            sampling=Sampling(
                max_tokens=args.max_tokens,
                n=n,
                temperature=args.temperature,
                seed=derive_seed(args.seed, index),
            ),
        )
        for index, example in enumerate(examples)
    ]
    engine = build_engine(RolloutConfig(engine=args.engine), model, tokenizer, seed=args.seed)
    try:
        yield engine, tokenizer, requests
    finally:
        engine.close()


def as_json(example: Example, completion: Completion) -> str:
    """One line for programs."""
    return json.dumps(values_of(example, completion), ensure_ascii=False)


def adaptive_json(example: Example, answer: AdaptiveAnswer) -> str:
    """One line for programs, with what the answer took."""
    values = {
        **values_of(example, answer.completion),
        "confidence": answer.confidence,
        "samples": len(answer.samples),
        "tokens": answer.tokens,
        "latency": answer.latency,
    }
    return json.dumps(values, ensure_ascii=False)


def values_of(example: Example, completion: Completion) -> dict[str, Any]:
    """What is told of a completion."""
    return {
        "prompt": example.prompt,
        "completion": completion.text,
        "finish_reason": completion.finish_reason,
    }


def as_text(example: Example, completion: Completion, several: bool) -> str:
    """The completion; below its prompt where there are several."""
    return f"── {example.prompt}\n{completion.text}\n" if several else completion.text
