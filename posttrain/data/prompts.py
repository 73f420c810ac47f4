"""From an example to token ids: chat template or plain text, length limits, demonstrations.

Prompts are never cut: one that does not fit is an error or is left out, as the recipe says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from posttrain.errors import DataError
from posttrain.rollout.types import Example, Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptFormat = Literal["auto", "chat", "text"]
EncodedPrompt = tuple[Example, tuple[int, ...]]


def encode_prompt(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    format: PromptFormat = "auto",
    tools: list[dict[str, Any]] | None = None,
) -> tuple[int, ...]:
    """Token ids of the prompt, ready for the first token of an answer.

    A chat template writes the special tokens itself, and the JSON schemas of `tools`; to plain text the
    tokenizer adds its own (a beginning-of-sequence token, if it has one).

    Raises:
        DataError: the example does not fit the format, or the chat template refuses its messages.
    """
    if uses_chat(tokenizer, format):
        # In one go, not by tokenising the rendered text: that would add a second beginning of sequence.
        return tuple(_apply_template(example, tokenizer, tools, tokenize=True))
    return tuple(tokenizer(_plain_text(example, example.prompt))["input_ids"])


def render_prompt(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    format: PromptFormat = "auto",
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """The prompt as text, as the model sees it (special tokens of a chat template included).

    Raises:
        DataError: as `encode_prompt`.
    """
    if uses_chat(tokenizer, format):
        return str(_apply_template(example, tokenizer, tools, tokenize=False))
    return _plain_text(example, example.prompt)


@dataclass(frozen=True)
class Prompts:
    """How the prompts of a source look to one tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    format: PromptFormat = "auto"

    def encode(self, example: Example) -> tuple[int, ...]:
        """See `encode_prompt`."""
        return encode_prompt(example, self.tokenizer, self.format)

    def render(self, example: Example) -> str:
        """See `render_prompt`."""
        return render_prompt(example, self.tokenizer, self.format)


def encode_demonstration(
    example: Example, tokenizer: PreTrainedTokenizerBase, format: PromptFormat = "auto"
) -> dict[str, Prompt]:
    """The example's demonstration as a row of TRL's prompt-completion format, conversational for chat.

    TRL then renders the prompt the way `encode_prompt` does, so that the policy later sees what it was
    trained on.

    Raises:
        DataError: there is no demonstration, or it does not fit the format.
    """
    if "completion" not in example.columns:
        raise DataError(f"example {example.id!r} has no demonstration; set columns.completion")
    completion: Prompt = example.columns["completion"]
    if uses_chat(tokenizer, format):
        return {"prompt": _messages(example.prompt, "user"), "completion": _messages(completion, "assistant")}
    return {"prompt": _plain_text(example, example.prompt), "completion": _plain_text(example, completion)}


def check_lengths(
    prompts: Sequence[EncodedPrompt], limit: int, on_long_prompt: Literal["error", "drop"]
) -> tuple[list[EncodedPrompt], int]:
    """The prompts of at most `limit` tokens, and how many were left out.

    Raises:
        DataError: a prompt is longer and `on_long_prompt` is `error`, or none is left.
    """
    kept = [prompt for prompt in prompts if len(prompt[1]) <= limit]
    too_long = [prompt for prompt in prompts if len(prompt[1]) > limit]
    if too_long and (on_long_prompt == "error" or not kept):
        example, ids = max(too_long, key=lambda prompt: len(prompt[1]))
        count = f"{len(too_long)} of {len(prompts)} prompts are too long"
        raise DataError(f"{count}; that of example {example.id!r} has {len(ids)} tokens, {limit} fit")
    return kept, len(too_long)


def uses_chat(tokenizer: PreTrainedTokenizerBase, format: PromptFormat) -> bool:
    """Whether prompts go through the chat template.

    Raises:
        DataError: `chat` is asked for and the tokenizer has no template.
    """
    has_template = tokenizer.chat_template is not None
    if format == "chat" and not has_template:
        raise DataError(f"format is chat, but tokenizer {tokenizer.name_or_path!r} has no chat template")
    return has_template and format != "text"


def _apply_template(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    tools: list[dict[str, Any]] | None,
    tokenize: bool,
) -> Any:
    try:
        return tokenizer.apply_chat_template(
            _messages(example.prompt, "user"),
            tools=tools,
            add_generation_prompt=True,
            tokenize=tokenize,
            return_dict=False,
        )
    except TemplateError as error:
        raise DataError(f"the chat template refuses the prompt of example {example.id!r}: {error}") from error


def _messages(content: Prompt, role: str) -> list[Message]:
    return [Message(role=role, content=content)] if isinstance(content, str) else content


def _plain_text(example: Example, content: Prompt) -> str:
    if not isinstance(content, str):
        raise DataError(f"example {example.id!r} is made of chat messages, which need a chat template")
    return content
