"""Train the tiny reasoner from scratch and save it under data/tiny-reasoner.

A Qwen2-architecture model of 1.1M parameters with a character-level tokenizer, in the ordinary Hugging Face
format, trained on generated reasoning text: question in, `<think>steps</think>answer` out. It is the model
that the recipes under recipes/tiny start from.

    ./scripts/make_tiny_reasoner                  # writes data/tiny-reasoner (about 35 minutes on one core)
    ./scripts/make_tiny_reasoner --output DIR
"""

from __future__ import annotations

import argparse
import json
import string
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from posttrain.data.tasks import make_task
from posttrain.recipe.load import load_recipe
from posttrain.recipe.schema import OptimizerConfig, SftStage
from posttrain.rollout.tools import environment_factory, schemas_of
from posttrain.rollout.tools_format import ToolFormat
from posttrain.rollout.types import Example
from posttrain.stages.sft import finetune

ROOT = Path(__file__).resolve().parent.parent

VOCABULARY = 256  # about 140 ids stay unused: later stages claim some of them
SPECIAL = ["<|pad|>", "<|unk|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
# Not special to the tokenizer, so that decoding keeps them: rewards read them.
TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


TOOLS = ROOT / "recipes" / "tiny" / "hdpo.yaml"
"""Its section `tools` says how a call and its result are written."""
PLAIN = ("search-",)
"""Rows whose prompts are plain text, as in recipes/tiny/mrt.yaml; the others go through the chat template."""


@dataclass(frozen=True)
class Phase:
    """Some steps on a mixture of (task, arguments, relative share of the rows)."""

    steps: int
    rows: int
    mixture: tuple[tuple[str, dict[str, Any], float], ...]
    micro_batch_size: int | None = None
    """Rows of one forward pass, of like length; None is a whole batch."""


ANYWHERE = {"min_first": -30, "max_first": 40}
HINTS = {"misled": 0.3, "unrelated": 0.2}
"""Shares of replays whose hint is wrong, and of those whose hint is about something else."""

# Only the train splits are drawn from, so the held-out problems of every recipe are new to the model, and
# chains of more than three terms are left to the recipes.
PHASES = (
    Phase(
        steps=1400,
        rows=40_000,
        mixture=(
            ("arithmetic", {"min_terms": 2, "max_terms": 3, "max_term": 20}, 0.45),
            ("addition", {"max_digits": 3}, 0.15),
            ("largest", {"numbers": 4}, 0.15),
            ("counting", {"length": 8}, 0.15),
            ("reversing", {"max_length": 6}, 0.10),
        ),
    ),
    # Single-digit steps from anywhere the longer chains get to, until they are reliable.
    Phase(
        steps=500,
        rows=14_000,
        mixture=(
            ("arithmetic", {"min_terms": 2, "max_terms": 3, **ANYWHERE}, 0.7),
            ("addition", {"max_digits": 3}, 0.08),
            ("largest", {"numbers": 4}, 0.07),
            ("counting", {"length": 8}, 0.08),
            ("reversing", {"max_length": 6}, 0.07),
        ),
    ),
    # The forms that the recipes begin with, once the model can solve problems: calls of the calculator,
    # searches, self-predictions, what a mistake teaches, and solving with that at hand.
    Phase(
        steps=700,
        rows=40_000,
        micro_batch_size=16,
        mixture=(
            ("arithmetic", {"min_terms": 2, "max_terms": 3, **ANYWHERE}, 0.34),
            ("addition", {"max_digits": 3}, 0.05),
            ("largest", {"numbers": 4}, 0.05),
            ("counting", {"length": 8}, 0.05),
            ("reversing", {"max_length": 6}, 0.04),
            # No product is answered without the calculator, which would be a guess.
            ("calculator", {"easy": 0.5, "medium": 0.5, "hard": 0.0, "tool": 0.2, "redundant": 0.0}, 0.03),
            ("calculator", {"easy": 0.2, "medium": 0.2, "hard": 0.6, "tool": 1.0, "redundant": 0.1}, 0.03),
            ("search", {"traces": True, "forced": 0.3, "max_episodes": 9}, 0.05),
            ("search", {"facts": True}, 0.02),
            ("meta_arithmetic", {"min_terms": 2, "max_terms": 3, **ANYWHERE}, 0.05),
            ("meta_addition", {"max_digits": 3}, 0.01),
            ("meta_largest", {"numbers": 4}, 0.01),
            ("meta_counting", {"length": 8}, 0.01),
            ("meta_reversing", {"max_length": 6}, 0.01),
            ("error_analysis", {"min_terms": 2, "max_terms": 3, "max_term": 20, "noise": 0.2}, 0.06),
            ("error_analysis", {"min_terms": 2, "max_terms": 3, **ANYWHERE, "noise": 0.2}, 0.06),
            ("error_replay", {"min_terms": 2, "max_terms": 3, "max_term": 20, **HINTS}, 0.06),
            ("error_replay", {"min_terms": 2, "max_terms": 3, **ANYWHERE, **HINTS}, 0.06),
        ),
    ),
)


def make_tokenizer() -> Qwen2Tokenizer:
    """Character-level: one id per printable ASCII character and newline, plus special tokens and tags.

    A byte-level BPE without merges, of Qwen2's own class: `AutoTokenizer` loads every Qwen2 checkpoint as
    that class and puts its pre-tokenizer and decoder in place of any other.
    """
    byte_level = {"\n": "Ċ", " ": "Ġ"}  # how byte-level BPE spells the two invisible ones
    characters = string.ascii_letters + string.digits + string.punctuation + " \n"
    entries = [*SPECIAL, *(byte_level.get(character, character) for character in characters)]
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(entries)},
        merges=[],
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[3:],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2ForCausalLM:
    """A freshly initialised model. Head size 64: vLLM's CPU attention refuses 16."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def make_rows(phase: Phase, seed: int) -> list[Example]:
    """The rows of a phase."""
    return [
        example
        for task, arguments, share in phase.mixture
        for example in make_task(task, size=round(phase.rows * share), seed=seed, split="train", **arguments)
    ]


def row_encoder(tokenizer: Qwen2Tokenizer) -> Callable[[Example], dict[str, list[int]]]:
    """How a row is written: as the recipe that its task is from has it."""
    tools = load_recipe(TOOLS).recipe.tools
    assert tools is not None
    schemas = schemas_of(environment_factory(tools)().tools)
    chat, text = (ToolFormat(tools, schemas, tokenizer, format) for format in ("chat", "text"))

    def encode(example: Example) -> dict[str, list[int]]:
        return (text if example.id.startswith(PLAIN) else chat).encode_trace(example)

    return encode


def train(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, phase: Phase, output: Path, seed: int) -> None:
    """One phase: a warm-up and a cosine down to zero."""
    started = time.time()
    stage = SftStage(
        max_steps=phase.steps,
        batch_size=64,
        micro_batch_size=phase.micro_batch_size,
        sort_batches=phase.micro_batch_size is not None,
        optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=phase.steps // 20),
        log_every=25,
    )
    finetune(
        model,
        tokenizer,
        make_rows(phase, seed),
        stage,
        output_dir=output,
        seed=seed,
        encode=row_encoder(tokenizer),
        log=lambda step, of, metrics: print(
            f"step {step}/{of}  loss {float(metrics['loss']):.4f}  {time.time() - started:.0f} s", flush=True
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "data" / "tiny-reasoner")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    tokenizer = make_tokenizer()
    model = make_model(tokenizer, options.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, {len(tokenizer)} of {VOCABULARY} ids used")
    for phase in PHASES:
        train(model, tokenizer, phase, options.output, options.seed)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    made = {"seed": options.seed, "phases": [asdict(phase) for phase in PHASES]}
    (options.output / "made_by.json").write_text(json.dumps(made, indent=2) + "\n")
    print(f"saved to {options.output}")


if __name__ == "__main__":
    main()
