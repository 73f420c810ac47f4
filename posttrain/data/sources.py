"""The datasets of a recipe, read as lists of `Example`.

    read    one reader per kind of source yields rows (plain dicts), each with the place it comes from
    map     columns are found and checked; template and system message are put around the prompt
    order   ids are given, then the rows are shuffled and limited

Libraries that take long to import are imported by the reader that uses them.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from posttrain.data.tasks import MAX_DRAWS_PER_ROW, make_task, split_of
from posttrain.errors import DataError
from posttrain.recipe.schema import Columns, DataSource
from posttrain.rollout.types import Example, Message, Prompt, derive_seed

if TYPE_CHECKING:
    from datasets import Dataset
    from reasoning_gym.dataset import ProceduralDataset

Row = tuple[str, dict[str, Any]]
"""Where a row comes from, for error messages, and its columns."""


def load_examples(source: DataSource) -> list[Example]:
    """Read, map, shuffle and limit a dataset.

    The order depends on `source.seed` and the rows alone, not on the platform. An example's id is a hash of
    its prompt and answer (and a counter where both repeat): it is the same for every seed and limit.
    `Example.columns` holds the row's columns under their own names, except those called `prompt` and
    `answer`, which are fields of the example; a demonstration is under `completion`.

    Raises:
        DataError: a source that cannot be read or is empty, a missing column, or a row that cannot be used.
    """
    return [example for _, example in load_located(source)]


def load_located(source: DataSource) -> list[tuple[str, Example]]:
    """As `load_examples`, every example with the place it comes from, for messages.

    Raises:
        DataError: as `load_examples`.
    """
    rows = list(READERS[_kind_of(source)](source))
    if not rows:
        raise DataError(f"{_describe(source)} has no rows")
    examples = _with_ids([_to_example(row, source) for row in rows])
    located = [(where, example) for (where, _), example in zip(rows, examples, strict=True)]
    if source.shuffle:
        generator = np.random.Generator(np.random.PCG64(derive_seed("shuffle", source.seed)))
        located = [located[index] for index in generator.permutation(len(located))]
    return located[: source.limit]


def _kind_of(source: DataSource) -> str:
    return next(kind for kind in READERS if getattr(source, kind) is not None)


def _describe(source: DataSource) -> str:
    kind = _kind_of(source)
    return f"{kind} source {getattr(source, kind)!r}" + (f", split {source.split!r}" if kind == "hub" else "")


# --- read -----------------------------------------------------------------------------------------------


def _number_rows(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[Row]:
    """Rows named by their index, as datasets and pandas count."""
    for index, values in enumerate(rows):
        yield f"{name}, row {index} (the first is 0)", values


def _existing_file(kind: str, path: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"{kind} file {path!r} does not exist; looked for {file.absolute()}")
    return file


def _read_jsonl(source: DataSource) -> Iterator[Row]:
    assert source.jsonl is not None
    with _existing_file("jsonl", source.jsonl).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{source.jsonl}:{number}"
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except ValueError as error:  # bad JSON or bad UTF-8
                raise DataError(f"{where}: not valid JSON: {error}") from error
            if not isinstance(values, dict):
                raise DataError(f"{where}: a row is a JSON object, this is {_kind(values)}")
            yield where, values


def _read_parquet(source: DataSource) -> Iterator[Row]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    assert source.parquet is not None
    file = _existing_file("parquet", source.parquet)
    try:
        rows = ParquetFile(file).read().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source.parquet} cannot be read as parquet: {error}") from error
    return _number_rows(source.parquet, rows)


def _read_task(source: DataSource) -> Iterator[Row]:
    assert source.task is not None
    assert source.size is not None
    try:
        examples = make_task(
            source.task, size=source.size, seed=source.seed, split=source.split, **source.args
        )
    except (TypeError, ValueError) as error:
        raise DataError(f"task {source.task!r} refuses its args: {error}") from error
    rows = ({"prompt": e.prompt, "answer": e.answer, **e.columns} for e in examples)
    return _number_rows(f"task {source.task}", rows)


def _read_hub(source: DataSource) -> Iterator[Row]:
    import datasets

    assert source.hub is not None
    folder = Path(source.hub).expanduser()
    if source.hub.startswith((".", "/", "~")) and not folder.is_dir():
        raise DataError(f"dataset folder {source.hub!r} does not exist; looked for {folder.absolute()}")
    try:
        if _is_saved_to_disk(folder):
            dataset = _pick_split(datasets.load_from_disk(str(folder)), source)
        else:
            path = str(folder) if folder.is_dir() else source.hub
            dataset = datasets.load_dataset(
                path, name=source.subset, split=source.split, revision=source.revision
            )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # A DatasetGenerationError says only that something failed; its cause says what.
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"{_describe(source)} cannot be loaded: {reason}") from error
    return _number_rows(f"{source.hub}[{source.split}]", dataset)


def _is_saved_to_disk(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder (of one dataset, or of a dict of splits)."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _pick_split(saved: Dataset | dict[str, Dataset], source: DataSource) -> Dataset:
    """The split of a dataset that `save_to_disk` wrote, which has neither subsets nor revisions."""
    for key in ("subset", "revision"):
        if getattr(source, key) is not None:
            raise DataError(f"{source.hub!r} was written by save_to_disk and has no {key}; leave {key} out")
    if isinstance(saved, dict):
        if source.split not in saved:
            raise DataError(
                f"{source.hub!r} has no split {source.split!r}; {_known(source.split, saved, 'splits')}"
            )
        return saved[source.split]
    if "split" in source.model_fields_set and str(saved.split) != source.split:
        raise DataError(f"{source.hub!r} holds one dataset without splits; leave split out")
    return saved


def _read_reasoning_gym(source: DataSource) -> Iterator[Row]:
    """Different problems of one split. The package has no splits: as for the built-in tasks, the text of a
    problem decides where it belongs, so that splits are disjoint for all seeds and sizes.
    """
    from reasoning_gym.factory import DATASETS

    name, size = source.reasoning_gym, source.size
    assert name is not None
    assert size is not None
    if name not in DATASETS:
        raise DataError(f"reasoning_gym has no dataset {name!r}; {_known(name, DATASETS, 'datasets')}")
    rows: dict[str, dict[str, Any]] = {}
    with _own_global_random(source.seed):
        dataset = _create_reasoning_gym(source, size)
        index = last_new = 0
        while len(rows) < size:
            if index == len(dataset):
                # Most datasets make any entry on demand; a few prepare exactly as many as they are asked for.
                dataset = _create_reasoning_gym(source, 2 * index)
            entry = dataset[index]
            question = entry["question"]
            if question not in rows and split_of(question) == source.split:
                last_new = index
                rows[question] = {
                    "prompt": question,
                    "question": question,  # the dataset's own scorer may want it without template
                    "answer": entry["answer"],
                    "source_dataset": name,
                    "metadata": entry["metadata"],
                }
            elif index - last_new > MAX_DRAWS_PER_ROW:
                raise DataError(
                    f"reasoning_gym dataset {name!r} with these args has only about {len(rows)} problems "
                    f"in split {source.split!r}; size asks for {size}"
                )
            index += 1
    return _number_rows(f"reasoning_gym {name}", rows.values())


@contextmanager
def _own_global_random(seed: int) -> Iterator[None]:
    """Seed Python's and numpy's global generators, which a few datasets use, and put them back after."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(derive_seed("reasoning_gym", seed) % 2**32)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _create_reasoning_gym(source: DataSource, size: int) -> ProceduralDataset:
    import reasoning_gym

    assert source.reasoning_gym is not None
    try:
        return reasoning_gym.create_dataset(source.reasoning_gym, seed=source.seed, size=size, **source.args)
    except (TypeError, ValueError, AssertionError) as error:
        raise DataError(f"{_describe(source)} refuses its args: {error}") from error


READERS: dict[str, Callable[[DataSource], Iterable[Row]]] = {
    "hub": _read_hub,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "task": _read_task,
    "reasoning_gym": _read_reasoning_gym,
}


# --- map ------------------------------------------------------------------------------------------------


def _to_example(row: Row, source: DataSource) -> Example:
    """An example without its id."""
    where, values = row
    columns: Columns = source.columns
    for key in ("prompt", "answer", "completion"):
        column = getattr(columns, key)
        if column is not None and column not in values:
            hint = f"set columns.{key}" + (", null if there is none" if key == "answer" else "")
            raise DataError(f"{where}: no column {column!r} ({hint}); {_known(column, values, 'columns')}")
    prompt = text_or_messages(values[columns.prompt], where, "prompt")
    answer = None if columns.answer is None else _answer_text(values[columns.answer], where)
    others = {name: value for name, value in values.items() if name not in ("prompt", "answer")}
    if columns.completion is not None:
        others["completion"] = values[columns.completion]
    if "completion" in others:
        others["completion"] = text_or_messages(others["completion"], where, "completion")
    return Example(id="", prompt=dress(prompt, source, where), answer=answer, columns=others)


def dress(prompt: Prompt, source: DataSource, where: str) -> Prompt:
    """Put the template around the prompt and the system message before it."""
    if source.template is not None:
        if not isinstance(prompt, str):
            raise DataError(f"{where}: a template needs text prompts, and this prompt is a list of messages")
        prompt = source.template.replace("{prompt}", prompt)
    messages = [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{where}: the prompt ends with an assistant message; it must end before the answer")
    if source.system is None:
        return prompt
    if messages[0]["role"] == "system":
        raise DataError(f"{where}: the prompt has a system message already, and the source sets system too")
    return [Message(role="system", content=source.system), *messages]


def text_or_messages(value: object, where: str, key: str) -> Prompt:
    """Check a prompt or demonstration. Message keys without a value, which tables fill in, are left out."""
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{where}: the {key} is empty")
        return value
    if not isinstance(value, list):
        raise DataError(f"{where}: the {key} must be text or a list of messages, it is {_kind(value)}")
    if not value:
        raise DataError(f"{where}: the {key} is empty")
    messages = []
    for number, message in enumerate(value):
        fields = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
        if not (isinstance(fields.get("role"), str) and isinstance(fields.get("content"), str)):
            raise DataError(f"{where}: message {number} of the {key} needs a role and a content, both text")
        messages.append(cast(Message, fields))
    if not messages[-1]["content"].strip():
        raise DataError(f"{where}: the last message of the {key} is empty")
    return messages


def _answer_text(value: object, where: str) -> str | None:
    """Canonical text of an answer: whole numbers without a decimal point, no trailing zeros, no exponent.

    A null stays None: that row has no reference answer.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int):  # True and False too, as Python writes them
        return str(value)
    if isinstance(value, float | Decimal) and math.isfinite(value):
        text = format(Decimal(repr(value)) if isinstance(value, float) else value, "f")
        text = text.rstrip("0").rstrip(".") if "." in text else text
        return "0" if text == "-0" else text
    raise DataError(f"{where}: the answer must be text or a finite number, it is {_kind(value)}")


def _kind(value: object) -> str:
    """What an unusable value is, in a reader's words."""
    if value is None:
        return "null"
    names = {list: "a list", dict: "an object", str: "text", float: f"{value}"}
    return names.get(type(value), type(value).__name__)


def _known(name: str, names: Iterable[str], what: str) -> str:
    """`columns there are: a, b. Did you mean a?`; of a long list only the nearest names."""
    names = list(names)
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if len(names) <= 20:
        known = f"{what} there are: {', '.join(names) or 'none'}"
        return f"{known}. Did you mean {nearest[0]}?" if nearest else known
    return f"there are {len(names)} {what}; the nearest: {', '.join(nearest) or 'none is similar'}"


# --- order ----------------------------------------------------------------------------------------------


def _with_ids(examples: list[Example]) -> list[Example]:
    """Ids from prompt and answer; the n-th repetition in the source's own order gets the suffix `-n`."""
    seen: dict[str, int] = {}
    identified = []
    for example in examples:
        content = json.dumps([example.prompt, example.answer], sort_keys=True)
        key = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
        count = seen[key] = seen.get(key, -1) + 1
        name = f"{key}-{count}" if count else key
        identified.append(Example(name, example.prompt, example.answer, example.columns))
    return identified
