"""Demonstrations as token ids, for methods that imitate within a policy stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from posttrain.data.prompts import PromptFormat, encode_demonstration, encode_prompt, uses_chat
from posttrain.errors import DataError
from posttrain.rollout.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def demonstration_ids(
    example: Example, tokenizer: PreTrainedTokenizerBase, format: PromptFormat = "auto"
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The prompt as the policy is given it, and the answer as it should sample it, end of sequence included.

    Raises:
        DataError: the example has no demonstration, or the chat template writes the answer's prompt otherwise
            than the one that is sampled from.
    """
    row: dict[str, Any] = dict(encode_demonstration(example, tokenizer, format))
    prompt = encode_prompt(example, tokenizer, format)
    end = int(tokenizer.eos_token_id)
    if not uses_chat(tokenizer, format):
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        return prompt, (*answer, *([] if answer[-1:] == [end] else [end]))
    messages = [*row["prompt"], *row["completion"]]
    whole = tuple(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
    if whole[: len(prompt)] != prompt:
        raise DataError(
            f"demonstration {example.id!r}: with an answer the chat template writes another prompt"
        )
    answer = whole[len(prompt) :]
    last = len(answer) - 1 - answer[::-1].index(end) if end in answer else len(answer) - 1
    return prompt, answer[: last + 1]  # templates write a line break after the end; nobody samples it
