"""A reward model, loaded: from prompts and completions to scores, many at a time.

Used by the server (`posttrain.rewards.serve`) alone; everything else asks a server.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from posttrain.errors import DataError, RewardError
from posttrain.recipe.rewards_schema import RewardModelConfig
from posttrain.rewards.checkpoint import find_checkpoint
from posttrain.rewards.texts import plain_prompt, reduce_steps, split_steps, well_formed
from posttrain.rollout.types import Message, Prompt

Pair = tuple[Prompt, str]
"""A prompt and its completion."""
NO_LIMIT = 10**9
"""Lengths above this are how transformers says that a tokenizer has no limit."""
_FIELDS = re.compile(r"(\{prompt\}|\{completion\})")


@dataclass(frozen=True)
class Score:
    """What the model says about one sample: a value, or in one sentence why there is none.

    `tokens` are those it has seen, `truncated` whether the beginning of the prompt was cut.
    """

    value: float | None = None
    tokens: int = 0
    truncated: bool = False
    error: str = ""


@dataclass(frozen=True)
class Text:
    """A sample as token ids. `ends` are the places of the last tokens of its steps, for a token head."""

    ids: tuple[int, ...]
    truncated: bool = False
    ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Rendered:
    """A text, where its completion is (None: not known), and where the steps of that end."""

    text: str
    special: bool
    """Whether the tokenizer has to add its own special tokens."""
    span: tuple[int, int] | None
    ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Encoding:
    """What a tokenizer made of a text: ids, (start, end) in characters, 1 for tokens that it added."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    added: list[int] = field(default_factory=list)

    def until(self, place: int) -> int:
        """Number of the last token of the text before a place, with those that it added left out."""
        before = (
            number
            for number, ((start, end), added) in enumerate(zip(self.offsets, self.added, strict=True))
            if not added and (start < place or (start == end <= place))
        )
        return max(before, default=0)

    def since(self, place: int) -> int:
        """Number of the first token that reaches beyond a place."""
        beyond = (
            number
            for number, ((_, end), added) in enumerate(zip(self.offsets, self.added, strict=True))
            if not added and end > place
        )
        return min(beyond, default=len(self.ids))


class RewardModel:
    """A sequence or token classification model and its tokenizer.

    Raises:
        RewardError: the checkpoint is missing, is none, lacks weights (which would be random), or does not
            fit the configuration.
    """

    def __init__(self, config: RewardModelConfig):
        self.config = config
        self.checkpoint = find_checkpoint(config)
        self.head = self.checkpoint.head(config.head)
        folder = str(self.checkpoint.folder)
        self._model = self._load_model(folder)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=config.trust_remote_code
            )
        except Exception as error:
            raise RewardError(f"the tokenizer of {config.path} cannot be loaded: {_line(error)}") from error
        if not self._tokenizer.is_fast:
            raise RewardError(f"the tokenizer of {config.path} does not say where its tokens are in the text")
        self.labels = self._labels()
        self._label = self._chosen_label()
        self.max_length = config.max_length or self._own_limit()
        self._pad = self._model.config.get_text_config().pad_token_id

    @property
    def dtype(self) -> str:
        """`float32`, `bfloat16`, …"""
        return str(self._model.dtype).removeprefix("torch.")

    @property
    def device(self) -> str:
        """`cpu`, `cuda:0`, …"""
        return str(self._model.device)

    def score(self, samples: Sequence[Pair]) -> list[Score]:
        """Score samples, in batches of texts of like length."""
        texts = self.encode(samples)
        scores = [Score(error=text) if isinstance(text, str) else Score() for text in texts]
        places = [place for place, text in enumerate(texts) if isinstance(text, Text)]
        for batch in cut([len(texts[place].ids) for place in places], self.config.batch_tokens):  # type: ignore[union-attr]
            numbers = [places[number] for number in batch]
            for number, score in zip(numbers, self.run([texts[n] for n in numbers]), strict=True):  # type: ignore[misc]
                scores[number] = score
        return scores

    def encode(self, samples: Sequence[Pair]) -> list[Text | str]:
        """Token ids of samples; for one that cannot be scored the reason, in one sentence."""
        results: list[Text | str] = [""] * len(samples)
        rendered: dict[int, _Rendered] = {}
        for number, (prompt, completion) in enumerate(samples):
            try:
                rendered[number] = self._render(prompt, completion)
            except DataError as error:
                results[number] = str(error)
        for special in (True, False):
            chosen = {number: text for number, text in rendered.items() if text.special == special}
            if not chosen:
                continue
            encoded = self._tokenizer(
                [text.text for text in chosen.values()],
                add_special_tokens=special,
                return_offsets_mapping=True,
                return_special_tokens_mask=True,
                return_attention_mask=False,
                verbose=False,  # it would warn about long texts, which are cut below
            )
            columns = zip(
                encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True
            )
            for (number, text), (ids, offsets, added) in zip(chosen.items(), columns, strict=True):
                # Without asking for special tokens none is added, but those in the text are marked, too.
                encoding = _Encoding(ids, offsets, added if special else [0] * len(ids))
                try:
                    results[number] = self._fit(text, encoding)
                except DataError as error:
                    results[number] = str(error)
        return results

    def run(self, batch: Sequence[Text]) -> list[Score]:
        """Score texts in one forward pass, or in more where the memory does not suffice."""
        try:
            values = self._values(batch)
        except torch.OutOfMemoryError:
            torch.accelerator.empty_cache()
            if len(batch) == 1:
                text = batch[0]
                return [Score(None, len(text.ids), text.truncated, "the memory does not suffice for it")]
            half = len(batch) // 2
            return [*self.run(batch[:half]), *self.run(batch[half:])]
        return [
            Score(value, len(text.ids), text.truncated)
            if math.isfinite(value)
            else Score(None, len(text.ids), text.truncated, f"the model gives {value}")
            for text, value in zip(batch, values, strict=True)
        ]

    @torch.inference_mode()
    def _values(self, batch: Sequence[Text]) -> list[float]:
        width = max(len(text.ids) for text in batch)
        pad = self._pad
        if pad is None:
            # Causal models score the last token that is not the padding, so that must be in no text. What it
            # is makes no difference otherwise: behind the text and masked, nothing looks at it.
            used = {token for text in batch for token in text.ids}
            pad = next(token for token in range(len(used) + 1) if token not in used)
            self._model.config.get_text_config().pad_token_id = pad
        ids = torch.full((len(batch), width), pad, dtype=torch.long)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        for row, text in enumerate(batch):
            ids[row, : len(text.ids)] = torch.tensor(text.ids)
            mask[row, : len(text.ids)] = 1
        device = self._model.device
        logits = self._model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float()
        if self.head == "sequence":
            return self._activate(logits).tolist()
        return [
            self._reduce(self._activate(row[list(text.ends)]))
            for row, text in zip(logits, batch, strict=True)
        ]

    def _activate(self, logits: torch.Tensor) -> torch.Tensor:
        """[n, labels] → [n]: the scores of the label that counts."""
        if self.config.activation == "sigmoid":
            logits = logits.sigmoid()
        elif self.config.activation == "softmax":
            logits = logits.softmax(-1)
        return logits[:, self._label]

    def _reduce(self, steps: torch.Tensor) -> float:
        """From the scores of the steps to that of the completion."""
        if not bool(steps.isfinite().all()):
            return math.nan  # a minimum could hide it
        return reduce_steps(steps.tolist(), self.config.step_reduce)

    # --- texts --------------------------------------------------------------------------------------------

    def _render(self, prompt: Prompt, completion: str) -> _Rendered:
        """The text to be scored.

        Raises:
            DataError: the sample and the template do not fit, or it has no steps.
        """
        completion, ends = well_formed(completion), tuple[int, ...]()
        if self.head == "token":
            completion, ends = split_steps(completion, self.config.step_separator)
        if self.config.template is not None:
            before, text, at = "", "", 0
            for part in _FIELDS.split(self.config.template):
                if part == "{completion}":
                    at, before = len(text), text
                    text += completion
                else:
                    text += plain_prompt(prompt) if part == "{prompt}" else part
            return _Rendered(text, self._needs_special(before), (at, at + len(completion)), _moved(ends, at))
        if self._tokenizer.chat_template is not None:
            return self._render_chat(prompt, completion, ends)
        if not isinstance(prompt, str):
            raise DataError("the prompt is a list of messages, for which the model has no chat template")
        prompt = well_formed(prompt)
        at = len(prompt)
        text = prompt + completion
        return _Rendered(text, self._needs_special(text), (at, at + len(completion)), _moved(ends, at))

    def _render_chat(self, prompt: Prompt, completion: str, ends: tuple[int, ...]) -> _Rendered:
        messages = [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt
        messages = [Message(**{**m, "content": well_formed(m["content"])}) for m in messages]
        try:
            before = self._apply_template(messages, add_generation_prompt=True)
            text = self._apply_template([*messages, Message(role="assistant", content=completion)])
        except TemplateError as error:
            raise DataError(f"the model's chat template refuses the sample: {error}") from error
        stripped = completion.strip()  # as many templates do
        for content, shift in ((completion, 0), (stripped, completion.find(stripped))):
            at = len(before) if text.startswith(content, len(before)) and text.startswith(before) else -1
            at = text.rfind(content) if at < 0 else at
            if at >= 0:
                inside = tuple(min(end - shift, len(content)) for end in ends)
                return _Rendered(text, False, (at, at + len(content)), _moved(inside, at))
        if ends:
            raise DataError("the model's chat template changes the completion, so its steps are not known")
        return _Rendered(text, False, None)

    def _apply_template(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        return self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _needs_special(self, text: str) -> bool:
        """Whether special tokens are to be added: not if the text brings the first of them itself."""
        first = self._tokenizer.bos_token or self._tokenizer.cls_token
        return not (first and text.startswith(first))

    def _fit(self, rendered: _Rendered, encoding: _Encoding) -> Text:
        """The text within `max_length`: what does not fit is cut from the beginning of the prompt.

        A token that begins every text (beginning of sequence) stays.

        Raises:
            DataError: the completion alone is too long, or there is no text.
        """
        ids, ends = encoding.ids, [encoding.until(end) for end in rendered.ends]
        if not ids:
            raise DataError("the text is empty")
        limit = self.max_length
        if limit is None or len(ids) <= limit:
            return Text(tuple(ids), False, tuple(ends))
        if rendered.span is None:
            raise DataError(
                f"the text has {len(ids)} tokens, max_length is {limit}, and where it may be cut is unknown"
            )
        kept = int(ids[0] in (self._tokenizer.bos_token_id, self._tokenizer.cls_token_id))
        removed = len(ids) - limit
        first = encoding.since(rendered.span[0])
        if kept + removed > first:
            raise DataError(
                f"the completion alone has {len(ids) - first} tokens with what the template puts behind it, "
                f"and max_length is {limit}"
            )
        return Text(tuple(ids[:kept] + ids[kept + removed :]), True, tuple(end - removed for end in ends))

    # --- loading ------------------------------------------------------------------------------------------

    def _load_model(self, folder: str) -> Any:
        config = self.config
        kind = (
            AutoModelForSequenceClassification if self.head == "sequence" else AutoModelForTokenClassification
        )
        try:
            model, found = kind.from_pretrained(
                folder,
                dtype="auto" if config.dtype == "auto" else getattr(torch, config.dtype),
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
            )
        except Exception as error:
            raise RewardError(f"{config.path} cannot be loaded: {_line(error)}") from error
        missing = sorted(found["missing_keys"])
        if missing:
            rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise RewardError(
                f"{config.path} has no weights for {', '.join(missing[:3])}{rest}, which would be random: "
                "it is no trained reward model"
            )
        device = config.device
        if device is None:
            found_device = (
                torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            )
            device = "cpu" if found_device is None else str(found_device)
        try:
            model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise RewardError(f"{config.path} cannot be put on {device}: {_line(error)}") from error
        model.config.use_cache = False
        return model.eval()

    def _labels(self) -> list[str]:
        names = self._model.config.id2label
        return [str(names[number]) for number in sorted(names)]

    def _chosen_label(self) -> int:
        """The number of the label whose score counts."""
        label, path = self.config.label, self.config.path
        if self.config.activation == "softmax" and len(self.labels) == 1:
            raise RewardError(
                f"{path} has one label, whose softmax is always 1: use activation none or sigmoid"
            )
        if label is None and len(self.labels) == 1:
            return 0
        listed = ", ".join(f"{number} ({name})" for number, name in enumerate(self.labels))
        if label is None:
            raise RewardError(f"{path} has {len(self.labels)} labels, {listed}: set label")
        if label in self.labels:
            return self.labels.index(str(label))
        if isinstance(label, int) and 0 <= label < len(self.labels):
            return label
        raise RewardError(f"{path} has no label {label!r}; there are {listed}")

    def _own_limit(self) -> int | None:
        """Tokens that the model and its tokenizer allow."""
        limits = [
            getattr(self._model.config.get_text_config(), "max_position_embeddings", None),
            self._tokenizer.model_max_length,
        ]
        return min((limit for limit in limits if limit and 0 < limit < NO_LIMIT), default=None)


def cut(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Batches of like lengths: numbers of texts, of at most `budget` tokens a batch with padding.

    A text that is longer by itself is a batch.
    """
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        # Lengths ascend, so the new one is the width of the batch.
        if batches and (len(batches[-1]) + 1) * lengths[number] <= budget:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


def _moved(ends: Sequence[int], by: int) -> tuple[int, ...]:
    return tuple(end + by for end in ends)


def _line(error: BaseException) -> str:
    """The first line of an error's text."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
