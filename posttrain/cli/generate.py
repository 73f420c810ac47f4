"""Sample completions of a model, through the same engine as a recipe's stages."""

from __future__ import annotations

import argparse
import json

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `posttrain generate`."""
    parser.add_argument("model", metavar="MODEL", help="hub name or folder")
    parser.add_argument("prompt", metavar="PROMPT", nargs="*", default=[], help="one or more prompts")
    parser.add_argument("--prompts", metavar="FILE", help="jsonl file with a prompt column, instead")
    parser.add_argument("--max-tokens", metavar="N", type=int, default=256, help="cap (default: 256)")
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=1.0, help="0 is greedy (default: 1)"
    )
    parser.add_argument("--n", metavar="N", type=int, default=1, help="completions of a prompt (default: 1)")
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


def run(args: argparse.Namespace) -> None:
    """Print the completions, in the order of the prompts."""
    check(args)
    examples = read_prompts(args)
    for example, completions in zip(examples, sample(args, examples), strict=True):
        for completion in completions:
            print(as_json(example, completion) if args.json else as_text(example, completion, args, examples))


def check(args: argparse.Namespace) -> None:
    """Refuse arguments that cannot be used together or are out of range.

    Raises:
        RecipeError: naming the argument.
    """
    if bool(args.prompt) == (args.prompts is not None):
        raise RecipeError("posttrain generate: give either prompts or --prompts FILE.")
    for name, least in (("max_tokens", 1), ("n", 1), ("temperature", 0)):
        if not getattr(args, name) >= least:
            option = name.replace("_", "-")
            raise RecipeError(f"posttrain generate: --{option} should be at least {least}.")


def read_prompts(args: argparse.Namespace) -> list[Example]:
    """The prompts of the command line or of the file."""
    if args.prompts is None:
        return [Example(str(index), prompt) for index, prompt in enumerate(args.prompt)]
    from posttrain.data.sources import load_examples

    return load_examples(DataSource(jsonl=args.prompts, columns=Columns(answer=None), shuffle=False))


def sample(args: argparse.Namespace, examples: list[Example]) -> list[list[Completion]]:
    """`args.n` completions of every example."""
    from posttrain.data.prompts import encode_prompt
    from posttrain.rollout.build import build_engine, load_tokenizer
    from posttrain.rollout.engine import require_finite

    model = ModelConfig(path=args.model)
    tokenizer = load_tokenizer(model)
    requests = [
        RolloutRequest(
            prompt_ids=encode_prompt(example, tokenizer),
            example=example,
            group=example.id,
            sampling=Sampling(
                max_tokens=args.max_tokens,
                n=args.n,
                temperature=args.temperature,
                seed=derive_seed(args.seed, index),
            ),
        )
        for index, example in enumerate(examples)
    ]
    engine = build_engine(RolloutConfig(engine=args.engine), model, tokenizer, seed=args.seed)
    try:
        answers = engine.generate(requests)
        require_finite(requests, answers)
        return answers
    finally:
        engine.close()


def as_json(example: Example, completion: Completion) -> str:
    """One line for programs."""
    values = {
        "prompt": example.prompt,
        "completion": completion.text,
        "finish_reason": completion.finish_reason,
    }
    return json.dumps(values, ensure_ascii=False)


def as_text(
    example: Example, completion: Completion, args: argparse.Namespace, examples: list[Example]
) -> str:
    """The completion; below its prompt where there are several."""
    if len(examples) == 1 and args.n == 1:
        return completion.text
    return f"── {example.prompt}\n{completion.text}\n"
