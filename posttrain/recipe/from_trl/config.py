"""Reading a configuration of TRL: values with TRL's defaults, and notes on what becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from posttrain.errors import RecipeError
from posttrain.recipe.from_trl.keys import CARRIED

Tree = dict[str, Any]
T = TypeVar("T")


@dataclass
class Config:
    """The values of a configuration, with TRL's defaults; a wrong type is an error that names the key.

    `name` is the file's. `changed` and `left_out` are the notes on keys, see `Converted`.
    """

    name: str
    values: dict[str, Any]
    changed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def given(self, key: str) -> bool:
        """Whether the configuration sets a key to something other than null."""
        return self.values.get(key) is not None

    def raw(self, key: str) -> Any:
        """The value as it stands there."""
        value = self.values.get(key)
        return CARRIED[key] if value is None else value

    def number(self, key: str) -> float:
        """A number; text that is one counts, as `1e-6` is text in YAML 1.1."""
        return self._read(key, float, "a number")

    def count(self, key: str) -> int:
        """A whole number."""
        return self._read(key, whole, "a whole number")

    def flag(self, key: str) -> bool:
        """True or false."""
        return self._read(key, _flag, "true or false")

    def text(self, key: str) -> str:
        """Text."""
        return self._read(key, _text, "text")

    def texts(self, key: str) -> list[str]:
        """A list of names, or one."""
        value = self.raw(key)
        entries = [value] if isinstance(value, str) else value
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise RecipeError(f"{self.name}: {key} should be a list of names, found {value!r}.")
        return entries

    def positive(self, key: str) -> int:
        """A whole number from 1 on."""
        count = self.count(key)
        if count < 1:
            raise RecipeError(f"{self.name}: {key} should be at least 1, found {count}.")
        return count

    def _read(self, key: str, parse: Callable[[Any], T], what: str) -> T:
        try:
            return parse(self.raw(key))
        except (TypeError, ValueError):
            raise RecipeError(f"{self.name}: {key} should be {what}, found {self.raw(key)!r}.") from None


def whole(value: Any) -> int:
    """A whole number of a number or text."""
    if isinstance(value, bool) or float(value) != int(float(value)):
        raise ValueError
    return int(float(value))


def _flag(value: Any) -> bool:
    words = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
    return words[value.lower()] if isinstance(value, str) and value.lower() in words else _only_bool(value)


def _only_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def read_trl(path: Path) -> dict[str, Any]:
    """A configuration file of TRL, YAML or JSON.

    Raises:
        RecipeError: there is none, it cannot be parsed, or it is no mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"there is no file {path}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RecipeError(f"{path} cannot be read as YAML or JSON: {reason}.") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path} should be a mapping of TRL's options, found {type(values).__name__}.")
    return {str(key): value for key, value in values.items()}
