"""Values that deterministic rewards have given before, kept in the run folder.

A key is a hash of everything the value may depend on: the reward's name, version and code, its arguments, and
the canonical input of one call. Errors are never kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.errors import RewardError
from posttrain.rewards.calling import Sample
from posttrain.rewards.registry import RewardInfo
from posttrain.rollout.types import Completion, Example

Values = list[float | None]
"""What one call gave: a value for each of its samples, None where the reward does not apply."""

KEY_BYTES = 16


class RewardCache:
    """A dictionary that is on disk at once.

    A line of the file is `["key", [values]]`. Every process appends to a file of its own and reads at its
    start the files of all others beside it, so there is nothing to lock, also on a network disk. A line that
    a kill or a full disk cut short is no JSON list, and is left out.
    """

    def __init__(self, path: Path):
        """Read what is there; `path` is this process's own file.

        Raises:
            RewardError: the file cannot be written.
        """
        self._path = path
        self._values: dict[bytes, Values] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for file in sorted(path.parent.glob(f"*{path.suffix}")):
                self._read(file)
            # After a line that was cut short the next one must not be glued to it.
            whole = not path.is_file() or path.read_bytes()[-1:] in (b"", b"\n")
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            if not whole:
                os.write(self._file, b"\n")
        except OSError as error:
            raise RewardError(f"reward cache {path} cannot be used: {error.strerror}") from error

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str) -> Values | None:
        """The values under a key; None if there are none."""
        return self._values.get(bytes.fromhex(key))

    def add(self, key: str, values: Values) -> None:
        """Keep values under a key.

        Raises:
            RewardError: they cannot be written.
        """
        line = json.dumps([key, values], allow_nan=False).encode() + b"\n"
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(0, "the disk is full")
        except OSError as error:
            raise RewardError(f"reward cache {self._path} cannot be written: {error.strerror}") from error
        self._values[bytes.fromhex(key)] = values

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _read(self, file: Path) -> None:
        for line in file.read_bytes().splitlines():
            try:
                key, values = json.loads(line)
                self._values[bytes.fromhex(key)] = [None if v is None else float(v) for v in values]
            except (ValueError, TypeError):
                continue


class CacheKeys:
    """The keys of one reward's calls.

    `canonical` gives the part of a sample that the value depends on, where that is less than everything: then
    samples that differ elsewhere have equal keys. `step` is given for rewards that can see it.
    """

    def __init__(
        self,
        info: RewardInfo,
        args: Mapping[str, Any],
        canonical: Callable[[Completion, Example], Hashable] | None = None,
        step: int | None = None,
    ):
        self._head = digest([info.name, info.version, info.sha256, dict(args), step])
        self._canonical = canonical
        self._examples: dict[int, tuple[Example, str]] = {}

    def of(self, samples: Sequence[Sample]) -> str:
        """The key of one call."""
        return digest([self._head, *(self._input(*sample) for sample in samples)])

    def _input(self, completion: Completion, example: Example) -> Any:
        if self._canonical is not None:
            return self._canonical(completion, example)
        _, known = self._examples.get(id(example), (None, None))
        if known is None:
            known = digest([example.id, example.prompt, example.answer, example.columns])
            self._examples[id(example)] = (example, known)  # the example is kept, so that its id is its own
        return [
            known,
            completion.text,
            completion.token_ids,
            completion.finish_reason,
            completion.loss_mask,
        ]


def digest(value: Any) -> str:
    """A hash of any value; equal for equal JSON values, whatever the order of keys."""
    try:
        text = json.dumps(value, sort_keys=True, default=_pickled).encode()
    except (TypeError, ValueError):  # keys that JSON has not
        text = pickle.dumps(value)
    return hashlib.blake2b(text, digest_size=KEY_BYTES).hexdigest()


def _pickled(value: Any) -> str:
    """What JSON cannot hold. Equal values may differ here, which only costs a call."""
    return f"{type(value).__qualname__}:{pickle.dumps(value).hex()}"
