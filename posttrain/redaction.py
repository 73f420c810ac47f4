"""Secrets stay in the environment: in what a run writes and prints, the variable's name stands for its value.

A recipe names the variable (`token_env: STYLE_TOKEN`) and holds no secret itself; `posttrain.recipe.problems`
refuses one that does. What is left are texts that others make of secrets, above all messages of exceptions.
They pass `redact` where they are made (rewards, tools) and where they are written or printed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

MIN_LENGTH = 8
"""Shorter values are left alone: `1`, `true` or `none` would be found everywhere."""
_NAME = re.compile(
    r"(^|_)(API|ACCESS|PRIVATE|SECRET|AUTH)?_?(KEYS?|TOKENS?|SECRETS?|PASSWORDS?|PASSWD|PASSPHRASE|CREDENTIALS?|PAT)(_ID)?$",
    re.IGNORECASE,
)
_LOGIN = re.compile(r"://([^/\s:@]*):([^/\s@]+)@")


def secrets_in(environment: Mapping[str, str]) -> dict[str, str]:
    """The secret values of an environment, longest first, and the variable of each.

    Secret are variables whose name ends in KEY, TOKEN, SECRET, PASSWORD, PASSPHRASE or CREDENTIALS, and the
    password in a URL such as `http://user:password@proxy:3128`, whatever the variable is called.
    """
    found: dict[str, str] = {}
    for name, value in environment.items():
        if _NAME.search(name) and len(value.strip()) >= MIN_LENGTH:
            found.setdefault(value.strip(), name)
        for login in _LOGIN.finditer(value):
            for password in {login[2], unquote(login[2])}:
                if len(password) >= MIN_LENGTH:
                    found.setdefault(password, name)
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def secret_in(text: str) -> str | None:
    """The environment variable whose secret value is part of a text; None without one."""
    return next((name for value, name in secrets_in(os.environ).items() if value in text), None)


def redact(text: str) -> str:
    """The text with every secret of the environment as `[NAME]`."""
    return _replace(text, secrets_in(os.environ))


def redact_texts(content: Any) -> Any:
    """The same for every text in a tree of mappings, lists and tuples, which is otherwise left as it is."""
    return _replace(content, secrets_in(os.environ))


def _replace(content: Any, secrets: Mapping[str, str]) -> Any:
    if isinstance(content, str):
        for value, name in secrets.items():
            content = content.replace(value, f"[{name}]")
        return content
    if isinstance(content, Mapping):
        return {_replace(key, secrets): _replace(value, secrets) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_replace(value, secrets) for value in content]
    return content
