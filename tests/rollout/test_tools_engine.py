"""Conversations with tools, on a scripted engine and on a real one."""

import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import make_tiny_model, make_tokenizer

from posttrain.errors import RecipeError
from posttrain.recipe.schema import ModelConfig
from posttrain.recipe.tools_schema import ToolsConfig
from posttrain.rollout.build import load_model, load_tokenizer
from posttrain.rollout.tools import environment_factory, schemas_of
from posttrain.rollout.tools_engine import ToolEngine, prompts_of, with_tools
from posttrain.rollout.tools_format import ToolFormat
from posttrain.rollout.tools_pool import ToolPool
from posttrain.rollout.transformers import TransformersEngine
from posttrain.rollout.types import Completion, Example, RolloutRequest, Sampling, make_rollouts

USER = str(Path(__file__).with_name("user_tools.py"))
TOKENIZER = make_tokenizer()
EOS = TOKENIZER.eos_token_id

# As Qwen's templates have it, with results in the user's role.
KNOWS_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool.function.name }} {% endfor %}"
    "<|im_end|>\n{% endif %}{% for message in messages %}"
    "{% if message.role == 'tool' %}<|im_start|>user\n<r>{{ message.content }}</r><|im_end|>\n"
    "{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Script:
    """An engine that says what is written for it: a list of turns by (example, index)."""

    version = 0
    max_model_len = 400

    def __init__(self, turns):
        self.turns = turns
        self.calls = []
        self.prompts = {}

    def generate(self, requests):
        self.calls.append([(r.example.id, r.sampling.n) for r in requests])
        return [[self.say(r, index) for index in range(r.sampling.n)] for r in requests]

    def say(self, request, index):
        key = (request.example.id, index)
        if len(request.prompt_ids) > 2:  # a later turn: by how its conversation began
            key = next(
                key
                for key, turns in self.turns.items()
                if key[0] == request.example.id
                and TOKENIZER.decode(request.prompt_ids[2:]).startswith(turns[0].removesuffix("$"))
            )
        turns = self.turns[key]
        said = self.prompts.setdefault(key, [])
        text = turns[len(said)]
        said.append(request)
        ended = text.endswith("$")
        ids = TOKENIZER(text.removesuffix("$"))["input_ids"] + [EOS] * ended
        reason = "stop" if ended or any(stop in text for stop in request.sampling.stop) else "length"
        return Completion(tuple(ids), (-0.5,) * len(ids), reason, text.removesuffix("$"))

    def close(self):
        self.closed = True


def request(name, n=1, max_tokens=200, seed=3):
    return RolloutRequest((5, 6), Example(name, f"{name}?", "42"), name, Sampling(max_tokens, n=n, seed=seed))


def call(name, **arguments):
    inside = ", ".join(f'"{key}": {value}' for key, value in arguments.items())
    return f'<tool_call>{{"name": "{name}", "arguments": {{{inside}}}}}</tool_call>'


def config(*names, **options):
    return ToolsConfig(use=[f"{USER}:{name}" for name in names], result=("<r>", "</r>"), **options)


TOOLS = config("double", "wait", "end", timeout=2, max_turns=2, output_cap=16)


@pytest.fixture(scope="module")
def pool():
    pool = ToolPool(TOOLS)
    yield pool
    pool.close()


def engine_on(script, pool, options=TOOLS, tokenizer=TOKENIZER):
    return ToolEngine(script, pool, prompts_of(options, tokenizer, "text"), options)


def converse(pool, *turns, options=TOOLS, **sampling):
    script = Script({("a", 0): turns})
    ((completion,),) = engine_on(script, pool, options).generate([request("a", **sampling)])
    return completion, script


def test_a_call_is_answered_and_masked(pool):
    first = f"I see {call('double', number=4)}"
    completion, script = converse(pool, first, "so 8$")
    result = TOKENIZER("<r>8</r>")["input_ids"]
    written = [*TOKENIZER(first)["input_ids"]], [*TOKENIZER("so 8")["input_ids"], EOS]
    assert list(completion.token_ids) == [*written[0], *result, *written[1]]
    assert list(completion.loss_mask) == [1] * len(written[0]) + [0] * len(result) + [1] * len(written[1])
    assert [p for p, m in zip(completion.logprobs, completion.loss_mask, strict=True) if not m] == [
        0.0
    ] * len(result)
    assert completion.text == f"{first}<r>8</r>so 8"
    assert completion.written == f"{first}so 8"
    assert completion.finish_reason == "stop"
    assert completion.sampled_tokens == sum(map(len, written))
    (made,) = completion.tool_calls
    assert (made.name, made.arguments, made.output, made.error) == (
        "double",
        '{"name": "double", "arguments": {"number": 4}}',
        "8",
        None,
    )
    assert [(turn.start, turn.stop) for turn in completion.turns] == [
        (0, len(written[0])),
        (len(written[0]) + len(result), len(completion.token_ids)),
    ]
    second = script.prompts["a", 0][1]
    assert second.prompt_ids == (5, 6, *written[0], *result)  # the very ids, nothing tokenised again
    assert second.sampling.max_tokens == 200 - len(written[0]) - len(result)


def test_without_a_call_a_completion_is_as_it_was(pool):
    completion, script = converse(pool, "42$")
    assert completion.loss_mask is None
    assert completion.tool_calls == ()
    assert script.prompts["a", 0][0].sampling.seed == 3
    assert completion.token_ids == (*TOKENIZER("42")["input_ids"], EOS)


@pytest.mark.parametrize(
    ("turn", "error", "shown"),
    [
        ("<tool_call>double 4</tool_call>", "malformed", "Error: the call is"),
        ("double 4</tool_call>", "malformed", "Error: there is no "),
        ('<tool_call>["double"]</tool_call>', "malformed", "Error: a call is "),
        (call("triple", number=4), "unknown", "Error: there is no tool"),
        (call("double", number="[]"), "arguments", "Error: argument number"),
        (call("end", how='"raise"'), "exception", "Error: KeyError: 'raise'"),
        (call("end", how='"exit"'), "died", "Error: the tool ended its process (3)"),
        (call("wait", seconds=30), "timeout", "Error: stopped after 2 s"),
    ],
)
def test_what_goes_wrong_is_shown_and_counted(pool, turn, error, shown):
    completion, _ = converse(pool, turn, "ok$")
    (made,) = completion.tool_calls
    assert made.error == error
    assert made.output.startswith(shown)
    assert completion.finish_reason == "stop"


def test_long_output_loses_its_middle(pool):
    completion, _ = converse(pool, call("double", number=10**30), "ok$")
    assert completion.tool_calls[0].output == str(2 * 10**30)
    shown = completion.text.partition("<r>")[2].partition("</r>")[0]
    assert shown.startswith("20000")
    assert "…" not in shown or shown.endswith("0000")
    assert completion.loss_mask.count(0) <= 16 + len(TOKENIZER("<r></r>")["input_ids"])


def test_turns_have_a_limit(pool):
    turn = call("double", number=4)
    completion, _ = converse(pool, turn, turn, turn)
    assert len(completion.tool_calls) == 2  # the third is not sent
    assert completion.finish_reason == "length"
    assert completion.loss_mask[-1] == 1


def test_a_result_that_leaves_no_room_is_not_appended(pool):
    turn = call("double", number=4)
    length = len(TOKENIZER(turn)["input_ids"])
    result = len(TOKENIZER("<r>8</r>")["input_ids"])
    completion, _ = converse(pool, turn, max_tokens=length + result)
    assert (completion.finish_reason, len(completion.token_ids)) == ("length", length)
    assert len(completion.tool_calls) == 1
    completion, script = converse(pool, turn, "8", max_tokens=length + result + 1)
    assert script.prompts["a", 0][1].sampling.max_tokens == 1


def test_control_tokens_in_a_result_are_text():
    tool_format = ToolFormat(TOOLS, [], TOKENIZER, "text")
    ids = tool_format.result_ids("<|im_end|>")
    assert EOS not in ids
    assert TOKENIZER.decode(ids) == "<r><|im_end|></r>"


def test_first_turns_share_a_call_and_a_slow_tool_holds_nobody_up(tmp_path):
    released = tmp_path / "released"

    class Releasing(Script):
        """Index 1 has had both of its calls answered when it lets the slow one come back."""

        def say(self, request, index):
            completion = super().say(request, index)
            if completion.text == "b":
                released.touch()
            return completion

    slow, fast = call("wait_for", file=f'"{released}"'), call("double", number=1)
    script = Releasing({("a", 0): [slow, "a$"], ("a", 1): [fast, fast, "b$"], ("b", 0): ["c$"]})
    options = config("double", "wait_for", timeout=60, max_turns=2)
    pool = ToolPool(options)
    try:
        answers = engine_on(script, pool, options).generate([request("a", n=2), request("b")])
    finally:
        pool.close()
    assert script.calls[0] == [("a", 2), ("b", 1)]
    assert [len(completion.tool_calls) for row in answers for completion in row] == [1, 2, 0]
    assert [turn.text for turn in answers[0][0].turns] == [slow, "a"]
    assert len(script.calls) == 4


def test_seeds_of_turns_differ_by_index_and_turn(pool):
    one, other = call("double", number=4), call("double", number=5)
    script = Script({("a", 0): [one, one, "8$"], ("a", 1): [other, one, "8$"]})
    engine_on(script, pool).generate([request("a", n=2)])
    asked = [turn.sampling.seed for turns in script.prompts.values() for turn in turns]
    assert len(asked) == 6
    assert len(set(asked)) == 5  # the first turns are one request


def test_an_error_leaves_no_call_behind(pool):
    script = Script({("a", 0): [call("wait", seconds=0.4)], ("b", 0): []})
    script.turns["b", 0] = [call("double", number=1)]
    with pytest.raises(IndexError):
        engine_on(script, pool).generate([request("a"), request("b")])
    assert not pool.busy
    completion, _ = converse(pool, call("double", number=5), "10$")
    assert completion.tool_calls[0].output == "10"


# --- protocols --------------------------------------------------------------------------------------------


def chat_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = KNOWS_TOOLS
    return tokenizer


def test_chat_protocol_follows_the_template(pool):
    tokenizer = chat_tokenizer()
    options = TOOLS.model_copy(update={"protocol": "chat"})
    prompts = prompts_of(options, tokenizer, "auto")
    example = Example("a", "4?", None)
    assert prompts.render(example).startswith("<|im_start|>system\ndouble wait end <|im_end|>")
    assert TOKENIZER.decode(prompts.encode(example)) == prompts.render(example)
    script = Script({("a", 0): [call("double", number=4), "8$"]})
    ((completion,),) = ToolEngine(script, pool, prompts, options).generate([request("a")])
    whole = tokenizer.decode(completion.token_ids)
    conversation = [
        {"role": "user", "content": "4?"},
        {"role": "assistant", "content": call("double", number=4)},
        {"role": "tool", "content": "8"},
        {"role": "assistant", "content": "8"},
    ]
    schemas = schemas_of(environment_factory(options)().tools)
    expected = tokenizer.apply_chat_template(conversation, tools=schemas, tokenize=False)
    assert f"{prompts.render(example)}{whole}\n" == expected


def test_chat_protocol_needs_a_template_that_knows_tools():
    with pytest.raises(RecipeError, match="does not know tools"):
        prompts_of(TOOLS.model_copy(update={"protocol": "chat"}), TOKENIZER, "auto")


def test_text_protocol_describes_the_tools():
    text = prompts_of(TOOLS, TOKENIZER, "text").render(Example("a", "4?", None))
    assert "- double(number: integer): Double a number." in text
    assert "number: Any whole number." in text
    assert text.endswith("\n\n4?")
    silent = TOOLS.model_copy(update={"describe": False})
    assert prompts_of(silent, TOKENIZER, "text").render(Example("a", "4?", None)) == "4?"
    chat = prompts_of(TOOLS, TOKENIZER, "auto").render(
        Example("a", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "4?"}], None)
    )
    assert chat.startswith("<|im_start|>system\nBe brief.\n\nYou may use")


def test_bare_calls():
    options = ToolsConfig(use=["calculator"], calls="bare", result=("[", "]"))
    pool = ToolPool(options)
    try:
        completion, _ = converse(pool, "<tool_call>12*3</tool_call>", "36$", options=options)
    finally:
        pool.close()
    assert completion.text == "<tool_call>12*3</tool_call>[36]36"
    with pytest.raises(RecipeError, match="a single tool with a single argument"):
        prompts_of(config("double", calls="bare"), TOKENIZER, "text")


def test_traces_are_written_as_the_engine_would_write_them(pool):
    first = call("double", number=4)
    completion, _ = converse(pool, first, "so 8$")
    trace = [
        {"role": "assistant", "content": first},
        {"role": "tool", "content": "8"},
        {"role": "assistant", "content": "so 8"},
    ]
    tool_format = prompts_of(TOOLS, TOKENIZER, "text")
    example = Example("a", "4?", "8", {"completion": trace})
    row = tool_format.encode_trace(example)
    prompt = list(tool_format.encode(example))
    assert row["input_ids"] == [*prompt, *completion.token_ids]
    assert row["completion_mask"] == [0] * len(prompt) + list(completion.loss_mask)


# --- environments -----------------------------------------------------------------------------------------


def test_an_environment_of_ones_own():
    options = ToolsConfig(environment=f"{USER}:Guessing", result=("<r>", "</r>"), workers=2, max_turns=5)
    prompts = prompts_of(options, TOKENIZER, "text")
    script = Script({
        ("a", 0): [call("peek", digits=1), "7$", "99$", "42$"],
        ("b", 0): ["1$", "2$", "3$"],
        ("c", 0): ["what$", "42$"],
    })  # fmt: skip
    engine = with_tools(script, options, prompts)
    try:
        (first,), (second,), (third,) = engine.generate([request(name) for name in "abc"])
    finally:
        engine.close()
    assert script.closed
    assert first.tool_calls[0].output == "2 (1)"  # replayed or not, there was one look
    assert [turn.text for turn in first.turns] == [call("peek", digits=1), "7", "99", "42"]
    assert "higher" in first.text
    assert "lower" in first.text
    assert len(second.turns) == 3  # the environment ends it
    assert third.tool_calls[0].error == "exception"
    assert third.tool_calls[0].name == "step"
    assert third.turns[-1].text == "42"
    assert all(completion.finish_reason == "stop" for completion in (first, second, third))


# --- a real engine ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_tiny_model(tmp_path_factory.mktemp("tools") / "model")
    loaded = ModelConfig(path=str(folder))
    return load_model(loaded), load_tokenizer(loaded)


def real_requests(tokenizer):
    return [
        RolloutRequest(
            tuple(tokenizer(text)["input_ids"]), Example(text, text), text, Sampling(40, n=16, seed=seed)
        )
        for seed, text in enumerate(("1+2=", "9*9"))
    ]


def real_options(name, close):
    return ToolsConfig(
        use=[f"{USER}:{name}"],
        calls="bare",
        open="e",
        close=close,
        result=("[", "]"),
        protocol="text",
        max_turns=3,
    )


def test_the_real_engine_gives_the_policys_log_probs_and_does_not_depend_on_timing(model):
    policy, tokenizer = model
    plain = TransformersEngine(policy, tokenizer).generate(real_requests(tokenizer))
    # A character that the model, whose weights are random, writes often ends a call.
    counts = Counter("".join(completion.text for row in plain for completion in row))
    options = real_options("wait_by_length", counts.most_common(1)[0][0])
    engine = with_tools(
        TransformersEngine(policy, tokenizer), options, prompts_of(options, tokenizer, "text")
    )
    try:
        answers = engine.generate(real_requests(tokenizer))
        with _disturbed():
            again = engine.generate(real_requests(tokenizer))
    finally:
        engine.close()
    calls = 0
    for row, repeated, untouched in zip(answers, again, plain, strict=True):
        for completion, other, without in zip(row, repeated, untouched, strict=True):
            assert other.token_ids == completion.token_ids
            calls += len(completion.tool_calls)
            first = completion.turns[0].stop
            assert completion.token_ids[:first] == without.token_ids[:first]
    assert calls > 5
    batch = make_rollouts(real_requests(tokenizer), answers, 0)
    for rollout in batch:
        prompt, completion = rollout.request.prompt_ids, rollout.completion
        ids = torch.tensor([prompt + completion.token_ids])
        with torch.no_grad():
            scores = policy(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = scores.gather(-1, torch.tensor(completion.token_ids)[:, None]).squeeze(-1)
        mask = torch.tensor(completion.loss_mask or [1] * len(completion.token_ids), dtype=torch.bool)
        torch.testing.assert_close(torch.tensor(completion.logprobs)[mask], expected[mask], atol=1e-4, rtol=0)
        assert (torch.tensor(completion.logprobs)[~mask] == 0).all()


class _disturbed:
    """Load on the interpreter, so that calls come back in another order."""

    def __enter__(self):
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        while not self.stop.is_set():
            time.sleep(0.003)
            sum(range(50_000))

    def __exit__(self, *error):
        self.stop.set()
        self.thread.join()
