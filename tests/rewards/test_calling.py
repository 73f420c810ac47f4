import hashlib
import math

import numpy as np
import pytest
import torch
from rewards.scoring import FAULTY, completion

from posttrain.errors import RecipeError, RewardError
from posttrain.rewards.calling import describe, load_reward, to_outcome, trl_arguments
from posttrain.rewards.registry import RewardSource
from posttrain.rollout.types import Example


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (True, 1.0),
        (0, 0.0),
        (-2.5, -2.5),
        (np.float16(0.5), 0.5),
        (np.int8(3), 3.0),
        (np.bool_(False), 0.0),
        (np.array(2), 2.0),
        (torch.tensor(0.25, dtype=torch.bfloat16), 0.25),
        (torch.tensor(1.5, requires_grad=True), 1.5),
    ],
)
def test_numbers_are_scores(value, score):
    outcome = to_outcome(value, None)
    assert outcome == (score, None, "")
    assert type(outcome.value) is float


def test_none_does_not_apply():
    assert to_outcome(None, (0.0, 1.0)) == (None, None, "")


@pytest.mark.parametrize(
    "value",
    [
        math.nan, math.inf, -math.inf, 10**400, "1", b"1", [1.0], (), {}, 1j, object(),
        np.array([1.0]), np.str_("1"), np.float32("nan"), np.complex64(1),
        torch.tensor([1.0]), torch.tensor(math.nan),
    ],
)  # fmt: skip
def test_anything_else_is_an_error(value):
    outcome = to_outcome(value, None)
    assert outcome.value is None
    assert outcome.error == "value"


def test_range_is_closed():
    assert to_outcome(1, (0.0, 1.0)).value == 1.0
    outcome = to_outcome(1.0000001, (0.0, 1.0))
    assert outcome.error == "value"
    assert "outside of its range [0.0, 1.0]" in outcome.message


def test_describe_survives_every_exception():
    class Unprintable(Exception):
        def __str__(self):
            raise RuntimeError

    assert "Unprintable" in describe(Unprintable())
    assert len(describe(ValueError("x" * 10_000))) < 400
    assert "\n" not in describe(ValueError("two\nlines"))


# --- TRL's convention


EXAMPLES = [
    Example("a", "p1", "42", {"solution": "s1", "completion": "gold", "level": 1}),
    Example("b", [{"role": "user", "content": "p2"}], None, {"solution": "s2"}),
]
COMPLETIONS = [completion("one"), completion("two")]


def test_trl_arguments():
    def with_everything(prompts, completions, **kwargs): ...

    arguments = trl_arguments(with_everything, COMPLETIONS, EXAMPLES, 7, {"scale": 2})
    assert arguments["prompts"] == ["p1", [{"role": "user", "content": "p2"}]]
    assert arguments["completions"] == ["one", [{"role": "assistant", "content": "two"}]]
    assert arguments["completion_ids"] == [[0, 1, 2], [0, 1, 2]]
    assert arguments["answer"] == ["42", None]
    assert arguments["solution"] == ["s1", "s2"]
    assert arguments["level"] == [1, None]
    assert arguments["trainer_state"].global_step == 7
    assert arguments["scale"] == 2
    assert "completion" not in arguments
    arguments["log_metric"]("name", value=1.0)


def test_trl_functions_get_only_what_they_take():
    def some(completions, solution, log_extra=None): ...

    arguments = trl_arguments(some, COMPLETIONS, EXAMPLES, None, {})
    assert set(arguments) == {"completions", "solution", "log_extra"}


def test_a_missing_column_is_named():
    def some(completions, target): ...

    with pytest.raises(TypeError, match=r"wants target; the data has the columns answer, solution"):
        trl_arguments(some, COMPLETIONS, EXAMPLES, None, {})


# --- loading


def load(text, tmp_path, attribute="f", **args):
    path = tmp_path / "my_rewards.py"
    path.write_text("from posttrain import reward\n" + text)
    return load_reward(RewardSource("mine", file=str(path), attribute=attribute, args=args))


SAMPLE = (completion("abcd"), Example("a", "p", "42"))


@pytest.mark.parametrize(
    ("code", "style", "value"),
    [
        ("def f(completion, example, scale=2): return scale * len(completion.text)", "completion", 12.0),
        (
            "def f(completions, examples, scale=2): return [scale * len(c.text) for c in completions]",
            "batch",
            12.0,
        ),
        (
            "def f(prompts, completions, scale=2, **kwargs): return [scale * len(c) for c in completions]",
            "trl",
            12.0,
        ),
        ("@reward('r')\ndef f(c, e, scale=2): return scale * len(c.text)", "completion", 12.0),
        (
            "@reward('r', batched=True)\ndef f(cs, es, scale=2): return [scale * len(c.text) for c in cs]",
            "batch",
            12.0,
        ),
        (
            "@reward('r')\ndef f(completions, scale, **kwargs): return [scale * len(c) for c in completions]",
            "trl",
            12.0,
        ),
        (
            "def f(completion_ids, scale, **kwargs): return [scale * len(i) for i in completion_ids]",
            "trl",
            12.0,
        ),
        (
            "class f:\n def __init__(self, scale): self.scale = scale\n"
            " def __call__(self, completion, example): return self.scale * len(completion.text)",
            "completion",
            12.0,
        ),
        (
            "def f(scale):\n def inner(completions, **kwargs): return [scale * len(c) for c in completions]\n"
            " return inner",
            "trl",
            12.0,
        ),
    ],
)
def test_styles_and_arguments(tmp_path, code, style, value):
    function = load(code, tmp_path, scale=3)
    assert function.style == style
    assert function.info.name == "mine"
    assert function.info.batched == (style != "completion")
    assert [outcome.value for outcome in function([SAMPLE], None).outcomes] == [value]


@pytest.mark.parametrize(
    "code",
    [
        "async def f(completion, example): return 1.0",
        "class f:\n async def __call__(self, completion, example): return 1.0",
        "async def f(completions, **kwargs): return [1.0]",
    ],
)
def test_async_functions_are_recognised(tmp_path, code):
    assert load(code, tmp_path).concurrent


def test_a_declaration_goes_with_the_function():
    function = load_reward(RewardSource("any", file=FAULTY, attribute="act_declared"))
    assert (function.info.version, function.info.range, function.info.timeout) == ("7", (0.0, 1.0), 1.5)
    assert function.info.doc == "Does what it is told."
    assert not function.info.deterministic
    assert (
        load_reward(RewardSource("any", file=FAULTY, attribute="declared", timeout=9.0)).info.timeout == 9.0
    )


def test_files_import_their_neighbours(tmp_path):
    (tmp_path / "neighbour_of_rewards.py").write_text("VALUE = 0.25")
    code = "from neighbour_of_rewards import VALUE\ndef f(completion, example): return VALUE"
    assert load(code, tmp_path)([SAMPLE], None).outcomes[0].value == 0.25


@pytest.mark.parametrize(
    ("code", "args", "error", "message"),
    [
        ("def f(completion, example): ...", {"scale": 1}, RecipeError, "unexpected keyword argument 'scale'"),
        ("def f(completions, examples, x): ...", {}, RecipeError, "missing a required argument: 'x'"),
        ("class f:\n def __init__(self, x): ...", {}, RecipeError, "missing a required argument: 'x'"),
        ("def f(c, e): ...", {}, RecipeError, "does not take its args"),
        ("def f(): return 3", {}, RecipeError, "takes neither"),
        ("f = 3", {}, RecipeError, "is a int, not a function or class"),
        ("import nowhere_to_be_found", {}, RewardError, "cannot be loaded: ModuleNotFoundError"),
        ("def g(completion, example): ...", {}, RecipeError, "neither registers nor defines 'f'"),
        ("raise SystemExit(3)", {}, RewardError, "cannot be loaded: SystemExit"),
        ("class f:\n def __init__(self): 1 / 0", {}, RewardError, "ZeroDivisionError"),
        ("@reward('exact_match')\ndef f(completion, example): ...", {}, RewardError, "already registered by"),
    ],
)
def test_code_that_cannot_be_used(tmp_path, code, args, error, message):
    with pytest.raises(error, match=message):
        load(code, tmp_path, **args)


# --- where the code is


def test_a_loaded_reward_says_which_code_it_is(tmp_path):
    (tmp_path / "elsewhere_defined.py").write_text("def g(completion, example): return 2.0")
    code = (
        "import functools\nfrom elsewhere_defined import g\n"
        "def f(completion, example): return 1.0\n"
        "class C:\n def __call__(self, completion, example): return 3.0\n"
        "c = C()\nbound = functools.partial(f)\nkept = functools.cache(f)\n"
    )
    info = load(code, tmp_path).info
    path = tmp_path / "my_rewards.py"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (info.sha256, info.place) == (digest, f"{path}:4")
    assert info.fingerprint == f"0 sha256:{digest[:16]}"
    places = {
        "g": (hashlib.sha256((tmp_path / "elsewhere_defined.py").read_bytes()).hexdigest(), 1),
        "C": (digest, 5),
        "c": (digest, 5),
        "bound": (digest, 4),
        "kept": (digest, 4),
    }
    for name, (sha256, line) in places.items():
        info = load(code, tmp_path, name).info
        assert (info.sha256, int(info.place.rpartition(":")[2])) == (sha256, line)


@pytest.mark.parametrize(
    ("code", "sees"),
    [
        ("def f(completions, trainer_state): ...", True),
        ("def f(completions, **kwargs): ...", True),
        ("def f(completions, answer): ...", False),
        ("def f(completion, example): ...", False),
    ],
)
def test_who_can_tell_the_step(tmp_path, code, sees):
    assert load(code, tmp_path).sees_step is sees
