import json
import subprocess
import sys

import pytest
from rewards.scoring import FAULTY, make_rollouts, make_scorer
from rewards.tiny_reward_model import make_reward_model

from posttrain.errors import RecipeError, RewardError
from posttrain.recipe.schema import RewardSpec
from posttrain.rewards.registry import RewardInfo, known_rewards, locate, provenance, reward
from posttrain.training.record import note_rewards


def spec(name, **options):
    return RewardSpec.model_validate({"name": name, **options})


def test_known_rewards():
    # Tests before this one may have registered others in this process.
    known = {name: info for name, info in known_rewards().items() if info.origin.startswith("posttrain.")}
    assert list(known) == [
        "code",
        "exact_match",
        "format",
        "http",
        "length_penalty",
        "llm_judge",
        "math_answer",
        "numeric_match",
        "reasoning_gym",
        "soar_graded",
    ]
    assert known["length_penalty"].range == (-1.0, 0.0)
    for info in known.values():
        assert info.doc
        assert info.range or info.name == "http"  # that of a server is an argument
        assert info.version != "0"


def test_listing_and_locating_import_nothing_heavy():
    code = f"""
import sys
from posttrain.recipe.schema import RewardSpec
from posttrain.rewards.registry import known_rewards, locate
known_rewards()
for name in ("math_answer", "reasoning_gym", "exact_match", "trl.rewards:x", {FAULTY + ":act"!r}):
    locate(RewardSpec(name=name))
locate(RewardSpec(name="format", args={{"tags": ["think"]}}))
locate(RewardSpec(name="http", args={{"url": "http://node1:8000"}}))
heavy = {{"torch", "transformers", "trl", "math_verify", "reasoning_gym", "sympy", "numpy", "dill"}}
heavy.add("aiohttp")
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_declaration_is_kept():
    @reward("mine", version="3", range=(-1, 1), deterministic=False, timeout=2.0, batched=True,
            concurrency=4, cost=0.01)  # fmt: skip
    def function(completions, examples):
        """First line.

        Second.
        """

    info = known_rewards()["mine"]
    origin = f"{__name__}:test_a_declaration_is_kept.<locals>.function"
    assert info == RewardInfo("mine", "3", origin, "First line.", False, (-1, 1), 2.0, True, 4, 0.01)


def test_a_name_belongs_to_one_code():
    def define():
        @reward("mine")
        def function(completion, example): ...

    define()
    define()  # the same code again, as in a notebook
    with pytest.raises(RewardError, match=r"'mine' .* already registered by .*define"):

        @reward("mine")
        def other(completion, example): ...


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"range": (1, 0)}, r"'mine': its range is \(lowest, highest\), not \(1, 0\)"),
        ({"timeout": 0.0}, "'mine': timeout and concurrency must be positive"),
        ({"concurrency": 0}, "'mine': timeout and concurrency must be positive"),
    ],
)
def test_declarations_that_make_no_sense(options, message):
    with pytest.raises(RewardError, match=message):
        reward("mine", **options)


def test_where_rewards_come_from():
    assert provenance(known_rewards()["math_answer"]) == "built in"
    assert provenance(RewardInfo("mine", origin="a.b:f")) == "a.b:f"
    assert provenance(RewardInfo("mine", origin="a.b:f", place="a/b.py:3")) == "a/b.py:3"


def test_a_run_lists_its_rewards_and_keeps_what_it_listed(tmp_path):
    first = RewardInfo("mine", "1", sha256="ab", range=(0.0, 1.0))
    edited = RewardInfo("mine", "1", sha256="cd", range=(0.0, 1.0))
    for attempt in ([first], [first], [edited], [first]):
        note_rewards(tmp_path / "rewards.json", attempt)
    listed = json.loads((tmp_path / "rewards.json").read_text())
    assert [(entry["name"], entry["version"], entry["sha256"]) for entry in listed] == [
        ("mine", "1", "ab"),
        ("mine", "1", "cd"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "math_answr"}, r"'math_answr' \(did you mean 'math_answer'\?\); registered: code, "),
        ({"name": "zzz"}, r"no reward named 'zzz'; registered: "),
        ({"name": "nowhere:f"}, "there is no module 'nowhere'"),
        ({"name": ":f"}, "there is no module ''"),
        ({"name": "f", "from": "nowhere.sub"}, "there is no module 'nowhere.sub'"),
        ({"name": "nowhere.py:f"}, "there is no file 'nowhere.py'"),
        ({"name": "f", "from": "nowhere.py"}, "there is no file 'nowhere.py'"),
        ({"name": f"{FAULTY}:acct"}, r"neither registers nor defines 'acct' \(did you mean 'act'\?\)"),
        ({"name": "format"}, "needs either tags"),
        ({"name": "format", "args": {"tag": ["think"]}}, "unexpected keyword argument 'tag'"),
        ({"name": "format", "args": {"pattern": "("}}, "not a regular expression"),
        ({"name": "length_penalty", "args": {"max_tokens": 5}}, "missing a required argument: 'buffer'"),
        ({"name": "exact_match", "args": {"case": True}}, "unexpected keyword argument 'case'"),
        ({"name": "math_answer", "args": {"x": 1}}, "does not take its args"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_runs(options, message):
    with pytest.raises(RecipeError, match=message):
        locate(RewardSpec.model_validate(options))


def test_a_file_with_a_syntax_error(tmp_path):
    (tmp_path / "bad.py").write_text("def f(:")
    with pytest.raises(RecipeError, match=r"bad\.py is not valid Python"):
        locate(spec(f"{tmp_path}/bad.py:f"))


@pytest.mark.parametrize(
    "code",
    [
        "def f(completion, example): ...",
        "try:\n    from fast import f\nexcept ImportError:\n    f = None",
        "from elsewhere import *",
        "from posttrain import reward as declare\n@declare(name='f')\nclass Reward: ...",
        "if True:\n    import f",
    ],
)
def test_a_file_is_not_refused_for_how_it_defines_a_name(tmp_path, code):
    (tmp_path / "rewards.py").write_text(code)
    assert locate(spec("f", **{"from": f"{tmp_path}/rewards.py"})).attribute == "f"


# --- every way to name a reward, through the worker processes


def score(*specs):
    rollouts = make_rollouts(["a", "bb"])
    with make_scorer(*specs, workers=1) as scorer:
        report = scorer.score(rollouts)
    assert not report.error_lines
    return [list(rollout.rewards.values()) for rollout in rollouts]


LENGTH = """
from posttrain import reward

@reward("length", version="5")
def length_of(completion, example):
    return len(completion.text)

def twice(completion, example, times=2):
    return times * len(completion.text)
"""


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_own_rewards.py").write_text(LENGTH)


@pytest.mark.usefixtures("in_folder")
@pytest.mark.parametrize(
    "options",
    [
        {"name": "my_own_rewards.py:length_of"},
        {"name": "my_own_rewards.py:length"},
        {"name": "my_own_rewards:length_of"},
        {"name": "length", "from": "my_own_rewards.py"},
        {"name": "length_of", "from": "my_own_rewards"},
        {"name": "my_own_rewards:twice", "args": {"times": 1}},
    ],
)
def test_from_files_and_modules(options):
    assert score(options) == [[1.0], [2.0]]


@pytest.mark.usefixtures("in_folder")
def test_several_rewards_of_one_file():
    named = [{"name": "length", "from": "my_own_rewards.py"}, "my_own_rewards.py:twice", "exact_match"]
    assert score(*named) == [[1.0, 2.0, 0.0], [2.0, 4.0, 0.0]]


def test_from_an_entry_point(tmp_path, monkeypatch):
    (tmp_path / "some_package.py").write_text(LENGTH)
    metadata = tmp_path / "some_package-1.5.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 1.5\n")
    (metadata / "entry_points.txt").write_text(
        "[posttrain.rewards]\ntwofold = some_package:twice\nlength = some_package\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert known_rewards()["twofold"] == RewardInfo("twofold", "1.5", "some_package:twice")
    assert provenance(known_rewards()["twofold"]) == "entry point some_package:twice"
    assert score("twofold", "length") == [[2.0, 1.0], [4.0, 2.0]]


def test_a_reward_model_from_an_entry_point(tmp_path, monkeypatch):
    model = make_reward_model(tmp_path / "model")
    (tmp_path / "models_package.py").write_text(
        "from posttrain import register_reward_model\n"
        f"register_reward_model('flavour', path={str(model)!r}, device='cpu', batch_tokens=64)\n"
    )
    metadata = tmp_path / "models_package-2.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: models-package\nVersion: 2.0\n")
    (metadata / "entry_points.txt").write_text("[posttrain.rewards]\nflavour = models_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with make_scorer("flavour", workers=1) as scorer:  # no sample, so no server
        info = scorer.infos["flavour"]
    assert (info.kind, info.model["path"], info.model["batch_tokens"]) == ("reward model", str(model), 64)
    assert info.version.startswith("local")
    assert len(info.sha256) == 64


def test_registered_in_an_importable_module(tmp_path, monkeypatch):
    (tmp_path / "imported_rewards.py").write_text(LENGTH)
    monkeypatch.syspath_prepend(tmp_path)
    __import__("imported_rewards")
    assert locate(spec("length")).module == "imported_rewards"
    assert score("length") == [[1.0], [2.0]]


def test_registered_closures_and_lambdas_are_sent_to_the_workers():
    offset = 10

    @reward("closure", version="2")
    def closure(completion, example, *, scale=1):
        return offset + scale * len(completion.text)

    reward("nameless")(lambda completion, example: -len(completion.text))
    assert score({"name": "closure", "args": {"scale": 3}}, "nameless") == [[13.0, -1.0], [16.0, -2.0]]


def test_what_cannot_be_sent_is_refused():
    numbers = (number for number in range(3))

    @reward("generator")
    def function(completion, example):
        return next(numbers)

    with pytest.raises(RewardError, match="'generator' cannot be sent to a worker process"):
        locate(spec("generator"))


def test_rewards_of_a_script_without_a_main_guard(tmp_path):
    (tmp_path / "script.py").write_text(
        """
print("started")
import math
from dataclasses import dataclass
from posttrain import Completion, Example, Rollout, RolloutRequest, Sampling, reward
from posttrain.recipe.schema import RewardOptions, RewardSpec
from posttrain.rewards.scorer import Scorer

SCALE = 2

def helper(text):
    return SCALE * math.sqrt(len(text))

@reward("mine")
def mine(completion, example):
    return helper(completion.text)

@reward("mine_too")
class Mine:
    def __init__(self, offset):
        self.offset = offset

    def __call__(self, completion, example):
        return self.offset + helper(completion.text)

request = RolloutRequest((1,), Example("e", "p"), "g", Sampling(1))
rollout = Rollout(request, Completion((1,), (0.0,), "stop", "four"), 0, 0)
specs = [RewardSpec(name="mine"), RewardSpec(name="mine_too", args={"offset": 10})]
with Scorer(specs, RewardOptions(workers=2)) as scorer:
    scorer.score([rollout])
print(rollout.rewards)
"""
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout == "started\n{'mine': 4.0, 'mine_too': 14.0}\n"


# --- names that are only names

STYLED = """
from posttrain import reward

@reward("styled", deterministic=False)
class Styled:
    def __init__(self, length):
        self.length = length

    def declare(self, info):
        from dataclasses import replace
        return replace(info, timeout=float(self.length), range=(0.0, 9.0), deterministic=True, concurrency=3)

    def __call__(self, completion, example):
        return min(self.length, len(completion.text))
"""


def test_one_reward_under_several_names(tmp_path):
    (tmp_path / "styled_rewards.py").write_text(STYLED)
    specs = [
        {"name": "long", "use": "styled", "from": str(tmp_path / "styled_rewards.py"), "args": {"length": 7}},
        {"name": "short", "use": f"{tmp_path}/styled_rewards.py:Styled", "args": {"length": 2}},
        {"name": "right", "use": "exact_match", "weight": 100},
        {"name": "exact_match", "use": "math_answer", "weight": 1000},
    ]
    with make_scorer(*specs) as scorer:
        rollouts = make_rollouts(["\\boxed{42.0}", "x"])
        scorer.score(rollouts)
        infos = scorer.infos
    assert rollouts[0].rewards == {"long": 7.0, "short": 2.0, "right": 0.0, "exact_match": 1.0}
    assert rollouts[0].reward == 1009.0
    assert list(infos) == ["long", "short", "right", "exact_match"]
    # What depends on the arguments is declared by the instance.
    assert [infos[name].timeout for name in ("long", "short")] == [7.0, 2.0]
    assert (infos["long"].range, infos["long"].concurrency) == ((0.0, 9.0), 3)
    assert infos["long"].deterministic
    assert infos["long"].sha256 == infos["short"].sha256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use": "math_answr"}, r"no reward named 'math_answr' \(did you mean 'math_answer'\?\)"),
        ({"use": "format"}, "needs either tags"),
        ({"use": "http"}, "missing a required argument: 'url'"),
        ({"use": "http", "args": {"url": "node1"}}, "'node1' is not an address"),
        ({"use": "http", "args": {"url": "http://node1", "retries": -1}}, "and retries >= 0"),
        ({"use": "http", "args": {"url": "http://node1", "range": [1, 0]}}, r"is \[lowest, highest\]"),
        ({"use": "http", "args": {"url": "http://node1", "token_env": "NO_SUCH_T"}}, "NO_SUCH_T is not set"),
    ],
)
def test_what_is_wrong_with_the_reward_behind_a_name(options, message):
    with pytest.raises(RecipeError, match=message):
        locate(spec("style", **options))
