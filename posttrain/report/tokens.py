"""Texts of single tokens, from the tokenizer that a run used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.report.run_folder import Run

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BROKEN = "\ufffd"
LONGEST = 4
"""A character of UTF-8 has at most so many bytes, so it is spread over at most so many tokens."""


class Pieces:
    """What every token of a text contributes to it."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def of(self, ids: Sequence[int]) -> list[str]:
        """One text for each token, which joined are the whole text, special tokens included.

        A character that several tokens make up stands with the last of them.
        """
        pieces, waiting = [], list[int]()
        for token in ids:
            waiting.append(token)
            text = self._text(waiting)
            if text.endswith(BROKEN) and len(waiting) < LONGEST:
                pieces.append("")
            else:
                pieces.append(text)
                waiting = []
        if waiting and pieces:  # the text ends within a character
            pieces[-1] = self._text(waiting)
        return pieces

    def single(self, token: int) -> str:
        """The text of a token that stands alone."""
        if token not in self._known:
            self._known[token] = self._decode([token])
        return self._known[token]

    def _text(self, ids: list[int]) -> str:
        return self.single(ids[0]) if len(ids) == 1 else self._decode(ids)

    def _decode(self, ids: list[int]) -> str:
        # Some decoders take the space off a text's beginning: the second of two equal texts keeps it.
        once = self._tokenizer.decode(ids, skip_special_tokens=False)
        twice = self._tokenizer.decode([*ids, *ids], skip_special_tokens=False)
        return str(twice[len(once) :])


def pieces_of(run: Run) -> Pieces | None:
    """The texts of a run's tokens; None where its tokenizer is not on this machine or not in one file."""
    from tokenizers import Tokenizer

    path = next((path for path in _places(run) if path.is_file()), None)
    return None if path is None else Pieces(Tokenizer.from_file(str(path)))


def _places(run: Run) -> list[Path]:
    """Where the tokenizer may be: with the run's models, the model it started from, or among downloads."""
    name = "tokenizer.json"
    places = sorted(run.path.glob(f"models/*/{name}"))
    model = str((run.recipe.get("model") or {}).get("path") or "")
    if model:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        places.append(_started_in(run) / model / name)
        try:
            cached = try_to_load_from_cache(model, name)
        except HFValidationError:  # a path, and no name of the hub
            cached = None
        places += [Path(cached)] if isinstance(cached, str) else []
    return places


def _started_in(run: Run) -> Path:
    """The folder that the recipe's paths start from."""
    state = run.path / "state.json"
    try:
        return Path(json.loads(state.read_text(encoding="utf-8"))["directory"])
    except (OSError, ValueError, KeyError):
        return Path()
