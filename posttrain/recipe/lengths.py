"""Lengths of a data source's prompts and demonstrations, where that can be told without reading much.

Rows that are in a file of lines or made by a built-in task are looked at, a hundred or so. Their tokens are
counted where the model's tokenizer is a small file on this machine; otherwise UTF-8 bytes bound them, as
they do with every tokenizer that works on bytes. Of anything else nothing is known before the run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from posttrain.errors import PosttrainError
from posttrain.recipe.data_schema import DataSource

ROWS = 128
"""Rows that are looked at."""
TOKENIZER_BYTES = 1 << 20
"""A larger tokenizer takes longer to load than a plan may take."""
TEMPLATE_TOKENS, SMALL_TEMPLATE = 32, 4
"""Room for what a chat template puts around a message; a small tokenizer has one of a few special tokens."""

Row = tuple[str, str | None]
"""Prompt and demonstration."""


@dataclass(frozen=True)
class Lengths:
    """Of the rows looked at: the longest prompt, the longest demonstration, and the longest of both together.

    `exact` are tokens; otherwise they are bytes, which no number of tokens exceeds.
    """

    rows: int
    prompt: int
    completion: int | None
    both: int
    exact: bool


class SourceLengths:
    """Lengths of a recipe's sources for its model, each looked at once.

    Args:
        model: path of the model.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._known: dict[str, Lengths | None] = {}

    def of(self, source: DataSource | None, *, pairs: bool = False) -> Lengths | None:
        """See `lengths_of`, or of preference pairs `pair_lengths`."""
        if source is None:
            return None
        key = f"{pairs} {source!r}"
        if key not in self._known:
            self._known[key] = (pair_lengths if pairs else lengths_of)(source, self._model)
        return self._known[key]


def lengths_of(source: DataSource, model: str) -> Lengths | None:
    """Lengths of a source's rows for the tokenizer of a model folder; None where nothing is known."""
    folder = Path(model).expanduser()
    rows: list[Row] = []
    if source.jsonl is not None:
        rows = _file_rows(source)
    elif source.task is not None and folder.is_dir():  # a task is for tiny models, which are folders
        rows = _task_rows(source)
    if not rows:
        return None
    count, exact = _counter(folder)
    around = count((source.system or "") + (source.template or ""))
    if source.format != "text" and (not exact or (folder / "chat_template.jinja").is_file()):
        around += SMALL_TEMPLATE if exact else TEMPLATE_TOKENS
    prompts = [count(prompt) + around for prompt, _ in rows]
    answers = [0 if text is None else count(text) + 1 for _, text in rows]  # and the end of sequence
    return Lengths(
        rows=len(rows),
        prompt=max(prompts),
        completion=max(answers) if any(answers) else None,
        both=max(map(sum, zip(prompts, answers, strict=True))),
        exact=exact,
    )


def _counter(folder: Path) -> tuple[Callable[[str], int], bool]:
    """Tokens of a text by the model's own tokenizer, or its bytes; and whether they are tokens."""
    path = folder / "tokenizer.json"
    if path.is_file() and path.stat().st_size <= TOKENIZER_BYTES:
        try:
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(path))
            return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids), True
        except Exception:  # the library raises a bare Exception; the run will say what is wrong with the file
            pass
    return lambda text: len(text.encode()), False


def _file_rows(source: DataSource) -> list[Row]:
    columns, found = source.columns, []
    try:
        with Path(source.jsonl or "").expanduser().open("rb") as lines:
            for line in islice((line for line in lines if line.strip()), ROWS):
                row = json.loads(line)
                answer = None if columns.completion is None else _text(row.get(columns.completion))
                found.append((_text(row.get(columns.prompt)) or "", answer))
    except (OSError, ValueError, AttributeError):
        return []  # the checks have said so, or the run will
    return found


def pair_lengths(source: DataSource, model: str) -> Lengths | None:
    """As `lengths_of` for a file of preference pairs: both answers of a pair count."""
    if source.jsonl is None:
        return None
    columns = [source.columns.model_copy(update={"completion": name}) for name in ("chosen", "rejected")]
    longest = [lengths_of(source.model_copy(update={"columns": each}), model) for each in columns]
    known = [lengths for lengths in longest if lengths is not None]
    return max(known, key=lambda lengths: lengths.both) if known else None


def _text(value: Any) -> str | None:
    """Text of a column: as it is, or the contents of messages."""
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, list):
        return "\n".join(str(message.get("content", "")) for message in value if isinstance(message, dict))
    return str(value)


def _task_rows(source: DataSource) -> list[Row]:
    # numpy, which tasks draw with, takes a tenth of a second: it is imported for such recipes alone.
    from posttrain.data.tasks import make_task

    # The last problems of a small split are found only after many draws.
    size = min(max((source.size or 0) // 4, 1), ROWS)
    try:
        examples = make_task(str(source.task), size=size, seed=source.seed, split=source.split, **source.args)
    except (PosttrainError, TypeError, ValueError):  # of wrong arguments the run says which
        return []
    return [(_text(example.prompt) or "", _text(example.columns.get("completion"))) for example in examples]
