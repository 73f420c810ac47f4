"""Secrets of the environment: which there are, and that texts lose them."""

from __future__ import annotations

import os

import pytest

from posttrain.errors import RecipeError
from posttrain.recipe.load import load_recipe
from posttrain.recipe.tools_schema import ToolsConfig, ToolSpec
from posttrain.redaction import redact, redact_texts, secrets_in
from posttrain.rollout.tools import environment_factory
from posttrain.rollout.tools_worker import Action, Conversations, Task
from posttrain.rollout.types import Example

CANARY = "canary-4f9a1c77e2"
TOOLS = '''
import os

def tells(text: str) -> str:
    """Says it.

    Args:
        text: Anything.
    """
    return f"the key is {os.environ['LOOKUP_KEY']}"

def raises(text: str) -> str:
    """Says it in an error.

    Args:
        text: Anything.
    """
    raise ValueError("x" * 290 + os.environ["LOOKUP_KEY"])
'''
RECIPE = """
name: secretive
model: {path: nowhere}
rewards:
  - {name: style, use: http, args: {url: "http://localhost:1/score"}}
stages:
  - evaluate: {}
"""


def test_secrets_are_told_by_the_names_of_variables_and_the_logins_in_urls():
    environment = {
        "HF_TOKEN": "aaaaaaaa-1",
        "OPENAI_API_KEY": "bbbbbbbb-2",
        "DB_PASSWORD": "cccccccc-3",
        "AWS_SECRET_ACCESS_KEY": "dddddddd-4",
        "https_proxy": "http://me:eeeeeeee%2F5@proxy:3128",
        "SHORT_KEY": "abc",
        "TOKENIZERS_PARALLELISM": "false-or-true",
        "KEYBOARD": "a layout of keys",
        "PWD": "a/working/folder",
    }
    assert secrets_in(environment) == {
        "aaaaaaaa-1": "HF_TOKEN",
        "bbbbbbbb-2": "OPENAI_API_KEY",
        "cccccccc-3": "DB_PASSWORD",
        "dddddddd-4": "AWS_SECRET_ACCESS_KEY",
        "eeeeeeee%2F5": "https_proxy",
        "eeeeeeee/5": "https_proxy",
    }


def test_the_longer_of_two_secrets_goes_first(monkeypatch):
    monkeypatch.setenv("A_KEY", "12345678")
    monkeypatch.setenv("B_KEY", "1234567890")
    assert redact("1234567890 and 12345678") == "[B_KEY] and [A_KEY]"


def test_a_tree_loses_secrets_and_nothing_else(monkeypatch):
    monkeypatch.setenv("A_KEY", CANARY)
    tree = {"why": f"bad key {CANARY}!", "values": (1, 2.5, None, True), CANARY: [{"a": CANARY}]}
    assert redact_texts(tree) == {
        "why": "bad key [A_KEY]!",
        "values": [1, 2.5, None, True],
        "[A_KEY]": [{"a": "[A_KEY]"}],
    }


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("api_key", CANARY),
        ("Authorization", f"Bearer {CANARY}"),
        ("headers.X-Api-Key", CANARY),
        ("headers.Cookie", f"session={CANARY}"),
        ("headers.X-Whatever", f"Bearer {CANARY}"),
        ("url", f"http://me:{CANARY}@localhost/score"),
        ("url", f"http://localhost/score?token={CANARY}"),
        ("note", CANARY + "-of-the-environment"),
    ],
)
def test_a_recipe_with_a_secret_is_refused_without_showing_it(tmp_path, monkeypatch, place, value):
    monkeypatch.setenv("SOME_SERVICE_TOKEN", CANARY + "-of-the-environment")
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [f"rewards.style.args.{place}={value}", os.environ["SOME_SERVICE_TOKEN"]])
    assert f"rewards[0].args.{place}: " in str(caught.value)
    assert CANARY not in str(caught.value)
    load_recipe(path, ["rewards.style.args.token_env=SOME_SERVICE_TOKEN"])


def test_what_a_tool_lets_slip_is_not_shown_to_the_policy(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOKUP_KEY", CANARY)
    (tmp_path / "leaky.py").write_text(TOOLS)
    names = [ToolSpec(name=f"{tmp_path}/leaky.py:{name}") for name in ("tells", "raises")]
    conversations = Conversations(environment_factory(ToolsConfig(use=names)), keep=False)
    shown = [
        conversations.run(Task(0, Example("row", "?"), (), Action(name, {"text": "?"}))).output
        for name in ("tells", "raises")
    ]
    assert shown[0] == "the key is [LOOKUP_KEY]"
    assert shown[1] is not None
    assert shown[1].startswith("Error: xxx")
    assert shown[1].endswith("[LOOKUP_KEY]")
