import pytest
from helpers import make_tokenizer

from posttrain.data.prompts import check_lengths, encode_demonstration, encode_prompt, render_prompt
from posttrain.errors import DataError
from posttrain.rollout.types import Example

TEXT = Example("sum-1", "1+1=", "2", {"completion": "<think>1+1=2</think>2"})
CHAT = Example(
    "sum-2",
    [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1="}],
    "2",
    {"completion": [{"role": "assistant", "content": "2"}]},
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def plain_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture
def bos_tokenizer():
    """Adds a beginning of sequence to plain text; its chat template writes one too (as Llama's do)."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    bos = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    tokenizer.chat_template = "<|im_start|>{{ messages[0].content }}"
    return tokenizer


@pytest.mark.parametrize("format", ["auto", "chat"])
def test_chat_prompts_end_where_the_answer_begins(tokenizer, format):
    rendered = render_prompt(CHAT, tokenizer, format)
    assert rendered == (
        "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = encode_prompt(CHAT, tokenizer, format)
    assert tokenizer.decode(ids) == rendered
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3  # tokens, not letters


def test_text_becomes_a_user_message(tokenizer):
    expected = "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
    assert render_prompt(TEXT, tokenizer) == tokenizer.decode(encode_prompt(TEXT, tokenizer)) == expected


def test_plain_text(tokenizer, plain_tokenizer):
    assert render_prompt(TEXT, tokenizer, "text") == "1+1="
    assert tokenizer.decode(encode_prompt(TEXT, tokenizer, "text")) == "1+1="
    assert encode_prompt(TEXT, plain_tokenizer, "auto") == encode_prompt(TEXT, tokenizer, "text")


def test_one_beginning_of_sequence(bos_tokenizer):
    bos = bos_tokenizer.convert_tokens_to_ids("<|im_start|>")
    for format in ("chat", "text"):
        ids = encode_prompt(TEXT, bos_tokenizer, format)
        assert ids[0] == bos
        assert ids.count(bos) == 1


def test_chat_without_a_template(plain_tokenizer):
    with pytest.raises(DataError, match=r"format is chat, but tokenizer .* has no chat template"):
        encode_prompt(TEXT, plain_tokenizer, "chat")


@pytest.mark.parametrize("encode", [encode_prompt, render_prompt, encode_demonstration])
def test_messages_need_a_template(encode, tokenizer, plain_tokenizer):
    for arguments in ((CHAT, plain_tokenizer), (CHAT, tokenizer, "text")):
        with pytest.raises(DataError, match="'sum-2' is made of chat messages"):
            encode(*arguments)


def test_template_that_refuses_the_messages(tokenizer):
    refusing = make_tokenizer()
    refusing.chat_template = "{{ raise_exception('no system messages, please') }}"
    with pytest.raises(DataError, match="refuses the prompt of example 'sum-2': no system messages, please"):
        encode_prompt(CHAT, refusing)


def test_demonstrations(tokenizer):
    assert encode_demonstration(TEXT, tokenizer) == {
        "prompt": [{"role": "user", "content": "1+1="}],
        "completion": [{"role": "assistant", "content": "<think>1+1=2</think>2"}],
    }
    assert encode_demonstration(CHAT, tokenizer) == {
        "prompt": CHAT.prompt,
        "completion": CHAT.columns["completion"],
    }
    assert encode_demonstration(TEXT, tokenizer, "text") == {
        "prompt": "1+1=",
        "completion": "<think>1+1=2</think>2",
    }


def test_missing_demonstration(tokenizer):
    with pytest.raises(DataError, match=r"'x' has no demonstration; set columns\.completion"):
        encode_demonstration(Example("x", "1+1=", "2"), tokenizer)


LENGTHS = [
    (Example("short", "a"), (1,) * 4),
    (Example("long", "b"), (1,) * 7),
    (Example("just", "c"), (1,) * 5),
]


def test_long_prompts_are_an_error():
    with pytest.raises(
        DataError, match="1 of 3 prompts are too long; that of example 'long' has 7 tokens, 5 fit"
    ):
        check_lengths(LENGTHS, 5, "error")


def test_long_prompts_are_dropped_whole():
    assert check_lengths(LENGTHS, 5, "drop") == ([LENGTHS[0], LENGTHS[2]], 1)


@pytest.mark.parametrize("on_long_prompt", ["error", "drop"])
def test_prompts_that_fit_are_kept(on_long_prompt):
    assert check_lengths(LENGTHS, 7, on_long_prompt) == (LENGTHS, 0)


def test_no_prompt_left():
    with pytest.raises(DataError, match="3 of 3 prompts are too long"):
        check_lengths(LENGTHS, 3, "drop")
