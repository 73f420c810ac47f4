"""Preference pairs: a prompt with two answers, one of which somebody preferred."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from posttrain.data.prompts import PromptFormat, uses_chat
from posttrain.data.sources import load_located, text_or_messages
from posttrain.errors import DataError
from posttrain.recipe.schema import DataSource
from posttrain.rollout.types import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUMBERS = {"margin": 0.0, "target": 1.0, "weight": 1.0}
"""Optional columns, and what a row without them has."""


@dataclass(frozen=True)
class PreferencePair:
    """A prompt, the preferred answer and the other, and what the loss is to do with them.

    `columns` are the row's own other than the prompt; `where` is its place, for messages.
    """

    prompt: Prompt
    chosen: Prompt
    rejected: Prompt
    margin: float
    target: float
    weight: float
    columns: Mapping[str, Any]
    where: str


def load_pairs(source: DataSource) -> list[PreferencePair]:
    """Read, check, shuffle and limit preference pairs.

    Raises:
        DataError: the source cannot be read, or a row is no pair: a column is missing, both answers are the
            same, the target is outside of [0, 1], or a number is not finite.
    """
    columns = source.columns.model_copy(update={"answer": None, "completion": None})
    located = load_located(source.model_copy(update={"columns": columns}))
    return [_to_pair(where, example.prompt, example.columns) for where, example in located]


def _to_pair(where: str, prompt: Prompt, columns: Mapping[str, Any]) -> PreferencePair:
    for name in ("chosen", "rejected"):
        if name not in columns:
            known = ", ".join(sorted(columns)) or "none"
            raise DataError(
                f"{where}: a preference needs a column {name!r}; besides the prompt there are: {known}"
            )
    chosen, rejected = (text_or_messages(columns[name], where, name) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise DataError(f"{where}: chosen and rejected are the same, so there is no preference")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError(f"{where}: chosen and rejected must both be text, or both lists of messages")
    numbers = {name: _number(columns.get(name), default, where, name) for name, default in NUMBERS.items()}
    if not 0.0 <= numbers["target"] <= 1.0:
        raise DataError(f"{where}: the target must be between 0 and 1, it is {numbers['target']:g}")
    if numbers["weight"] < 0.0:
        raise DataError(f"{where}: the weight must not be negative, it is {numbers['weight']:g}")
    return PreferencePair(prompt, chosen, rejected, **numbers, columns=columns, where=where)


def _number(value: object, default: float, where: str, name: str) -> float:
    if value is None:  # the row does not have it, or a table that other rows fill in has null
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{where}: the {name} must be a finite number, it is {value!r}")
    return float(value)


def encode_pair(
    pair: PreferencePair,
    tokenizer: PreTrainedTokenizerBase,
    format: PromptFormat = "auto",
    limit: int | None = None,
) -> tuple[list[int], list[int]]:
    """Token ids of the prompt with the chosen answer, and with the rejected one.

    As a reward model scores a completion later: by the chat template, or else the prompt followed by the
    answer.

    Raises:
        DataError: the pair does not fit the format, or an answer and its prompt exceed `limit` tokens.
    """
    both = []
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        ids = _encode(pair, answer, tokenizer, format)
        if limit is not None and len(ids) > limit:
            raise DataError(f"{pair.where}: {name} has {len(ids)} tokens with its prompt; {limit} fit")
        both.append(ids)
    if both[0] == both[1]:
        raise DataError(f"{pair.where}: chosen and rejected have the same tokens, so there is no preference")
    return both[0], both[1]


def preference_row(
    pair: PreferencePair, tokenizer: PreTrainedTokenizerBase, format: PromptFormat = "auto"
) -> dict[str, Prompt]:
    """A pair as a row of TRL's preference format, conversational for chat; one with target 0 is turned round.

    Raises:
        DataError: the pair is made of chat messages and the format is text.
    """
    chosen, rejected = (pair.chosen, pair.rejected) if pair.target else (pair.rejected, pair.chosen)
    row = {"prompt": pair.prompt, "chosen": chosen, "rejected": rejected}
    if uses_chat(tokenizer, format):
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        return {name: _messages(row[name], role) for name, role in roles.items()}
    if not all(isinstance(text, str) for text in row.values()):
        raise DataError(f"{pair.where}: chat messages need a chat template")
    return row


def _encode(
    pair: PreferencePair, answer: Prompt, tokenizer: PreTrainedTokenizerBase, format: PromptFormat
) -> list[int]:
    if uses_chat(tokenizer, format):
        messages = [*_messages(pair.prompt, "user"), *_messages(answer, "assistant")]
        try:
            return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
        except TemplateError as error:
            raise DataError(f"{pair.where}: the chat template refuses the messages: {error}") from error
    if not (isinstance(pair.prompt, str) and isinstance(answer, str)):
        raise DataError(f"{pair.where}: chat messages need a chat template")
    return list(tokenizer(pair.prompt + answer)["input_ids"])


def _messages(content: Prompt, role: str) -> list[Message]:
    return [Message(role=role, content=content)] if isinstance(content, str) else content
