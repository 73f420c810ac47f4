"""Preference pairs as they are read and encoded, and what is no pair."""

from __future__ import annotations

import json

import pytest
from helpers import make_tokenizer

from posttrain.data.preferences import encode_pair, load_pairs
from posttrain.errors import DataError
from posttrain.recipe.schema import DataSource

GOOD = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}


def write(folder, *rows):
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(folder, *rows, **options):
    path = write(folder, *rows)
    return load_pairs(DataSource(jsonl=str(path), shuffle=False, **options))


def test_numbers_and_columns(tmp_path):
    plain, full = load(tmp_path, GOOD, {**GOOD, "margin": -0.5, "target": 0, "weight": 2, "source": "x"})
    assert (plain.margin, plain.target, plain.weight) == (0.0, 1.0, 1.0)
    assert (full.margin, full.target, full.weight) == (-0.5, 0.0, 2.0)
    assert full.columns["source"] == "x"
    assert plain.where.endswith("pairs.jsonl:1")


def test_a_null_is_a_column_that_the_row_does_not_have(tmp_path):
    (pair,) = load(tmp_path, {**GOOD, "margin": None, "target": None, "weight": None})
    assert (pair.margin, pair.target, pair.weight) == (0.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "1", "chosen": "2"}, "a preference needs a column 'rejected'; besides the prompt"),
        ({**GOOD, "rejected": "2"}, "chosen and rejected are the same, so there is no preference"),
        ({**GOOD, "chosen": " "}, "the chosen is empty"),
        ({**GOOD, "chosen": 2}, "the chosen must be text or a list of messages, it is int"),
        ({**GOOD, "chosen": [{"role": "assistant", "content": "2"}]}, "chosen and rejected must both be"),
        ({**GOOD, "target": 1.5}, "the target must be between 0 and 1, it is 1.5"),
        ({**GOOD, "target": float("nan")}, "the target must be a finite number, it is nan"),
        ({**GOOD, "margin": float("inf")}, "the margin must be a finite number, it is inf"),
        ({**GOOD, "margin": "1"}, "the margin must be a finite number, it is '1'"),
        ({**GOOD, "weight": True}, "the weight must be a finite number, it is True"),
        ({**GOOD, "weight": -1}, "the weight must not be negative, it is -1"),
    ],
)  # fmt: skip
def test_rows_that_are_no_pair(tmp_path, row, problem):
    with pytest.raises(DataError) as error:
        load(tmp_path, GOOD, row)
    assert str(error.value).startswith(f"{tmp_path}/pairs.jsonl:2: {problem}")


def test_encoded_as_text_and_as_chat(tmp_path):
    tokenizer = make_tokenizer()
    (pair,) = load(tmp_path, GOOD)
    chosen, rejected = encode_pair(pair, tokenizer, "text")
    assert [tokenizer.decode(ids) for ids in (chosen, rejected)] == ["1+1=2", "1+1=3"]
    chosen, _ = encode_pair(pair, tokenizer)
    user, assistant = ("<|im_start|>user\n1+1=<|im_end|>\n", "<|im_start|>assistant\n2<|im_end|>\n")
    assert tokenizer.decode(chosen) == user + assistant


def test_messages(tmp_path):
    row = {key: [{"role": "assistant", "content": value}] for key, value in GOOD.items()}
    row["prompt"] = [{"role": "user", "content": "1+1="}]
    tokenizer = make_tokenizer()
    (pair,), (plain,) = load(tmp_path, row), load(tmp_path, GOOD)
    assert encode_pair(pair, tokenizer) == encode_pair(plain, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"pairs.jsonl:1: chat messages need a chat template"):
        encode_pair(pair, tokenizer)


def test_a_long_pair_is_named(tmp_path):
    (pair,) = load(tmp_path, {**GOOD, "rejected": "3" * 20})
    with pytest.raises(DataError, match=r"pairs.jsonl:1: rejected has 24 tokens with its prompt; 10 fit"):
        encode_pair(pair, make_tokenizer(), "text", 10)


def test_answers_that_a_tokenizer_cannot_tell_apart(tmp_path):
    (pair,) = load(tmp_path, {**GOOD, "chosen": "é", "rejected": "è"})  # both unknown
    with pytest.raises(DataError, match=r"pairs.jsonl:1: chosen and rejected have the same tokens"):
        encode_pair(pair, make_tokenizer())
