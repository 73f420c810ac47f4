import json
import multiprocessing
import os
import signal
from dataclasses import replace

import pytest
from rewards.scoring import completion, make_rollouts
from rewards.test_registry import spec

from posttrain.errors import RewardError
from posttrain.recipe.schema import RewardOptions
from posttrain.rewards.cache import CacheKeys, RewardCache, digest
from posttrain.rewards.calling import without_logprobs
from posttrain.rewards.registry import RewardInfo
from posttrain.rewards.scorer import Scorer
from posttrain.rollout.types import Example

INFO = RewardInfo("mine", "1", sha256="ab")
SAMPLE = (completion("text"), Example("a", "p", "42", {"level": 1, "tags": ["x"]}))
KEY, OTHER = "00" * 16, "11" * 16

# --- the file


def test_values_survive_the_process(tmp_path):
    cache = RewardCache(tmp_path / "cache" / "0.jsonl")
    assert cache.get(KEY) is None
    cache.add(KEY, [0.1, None])
    assert cache.get(KEY) == [0.1, None]
    cache.close()
    again = RewardCache(tmp_path / "cache" / "1.jsonl")  # another rank, which reads all files
    again.add(OTHER, [1 / 3])
    assert (again.get(KEY), again.get(OTHER)) == ([0.1, None], [1 / 3])
    assert len(RewardCache(tmp_path / "cache" / "0.jsonl")) == 2


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_that_was_cut_short_is_left_out(tmp_path, cut):
    path = tmp_path / "0.jsonl"
    cache = RewardCache(path)
    cache.add(KEY, [1.0])
    cache.add(OTHER, [0.25])
    cache.close()
    path.write_bytes(path.read_bytes()[:-cut])
    cache = RewardCache(path)
    # Without its line end alone, a line is still whole.
    assert (cache.get(KEY), cache.get(OTHER)) == ([1.0], [0.25] if cut == 1 else None)
    cache.add(OTHER, [0.5])
    cache.close()
    assert RewardCache(path).get(OTHER) == [0.5]


@pytest.mark.parametrize("line", ["", "{}", "[]", '["00", 1]', '["xy", [1.0]]', '["00", ["x"]]', "\x00" * 9])
def test_lines_that_mean_nothing_are_left_out(tmp_path, line):
    path = tmp_path / "0.jsonl"
    path.write_text(f"{line}\n" + json.dumps([KEY, [1.0]]) + "\n")
    cache = RewardCache(path)
    assert len(cache) == 1
    assert cache.get(KEY) == [1.0]


def _write_for_ever(path):
    cache = RewardCache(path)
    for number in range(10**9):
        cache.add(digest(number), [number / 7])


def test_a_killed_writer_leaves_only_whole_values(tmp_path):
    path = tmp_path / "0.jsonl"
    writer = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(path,))
    writer.start()
    while not path.exists() or path.stat().st_size < 20_000:
        assert writer.is_alive()
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    cache = RewardCache(path)
    assert len(cache) > 300
    for number in range(len(cache)):
        assert cache.get(digest(number)) == [number / 7]


def test_a_cache_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RewardError, match=r"reward cache .*0\.jsonl cannot be used: File exists"):
        RewardCache(tmp_path / "file" / "0.jsonl")


# --- keys


def key(sample=SAMPLE, info=INFO, args=(), step=None, **options):
    return CacheKeys(info, dict(args), step=step, **options).of([sample])


def test_equal_input_has_an_equal_key():
    text, _ = SAMPLE
    columns = {"tags": ["x"], "level": 1}  # in another order
    assert key() == key((replace(text, logprobs=(-1.0,) * 4), Example("a", "p", "42", columns)))


def test_a_key_depends_on_everything_a_value_may_depend_on():
    text, example = SAMPLE
    keys = [
        key(),
        key(info=replace(INFO, name="other")),
        key(info=replace(INFO, version="2")),
        key(info=replace(INFO, sha256="cd")),
        key(args={"scale": 2}.items()),
        key(step=3),
        key((replace(text, text="texts"), example)),
        key((replace(text, token_ids=(1, 2)), example)),
        key((replace(text, finish_reason="length"), example)),
        key((replace(text, loss_mask=(1, 1, 0, 1)), example)),
        key((text, replace(example, id="b"))),
        key((text, replace(example, prompt=[{"role": "user", "content": "p"}]))),
        key((text, replace(example, answer=None))),
        key((text, replace(example, columns={"level": 2, "tags": ["x"]}))),
        key((text, replace(example, columns={"level": 1, "tags": {"x"}}))),
        key((text, replace(example, columns={1: "a", "b": "c"}))),
        CacheKeys(INFO, {}).of([SAMPLE, SAMPLE]),
        CacheKeys(INFO, {}).of([]),
    ]
    assert len(set(keys)) == len(keys)


def test_a_canonical_input_is_all_that_counts():
    text, example = SAMPLE
    options = {"canonical": lambda completion, example: example.answer}
    assert key(**options) == key((replace(text, text="else"), example), **options)
    assert key(**options) != key((text, replace(example, answer="43")), **options)


def test_log_probs_are_not_shown_to_a_reward_whose_values_are_kept():
    hidden, _ = without_logprobs(SAMPLE)
    assert hidden.token_ids == SAMPLE[0].token_ids
    for use in (len, list, bool, sum, lambda logprobs: logprobs[0]):
        with pytest.raises(RewardError, match="deterministic=False"):
            use(hidden.logprobs)


# --- in the scorer

COUNTED = """
from pathlib import Path
from posttrain import reward

def note(what):
    with Path(CALLS).open("a") as file:
        file.write(what + "\\n")

@reward("counted", version="1", range=(0, 9))
def counted(completion, example, bonus=0.0):
    note(completion.text)
    if completion.text == "bad":
        raise ValueError("boom")
    return None if completion.text == "no" else len(completion.text) + bonus

@reward("peeking")
def peeking(completion, example):
    return sum(completion.logprobs)

@reward("drawn", deterministic=False)
def drawn(completion, example):
    note(completion.text)
    return sum(completion.logprobs)

@reward("grouped", batched=True)
def grouped(completions, examples):
    note("+".join(completion.text for completion in completions))
    return [len(completions)] * len(completions)

@reward("stepped")
def stepped(completions, trainer_state, **kwargs):
    note(str(trainer_state.global_step))
    return [trainer_state.global_step] * len(completions)
"""


@pytest.fixture
def counting(tmp_path):
    """Scores texts with a reward of the file above; gives the rollouts, the report and the calls."""
    calls = tmp_path / "calls"
    code = tmp_path / "counted.py"
    code.write_text(COUNTED.replace("CALLS", repr(str(calls))))

    def score(name, *batches, cache="cache/0.jsonl", **options):
        calls.write_text("")
        path = None if cache is None else tmp_path / cache
        own = spec(name, **{"from": str(code)}, **options)
        with Scorer([own], RewardOptions(workers=1), path) as scorer:
            done = [(rollouts, scorer.score(rollouts, step).rewards[name]) for rollouts, step in batches]
        return done, calls.read_text().split()

    score.code = code
    return score


def test_equal_samples_share_one_call_and_known_ones_need_none(counting):
    texts = ["a", "bb", "a", "no", "bad", "bad", "no"]
    done, calls = counting("counted", (make_rollouts(texts, group_size=8), 0), (make_rollouts(texts[:4]), 1))
    assert sorted(calls) == ["a", "bad", "bb", "no"]
    (first, stats), (second, again) = done
    assert [rollout.reward for rollout in first] == [1.0, 2.0, 1.0, None, None, None, None]
    assert (stats.scored, stats.not_applicable, stats.errors, stats.cached) == (3, 2, {"exception": 2}, 0)
    assert [rollout.rewards["counted"] for rollout in second] == [1.0, 2.0, 1.0, None]
    assert again.cached == 4

    # A later attempt at the run: errors were not kept.
    done, calls = counting("counted", (make_rollouts(texts, group_size=8), 0), cache="cache/1.jsonl")
    assert calls == ["bad"]
    assert [rollout.rewards for rollout in done[0][0]] == [rollout.rewards for rollout in first]
    assert done[0][1].cached == 5
    assert done[0][1].errors == {"exception": 2}

    # Other arguments, or other code, are another reward.
    done, calls = counting("counted", (make_rollouts(["a"]), 0), args={"bonus": 1.0})
    assert (calls, done[0][0][0].reward) == (["a"], 2.0)
    version = done[0][0][0].reward_versions["counted"]
    counting.code.write_text(counting.code.read_text() + "\n# edited\n")
    done, calls = counting("counted", (make_rollouts(["a"]), 0))
    assert calls == ["a"]
    assert version.startswith("1 sha256:")
    assert version != done[0][0][0].reward_versions["counted"]


def test_what_is_not_deterministic_is_always_asked(counting):
    rollouts = make_rollouts(["a", "a"], group_size=2)
    _, calls = counting("drawn", (rollouts, 0), (rollouts, 1))
    assert calls == ["a"] * 4
    done, _ = counting("peeking", (rollouts, 0))
    assert done[0][1].errors == {"exception": 2}
    assert "deterministic=False" in rollouts[0].reward_errors["peeking"]


def test_without_a_file_samples_share_calls_within_a_step_alone(counting):
    rollouts = make_rollouts(["a", "a"])
    _, calls = counting("counted", (rollouts, 0), (rollouts, 1), cache=None)
    assert calls == ["a", "a"]


def test_batches_are_known_as_a_whole_and_steps_where_they_are_seen(counting):
    whole, part = make_rollouts(["a", "b"], group_size=2), make_rollouts(["a"])
    done, calls = counting("grouped", (whole, 0), (part, 0), (whole, 1))
    assert calls == ["a+b", "a"]
    assert [rollout.reward for rollout in whole] == [2.0, 2.0]
    assert [stats.cached for _, stats in done] == [0, 0, 2]
    _, calls = counting("stepped", (part, 3), (part, 4), (part, 3))
    assert calls == ["3", "4"]
    assert part[0].reward == 3.0
