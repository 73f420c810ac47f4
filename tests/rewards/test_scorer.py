import threading
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewards.scoring import FAULTY, faulty, make_rollouts, make_scorer

from posttrain.errors import RecipeError, RewardError
from posttrain.rewards.registry import reward

# --- the parallel result is that of a plain loop


@pytest.fixture(scope="module", params=[1, 3], ids=["1 worker", "3 workers"])
def scorer(request):
    with make_scorer(
        {"name": "act", "from": FAULTY, "weight": 2.0},
        {"name": "act_async", "from": FAULTY, "weight": 0.0},
        {"name": "act_trl", "from": FAULTY, "args": {"bonus": 10.0}},
        {"name": "exact_match", "weight": -1.0},
        workers=request.param,
    ) as scorer:
        yield scorer


def expected(text):
    """Value and kind of error of the reward `act`."""
    if text.startswith("="):
        return float(text[1:]), None
    return {
        "None": (None, None),
        "True": (1.0, None),
        "raise": (None, "exception"),
        "nan": (None, "value"),
    }[text]


def expected_trl(text, group):
    value, error = (None, "exception") if "raise" in group else expected(text)
    return value + 10.0 if text.startswith("=") and value is not None else value, error


TEXTS = st.one_of(st.sampled_from(["None", "True", "raise", "nan"]), st.integers(-9, 9).map("={}".format))


@settings(max_examples=25, deadline=None)
@given(st.lists(TEXTS, max_size=70), st.integers(1, 9))
def test_equals_the_plain_loop(scorer, texts, group_size):
    rollouts = make_rollouts(texts, "=4", group_size)
    report = scorer.score(rollouts)
    errors = {"act": 0, "act_async": 0, "act_trl": 0, "exact_match": 0}
    for at, (rollout, text) in enumerate(zip(rollouts, texts, strict=True)):
        group = texts[at - rollout.index :][:group_size]
        outcomes = {
            "act": expected(text),
            "act_async": expected(text),
            "act_trl": expected_trl(text, group),
            "exact_match": (float(text == "=4"), None),
        }
        assert rollout.rewards == {name: value for name, (value, _) in outcomes.items()}
        kinds = {name: why.partition(":")[0] for name, why in rollout.reward_errors.items()}
        assert kinds == {name: error for name, (_, error) in outcomes.items() if error}
        if outcomes["act"][1] or outcomes["act_trl"][1]:
            assert rollout.reward is None
        else:
            act, trl, exact = (outcomes[name][0] for name in ("act", "act_trl", "exact_match"))
            assert rollout.reward == 2.0 * (act or 0.0) + (trl or 0.0) - exact
        for name, (_, error) in outcomes.items():
            errors[name] += error is not None
    assert report.samples == len(texts)
    assert report.unscored == sum(rollout.reward is None for rollout in rollouts)
    for name, stats in report.rewards.items():
        values = [rollout.rewards[name] for rollout in rollouts if rollout.rewards[name] is not None]
        assert (stats.scored, stats.errors.total()) == (len(values), errors[name])
        assert stats.not_applicable == len(texts) - len(values) - errors[name]
        assert stats.mean == (pytest.approx(sum(values) / len(values)) if values else None)


# --- the weighted sum


def score_one(*specs, text="=1", answer="42"):
    rollouts = make_rollouts([text], answer)
    with make_scorer(*specs, workers=1) as scorer:
        report = scorer.score(rollouts)
    return rollouts[0], report


def test_rewards_that_do_not_apply_are_left_out_of_the_sum():
    rollout, _ = score_one(faulty("act"), "exact_match", text="None", answer="None")
    assert rollout.rewards == {f"{FAULTY}:act": None, "exact_match": 1.0}
    assert rollout.reward == 1.0
    assert rollout.reward_errors == {}


def test_without_any_reward_that_applies_there_is_no_score():
    rollout, report = score_one(faulty("act"), text="None")
    assert rollout.reward is None
    assert rollout.reward_errors == {}
    assert report.unscored == 1
    assert report.errors == 0


def test_weight_zero_is_recorded_but_has_no_say():
    rollout, report = score_one(faulty("act", weight=0.0), "exact_match", text="raise", answer="raise")
    assert rollout.reward == 1.0
    assert set(rollout.reward_errors) == {f"{FAULTY}:act"}
    assert report.errors == 1
    rollout, _ = score_one(faulty("act", weight=0.0), "exact_match", answer=None)
    assert rollout.rewards == {f"{FAULTY}:act": 1.0, "exact_match": None}
    assert rollout.reward is None


def test_scoring_again_clears_errors():
    rollout = make_rollouts(["raise"])[0]
    rollout.rewards["of a method"] = 3.0
    with make_scorer(faulty("act"), workers=1) as scorer:
        scorer.score([rollout])
        assert rollout.reward is None
        rollout.completion = replace(rollout.completion, text="=2")
        scorer.score([rollout])
    assert rollout.reward == 2.0
    assert rollout.reward_errors == {}
    assert rollout.rewards == {"of a method": 3.0, f"{FAULTY}:act": 2.0}


def test_error_lines_name_reward_version_and_row():
    rollouts = make_rollouts(["=0", "=0", "=0", "=0", "=1", "=5", "raise"] + ["nan"] * 20)
    with make_scorer({"name": "declared", "from": FAULTY}) as scorer:
        report = scorer.score(rollouts)
    stats = report.rewards["declared"]
    assert stats.errors == {"value": 21, "exception": 1}
    assert len(report.error_lines) == 10
    assert report.error_lines[:2] == [
        "reward declared (version 7), example 'row-1', completion 1: "
        "value: returned 5.0, outside of its range [0.0, 1.0]",
        "reward declared (version 7), example 'row-1', completion 2: exception: ValueError: boom and bust "
        f"(faulty_rewards.py:{line_of('def _raise') + 1})",
    ]


def line_of(code):
    with open(FAULTY) as file:  # noqa: PTH123
        return next(number for number, line in enumerate(file, 1) if line.startswith(code))


# --- batches


def test_a_batch_is_a_group_wherever_its_rollouts_are():
    @reward("group size", batched=True)
    def group_size(completions, examples):
        assert len({example.id for example in examples}) == 1
        return [len(completions)] * len(completions)

    rollouts = make_rollouts(["x"] * 10, group_size=4)
    shuffled = [rollouts[at] for at in (9, 0, 4, 1, 8, 5, 2, 6, 3, 7)]
    with make_scorer("group size") as scorer:
        scorer.score(shuffled)
    assert [rollout.reward for rollout in rollouts] == [4.0] * 8 + [2.0] * 2


def test_a_wrong_number_of_values_is_an_error_of_its_group_alone():
    texts = ["=1", "=2", "short", "=3"] + ["=4", "nan", "None", "=5"] + ["scalar"] * 4
    rollouts = make_rollouts(texts)
    with make_scorer({"name": "declared_batch", "from": FAULTY}) as scorer:
        report = scorer.score(rollouts)
    assert [rollout.reward for rollout in rollouts] == [None] * 4 + [4.0, None, None, 5.0] + [None] * 4
    assert report.rewards["declared_batch"].errors == {"count": 4, "value": 1, "exception": 4}
    assert rollouts[0].reward_errors["declared_batch"] == "count: returned 3 values for 4 completions"
    assert report.rewards["declared_batch"].not_applicable == 1


def test_equal_answers_share_one_call_of_math_answer():
    texts = ["\\boxed{42}", "it is \\boxed{42}", "\\boxed{41}", "}"] * 5
    rollouts = make_rollouts(texts, group_size=len(texts))
    with make_scorer("math_answer") as scorer:
        report = scorer.score(rollouts)
        bad = make_rollouts(["42", "43"], answer="}")
        scorer.score(bad)
    assert [rollout.reward for rollout in rollouts] == [1.0, 1.0, 0.0, 0.0] * 5
    assert report.rewards["math_answer"].scored == 20
    assert [rollout.reward for rollout in bad] == [None, None]
    assert all("cannot be parsed" in rollout.reward_errors["math_answer"] for rollout in bad)


# --- state, steps, threads


def test_a_class_keeps_its_state_within_a_worker():
    rollouts = make_rollouts(["x"] * 5)
    with make_scorer(faulty("Counting", args={"start": 10}), workers=1) as scorer:
        scorer.score(rollouts)
        assert [rollout.reward for rollout in rollouts] == [11.0, 12.0, 13.0, 14.0, 15.0]
        scorer.score(rollouts[:1])
        assert rollouts[0].reward == 16.0


def test_trl_rewards_see_the_step():
    @reward("step")
    def step(completions, trainer_state, **kwargs):
        return [trainer_state.global_step] * len(completions)

    rollouts = make_rollouts(["x"])
    with make_scorer("step", workers=1) as scorer:
        scorer.score(rollouts, step=17)
    assert rollouts[0].reward == 17.0


def test_threads_take_turns():
    batches = [make_rollouts([f"={thread}"] * 50) for thread in range(4)]
    with make_scorer(faulty("act")) as scorer:
        threads = [threading.Thread(target=scorer.score, args=(batch,)) for batch in batches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for thread, batch in enumerate(batches):
        assert [rollout.reward for rollout in batch] == [float(thread)] * 50


def test_built_ins_that_cannot_hang_start_no_process():
    length = {"name": "length_penalty", "args": {"max_tokens": 4, "buffer": 2}}
    tags = {"name": "format", "args": {"tags": ["think"]}}
    with make_scorer("exact_match", "numeric_match", length, tags) as scorer:
        assert scorer._pool is None
        rollouts = make_rollouts(["42"])
        scorer.score(rollouts)
    assert rollouts[0].rewards == {
        "exact_match": 1.0,
        "numeric_match": 1.0,
        "length_penalty": 0.0,
        "format": 0.0,
    }


def test_a_user_s_pattern_runs_in_a_process_that_can_be_killed():
    pattern = {"name": "format", "args": {"pattern": "(a+)+b"}, "timeout": 0.5}
    rollouts = make_rollouts(["aaab", "a" * 64, "c"])
    with make_scorer(pattern) as scorer:
        report = scorer.score(rollouts)
    assert [rollout.reward for rollout in rollouts] == [1.0, None, 0.0]
    assert report.rewards["format"].errors == {"timeout": 1}


def test_no_rewards_and_no_rollouts():
    with make_scorer() as scorer:
        rollouts = make_rollouts(["x"])
        assert scorer.score(rollouts).unscored == 1
        assert rollouts[0].reward is None
    with make_scorer("exact_match", faulty("act")) as scorer:
        report = scorer.score([])
    assert (report.samples, report.unscored, report.errors) == (0, 0, 0)


# --- what a scorer refuses


@pytest.mark.parametrize(
    ("specs", "error", "message"),
    [
        (["exact_match", "exact_match"], RecipeError, "'exact_match' is listed twice"),
        (["exact_mach"], RecipeError, "did you mean 'exact_match'"),
        ([faulty("act", args={"x": 1})], RecipeError, "unexpected keyword argument 'x'"),
        ([faulty("ACTIONS")], RecipeError, "is a dict, not a function or class"),
        ([{"name": "json:nothing"}], RecipeError, "json neither registers nor defines 'nothing'"),
        ([{"name": "json.nowhere:f"}], RewardError, "cannot be loaded: ModuleNotFoundError"),
    ],
)
def test_a_scorer_refuses(specs, error, message):
    with pytest.raises(error, match=message):
        make_scorer(*specs)


@pytest.mark.parametrize(
    ("code", "reason"), [("os._exit(7)", "exit code 7"), ("os.kill(os.getpid(), 11)", "signal 11")]
)
def test_code_that_dies_while_it_is_loaded(tmp_path, code, reason):
    (tmp_path / "dies.py").write_text(f"import os\n{code}\ndef f(completion, example): ...")
    with pytest.raises(RewardError, match=rf"loading the rewards .*dies\.py:f ended the process \({reason}"):
        make_scorer(f"{tmp_path}/dies.py:f")


def test_a_worker_that_is_killed_once_while_loading_is_replaced(tmp_path):
    code = f"""
import os
from pathlib import Path
once = Path({str(tmp_path / "once")!r})
if not once.exists():
    once.touch()
    os.kill(os.getpid(), 9)
def f(completion, example): return 1.0
"""
    (tmp_path / "dies.py").write_text(code)
    rollouts = make_rollouts(["x"])
    with make_scorer(f"{tmp_path}/dies.py:f", workers=1) as scorer:
        scorer.score(rollouts)
    assert rollouts[0].reward == 1.0


# --- concurrency, code that changes

OVERLAPPING = """
import asyncio, os, time
from pathlib import Path
from posttrain import reward

def now():
    return len(list(Path(FOLDER).iterdir()))

class Inside:
    def __enter__(self):
        self.path = Path(FOLDER) / f"{os.getpid()}-{id(self)}"
        self.path.touch()
    def __exit__(self, *error):
        self.path.unlink()

@reward("apart", concurrency=1, deterministic=False)
def apart(completion, example):
    with Inside():
        time.sleep(0.01)
        return now()

@reward("five", concurrency=5, deterministic=False)
async def five(completion, example):
    with Inside():
        await asyncio.sleep(0.05)
        return now()
"""


@pytest.mark.parametrize(("name", "limit"), [("apart", 1), ("five", 5)])
def test_concurrency_is_kept(tmp_path, name, limit):
    (tmp_path / "inside").mkdir()
    code = tmp_path / "overlapping.py"
    code.write_text(OVERLAPPING.replace("FOLDER", repr(str(tmp_path / "inside"))))
    rollouts = make_rollouts(["x"] * 20)
    with make_scorer({"name": name, "from": str(code)}, faulty("act", weight=0.0), workers=3) as scorer:
        report = scorer.score(rollouts)
    seen = [rollout.rewards[name] for rollout in rollouts]
    assert report.rewards[name].errors == {}
    assert max(seen) <= limit
    assert limit == 1 or max(seen) > 1


def test_code_that_is_edited_during_a_run(tmp_path):
    code = tmp_path / "edited.py"
    code.write_text("import os\ndef f(completion, example):\n    os._exit(1)\n")
    with make_scorer(f"{code}:f", workers=1) as scorer:
        code.write_text("def f(completion, example):\n    return 1.0\n")
        with pytest.raises(RewardError, match=r"code of reward '.*' \(.*:1\) was changed during the run"):
            scorer.score(make_rollouts(["a", "b"]))
