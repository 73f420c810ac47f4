"""The rows the tiny reasoner is trained on: readable by it, short, written as its recipes write them."""

from dataclasses import replace

import make_tiny_reasoner as script
import pytest


@pytest.fixture(scope="module")
def tokenizer():
    return script.make_tokenizer()


@pytest.fixture(scope="module")
def encoded(tokenizer):
    encode = script.row_encoder(tokenizer)
    return [
        (row, encode(row)) for phase in script.PHASES for row in script.make_rows(replace(phase, rows=200), 0)
    ]


def texts(encoded, tokenizer, task):
    """(what is given, what is learnt) of the rows of a task."""
    for row, ids in encoded:
        if row.id.startswith(f"{task}-"):
            marked = list(zip(ids["input_ids"], ids["completion_mask"], strict=True))
            yield tuple(tokenizer.decode([token for token, mask in marked if mask == own]) for own in (0, 1))


def test_every_character_is_known_and_no_row_is_long(encoded, tokenizer):
    assert len(encoded) > 590
    for row, ids in encoded:
        assert tokenizer.unk_token_id not in ids["input_ids"], row
        assert len(ids["input_ids"]) <= 150, row


def test_calculator_results_are_not_learnt(encoded, tokenizer):
    rows = list(texts(encoded, tokenizer, "calculator"))
    assert any("<tool_call>" in learnt for _, learnt in rows)
    for given, learnt in rows:
        assert given.startswith("<|user|>")
        assert given.count("[") == learnt.count("<tool_call>")
        assert "[" not in learnt
        assert learnt.endswith("</answer><|end|>")
        assert "*" not in given or "<tool_call>" in learnt


def test_searches_are_plain_text(encoded, tokenizer):
    rows = list(texts(encoded, tokenizer, "search"))
    assert any("!</think>" in given for given, _ in rows)
    assert all("<|user|>" not in given and learnt.endswith("<|end|>") for given, learnt in rows)


def test_self_predictions_and_solutions_go_through_the_template(encoded, tokenizer):
    for given, learnt in texts(encoded, tokenizer, "meta_arithmetic"):
        assert given.startswith("<|user|>assess ")
        assert learnt.startswith('{"n": ')
    for given, learnt in texts(encoded, tokenizer, "arithmetic"):
        assert given.endswith("=<|end|><|assistant|>")
        assert learnt.startswith("<think>")
