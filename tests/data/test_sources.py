import json
import math
import random
from decimal import Decimal

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from posttrain.data.sources import load_examples
from posttrain.errors import DataError
from posttrain.recipe.schema import DataSource

ROWS = [{"prompt": f"{n}+{n}=", "answer": 2 * n, "level": n % 3} for n in range(10)]


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    """What `load_dataset` prepares goes to the test's folder, not to the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def jsonl_source(tmp_path, rows=ROWS, **options):
    return DataSource(jsonl=write_jsonl(tmp_path / "rows.jsonl", rows), **options)


def error_of(source):
    with pytest.raises(DataError) as caught:
        load_examples(source)
    return str(caught.value)


def prompts(examples):
    return [example.prompt for example in examples]


# --- kinds of source -------------------------------------------------------------------------------------


def save_jsonl(folder):
    return {"jsonl": write_jsonl(folder / "rows.jsonl", ROWS)}


def save_parquet(folder):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")
    return {"parquet": str(folder / "rows.parquet")}


def save_hub_folder(folder):
    write_jsonl(folder / "train.jsonl", ROWS)
    write_jsonl(folder / "test.jsonl", ROWS[:2])
    return {"hub": str(folder)}


def save_dataset_dict(folder):
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:2])).save_to_disk(
        folder / "saved"
    )
    return {"hub": str(folder / "saved")}


def save_dataset(folder):
    Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return {"hub": str(folder / "saved")}


@pytest.mark.parametrize("save", [save_jsonl, save_parquet, save_hub_folder, save_dataset_dict, save_dataset])
def test_every_file_format_gives_the_same_examples(save, tmp_path):
    examples = load_examples(DataSource(**save(tmp_path)))
    expected = load_examples(jsonl_source(tmp_path))
    assert examples == expected
    assert sorted(prompts(examples)) == sorted(row["prompt"] for row in ROWS)


@pytest.mark.parametrize("save", [save_hub_folder, save_dataset_dict])
def test_split_is_used(save, tmp_path):
    assert len(load_examples(DataSource(**save(tmp_path), split="test"))) == 2


@pytest.mark.parametrize("save", [save_hub_folder, save_dataset_dict])
def test_unknown_split_names_the_ones_there_are(save, tmp_path):
    message = error_of(DataSource(**save(tmp_path), split="tset"))
    assert "tset" in message
    assert "train" in message
    assert "test" in message


def test_subset_of_a_local_folder(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "b.jsonl", ROWS[:3])
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n"
        "- {config_name: a, data_files: a.jsonl}\n"
        "- {config_name: b, data_files: b.jsonl}\n"
        "---\n"
    )
    assert len(load_examples(DataSource(hub=str(tmp_path), subset="b"))) == 3
    assert "'a', 'b'" in error_of(DataSource(hub=str(tmp_path), subset="c"))


def test_saved_dataset_without_splits_refuses_split_and_subset(tmp_path):
    saved = save_dataset(tmp_path)
    assert "leave split out" in error_of(DataSource(**saved, split="test"))
    assert "leave subset out" in error_of(DataSource(**saved, subset="main"))


def test_hub_name_is_passed_to_load_dataset(monkeypatch):
    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = DataSource(hub="someone/sums", subset="main", split="test", revision="abc123")
    assert len(load_examples(source)) == len(ROWS)
    assert calls == [("someone/sums", {"name": "main", "split": "test", "revision": "abc123"})]


def test_hub_failure_is_one_sentence(monkeypatch):
    def load_dataset(path, **options):
        raise ConnectionError("Couldn't reach\n   the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = error_of(DataSource(hub="someone/sums"))
    assert message == "hub source 'someone/sums', split 'train' cannot be loaded: Couldn't reach the Hub"


def test_relative_paths_start_at_the_working_directory(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    assert len(load_examples(DataSource(jsonl="rows.jsonl"))) == len(ROWS)
    for source in (DataSource(jsonl="rws.jsonl"), DataSource(parquet="rws.parquet"), DataSource(hub="./rws")):
        assert str(tmp_path / "rws") in error_of(source)


def test_broken_files_are_named(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "answer": 1}\n{"prompt": \n')
    assert error_of(DataSource(jsonl=str(tmp_path / "train.jsonl"))).startswith(
        f"{tmp_path}/train.jsonl:2: not"
    )
    assert "cannot be loaded" in error_of(DataSource(hub=str(tmp_path)))
    (tmp_path / "rows.parquet").write_text("not parquet at all")
    assert f"{tmp_path}/rows.parquet cannot be read" in error_of(
        DataSource(parquet=f"{tmp_path}/rows.parquet")
    )
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    assert "latin.jsonl:1: not valid JSON" in error_of(DataSource(jsonl=str(tmp_path / "latin.jsonl")))


def test_jsonl_skips_blank_lines_and_counts_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"prompt": "a", "answer": 1}\n\n[1]\n')
    assert error_of(DataSource(jsonl=str(path))) == f"{path}:4: a row is a JSON object, this is a list"
    path.write_text('\n{"prompt": "a", "answer": 1}\n\n')
    assert prompts(load_examples(DataSource(jsonl=str(path)))) == ["a"]


def test_empty_source(tmp_path):
    assert error_of(jsonl_source(tmp_path, [])) == f"jsonl source '{tmp_path}/rows.jsonl' has no rows"


# --- procedural sources ----------------------------------------------------------------------------------


def test_task_brings_answers_and_demonstrations():
    source = DataSource(task="arithmetic", size=20, split="test", args={"min_terms": 2, "max_terms": 2})
    for example in load_examples(source):
        assert int(example.answer) == eval(example.prompt.rstrip("="))
        assert example.columns["completion"].endswith(f"</think>{example.answer}")


@pytest.mark.parametrize("args", [{"size": 3}, {"min_terms": "many"}, {"terms": 2}])
def test_task_args_are_checked(args):
    assert "'arithmetic'" in error_of(DataSource(task="arithmetic", size=2, args=args))


def test_reasoning_gym_columns():
    args = {"min_terms": 3, "max_terms": 3}
    source = DataSource(reasoning_gym="chain_sum", size=5, args=args, template="Q: {prompt}")
    for example in load_examples(source):
        assert example.columns["source_dataset"] == "chain_sum"
        assert example.prompt == f"Q: {example.columns['question']}"
        metadata = example.columns["metadata"]
        assert metadata["num_terms"] == 3
        assert metadata["expression"] in example.prompt
        assert int(example.answer) == eval(metadata["expression"])


def test_reasoning_gym_splits_are_disjoint_for_all_seeds():
    """One-digit sums: so few problems that any leak between the splits would show."""
    small = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    sizes = {"train": 60, "test": 15, "validation": 5}
    seen = {
        split: {
            prompt
            for seed in range(3)
            for prompt in prompts(
                load_examples(
                    DataSource(reasoning_gym="chain_sum", size=size, seed=seed, split=split, args=small)
                )
            )
        }
        for split, size in sizes.items()
    }
    assert all(len(seen[split]) >= size for split, size in sizes.items())  # each draw has no repetition
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["test"] & seen["validation"]


def test_reasoning_gym_prefix_does_not_depend_on_size():
    def draw(size):
        return prompts(
            load_examples(DataSource(reasoning_gym="chain_sum", size=size, split="test", shuffle=False))
        )

    assert draw(12)[:5] == draw(5)


def test_reasoning_gym_with_too_few_problems():
    args = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    message = error_of(DataSource(reasoning_gym="chain_sum", size=5000, args=args))
    assert "has only about" in message
    assert "size asks for 5000" in message


def test_reasoning_gym_datasets_that_prepare_their_entries_and_use_global_random_numbers():
    """`list_functions` does both."""
    source = DataSource(reasoning_gym="list_functions", size=10, split="test")
    random.seed(1)
    np.random.seed(1)
    expected = random.Random(1).random(), np.random.RandomState(1).random()
    first = load_examples(source)
    assert (random.random(), np.random.random()) == expected
    assert load_examples(source) == first


def test_reasoning_gym_errors():
    message = error_of(DataSource(reasoning_gym="chain_sums", size=2))
    assert "no dataset 'chain_sums'" in message
    assert "chain_sum," in message
    assert "min_term" in error_of(DataSource(reasoning_gym="chain_sum", size=2, args={"min_term": 2}))
    assert "max_terms must be" in error_of(
        DataSource(reasoning_gym="chain_sum", size=2, args={"min_terms": 9})
    )


# --- columns ---------------------------------------------------------------------------------------------


def test_columns_are_mapped_and_kept(tmp_path):
    rows = [{"question": "1+1=", "solution": 2, "proof": "one, two", "level": 3}]
    source = jsonl_source(
        tmp_path, rows, columns={"prompt": "question", "answer": "solution", "completion": "proof"}
    )
    [example] = load_examples(source)
    assert (example.prompt, example.answer) == ("1+1=", "2")
    assert example.columns == {**rows[0], "completion": "one, two"}


def test_fields_do_not_reappear_among_the_columns(tmp_path):
    rows = [{"prompt": "1+1=", "answer": "because", "solution": 2}]
    [example] = load_examples(jsonl_source(tmp_path, rows, columns={"answer": "solution"}))
    assert example.answer == "2"
    assert example.columns == {"solution": 2}


def test_missing_column_names_the_place_the_columns_and_the_nearest(tmp_path):
    rows = [{"prompts": "1+1=", "answer": 2}]
    assert error_of(jsonl_source(tmp_path, rows)) == (
        f"{tmp_path}/rows.jsonl:1: no column 'prompt' (set columns.prompt); "
        "columns there are: prompts, answer. Did you mean prompts?"
    )
    rows = [ROWS[0], {"prompt": "1+1="}]
    assert error_of(jsonl_source(tmp_path, rows)).endswith(
        "rows.jsonl:2: no column 'answer' (set columns.answer, null if there is none); "
        "columns there are: prompt"
    )


def test_no_answers(tmp_path):
    rows = [{"prompt": "write a poem"}]
    assert load_examples(jsonl_source(tmp_path, rows, columns={"answer": None}))[0].answer is None
    assert load_examples(jsonl_source(tmp_path, [{"prompt": "a", "answer": None}]))[0].answer is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("  7 apples ", "  7 apples "),
        (12, "12"),
        (10**25, "1" + "0" * 25),
        (12.0, "12"),
        (-0.0, "0"),
        (0.1, "0.1"),
        (120.50, "120.5"),
        (1e-7, "0.0000001"),
        (1e22, "1" + "0" * 22),
        (Decimal("1.500"), "1.5"),
        (True, "True"),
    ],
)
def test_answers_become_canonical_text(value, text, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: [{"prompt": "a", "answer": value}])
    assert load_examples(DataSource(hub="any"))[0].answer == text


@pytest.mark.parametrize("value", [[1], {"value": 1}, math.nan, math.inf])
def test_unusable_answers_name_the_row(value, monkeypatch):
    rows = [ROWS[0], {"prompt": "a", "answer": value}]
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: rows)
    message = error_of(DataSource(hub="any"))
    assert message.startswith(
        "any[train], row 1 (the first is 0): the answer must be text or a finite number"
    )


# --- prompts, template, system message -------------------------------------------------------------------

USER = {"role": "user", "content": "1+1="}


def test_messages_are_kept_and_empty_keys_left_out(tmp_path):
    chat = [{"role": "system", "content": "Add."}, {**USER, "name": None}]
    [example] = load_examples(jsonl_source(tmp_path, [{"prompt": chat, "answer": 2}]))
    assert example.prompt == [{"role": "system", "content": "Add."}, USER]


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ("", "the prompt is empty"),
        (" \n", "the prompt is empty"),
        ([], "the prompt is empty"),
        (None, "the prompt must be text or a list of messages, it is null"),
        (17, "the prompt must be text or a list of messages, it is int"),
        (USER, "the prompt must be text or a list of messages, it is an object"),
        ([{"role": "user"}], "message 0 of the prompt needs a role and a content, both text"),
        ([USER, "hello"], "message 1 of the prompt needs a role and a content, both text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 0 of the prompt needs a role"),
        ([{"role": "user", "content": " "}], "the last message of the prompt is empty"),
        ([USER, {"role": "assistant", "content": "2"}], "the prompt ends with an assistant message"),
    ],
)
def test_unusable_prompts_name_the_row(prompt, complaint, tmp_path):
    message = error_of(jsonl_source(tmp_path, [ROWS[0], {"prompt": prompt, "answer": 2}]))
    assert message.startswith(f"{tmp_path}/rows.jsonl:2: {complaint}")


def test_unusable_demonstrations_name_the_row(tmp_path):
    source = jsonl_source(
        tmp_path, [{"prompt": "a", "answer": 1, "steps": ""}], columns={"completion": "steps"}
    )
    assert error_of(source) == f"{tmp_path}/rows.jsonl:1: the completion is empty"


def test_template_takes_prompts_as_they_are(tmp_path):
    prompt = r"\boxed{x} {prompt} {0} {{y}} $1 \1 %s"
    source = jsonl_source(tmp_path, [{"prompt": prompt, "answer": 1}], template="{Q} <{prompt}> {}")
    assert prompts(load_examples(source)) == [f"{{Q}} <{prompt}> {{}}"]


def test_system_message_goes_before_text_and_messages(tmp_path):
    rows = [{"prompt": "1+1=", "answer": 2}, {"prompt": [USER], "answer": 2}]
    source = jsonl_source(tmp_path, rows, system="Add.", shuffle=False)
    assert prompts(load_examples(source)) == [[{"role": "system", "content": "Add."}, USER]] * 2


def test_second_system_message(tmp_path):
    chat = [{"role": "system", "content": "Subtract."}, USER]
    message = error_of(jsonl_source(tmp_path, [{"prompt": chat, "answer": 2}], system="Add."))
    assert "rows.jsonl:1: the prompt has a system message already" in message


def test_template_needs_text(tmp_path):
    rows = [{"prompt": [USER], "answer": 2}]
    assert "rows.jsonl:1: a template needs text" in error_of(
        jsonl_source(tmp_path, rows, template="{prompt}?")
    )


# --- order and ids ---------------------------------------------------------------------------------------


def test_golden_order(tmp_path):
    """Fails when a version of numpy or a change here would give running experiments other data."""
    order = [prompt.partition("+")[0] for prompt in prompts(load_examples(jsonl_source(tmp_path, seed=3)))]
    assert "".join(order) == "1965380427"


def test_shuffle_and_limit(tmp_path):
    in_file_order = load_examples(jsonl_source(tmp_path, shuffle=False))
    assert prompts(in_file_order) == [row["prompt"] for row in ROWS]
    shuffled = load_examples(jsonl_source(tmp_path, seed=1))
    assert load_examples(jsonl_source(tmp_path, seed=1, limit=4)) == shuffled[:4]
    assert shuffled != load_examples(jsonl_source(tmp_path, seed=2))
    assert {e.id: e for e in shuffled} == {e.id: e for e in in_file_order}


def test_ids_are_of_the_content(tmp_path):
    twins = [{"prompt": "a", "answer": 1, "n": 0}, {"prompt": "a", "answer": 1, "n": 1}]
    other_answer = {"prompt": "a", "answer": 2, "n": 2}
    ids = {
        seed: {
            example.columns["n"]: example.id
            for example in load_examples(jsonl_source(tmp_path, [*twins, other_answer], seed=seed))
        }
        for seed in range(5)
    }
    assert all(of_seed == ids[0] for of_seed in ids.values())
    assert ids[0][1] == f"{ids[0][0]}-1"
    assert ids[0][2] != ids[0][0]
    alone = load_examples(jsonl_source(tmp_path, [other_answer]))
    assert alone[0].id == ids[0][2] == "c0bc82d885a36af4"
