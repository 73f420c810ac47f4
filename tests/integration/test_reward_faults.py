"""Rewards that fail in every way, in real processes: no failure becomes a score, no process is left."""

import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from rewards.scoring import FAULTY, faulty, make_rollouts, make_scorer

TIMEOUT = 1.0

GOOD = {
    "=0.5": 0.5,
    "True": 1.0,
    "int": 1.0,
    "np.float32": 0.5,
    "np.int64": 1.0,
    "np.bool": 1.0,
    "np.array(0d)": 0.25,
    "print": 1.0,
    "fork": 1.0,
    "None": None,
}
BAD = {
    "exception": ["raise", "unprintable", "sys.exit", "recursion"],
    "value": ["nan", "inf", "-inf", "np.nan", "huge", "str", "list", "complex", "np.str"],
    "died": ["os._exit", "kill", "segfault", "closed"],
    "timeout": ["while", "regex", "sleep"],
}
KINDS = {text: kind for kind, texts in BAD.items() for text in texts}


@pytest.fixture
def marked(tmp_path, monkeypatch):
    """Give the workers of this test, and whatever they fork, a command line that no others have."""
    monkeypatch.chdir(tmp_path)

    def processes():
        found = []
        for process in psutil.process_iter(["pid", "cmdline", "status"]):
            command = " ".join(process.info["cmdline"] or [])
            if str(tmp_path) in command and "rewards.worker" in command:
                found.append(process.info["pid"])
        return found

    return processes


def wait_until(condition, seconds=60.0):
    """Poll, for at most so long that only a defect gets there."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "still not so"
        time.sleep(0.05)


def assert_as_injected(texts, rollouts, report, kinds):
    for text, rollout in zip(texts, rollouts, strict=True):
        if text in kinds:
            assert rollout.reward is None, text
            (message,) = rollout.reward_errors.values()
            assert message.startswith(f"{kinds[text]}: "), (text, message)
        else:
            assert rollout.reward == GOOD[text], (text, rollout.reward_errors)
            assert not rollout.reward_errors
    stats = next(iter(report.rewards.values()))
    assert stats.errors == Counter(kinds[text] for text in texts if text in kinds)
    assert stats.not_applicable == texts.count("None")
    assert stats.scored == len(texts) - stats.errors.total() - stats.not_applicable


def test_forty_faults_off_the_main_thread(marked):
    faults = list(KINDS) * 2
    # Every fault between good samples, which have to come through.
    good = list(GOOD)
    texts = good + [text for at, fault in enumerate(faults) for text in (fault, good[at % len(good)])]
    rollouts = make_rollouts(texts)
    reports = []

    def score():
        with make_scorer(faulty("act", timeout=TIMEOUT)) as scorer:
            reports.append(scorer.score(rollouts))

    thread = threading.Thread(target=score)
    thread.start()
    thread.join()
    assert_as_injected(texts, rollouts, reports[0], KINDS)
    assert len(faults) >= 40
    wait_until(lambda: not marked())


PLAIN = """
import ctypes, os, re, sys, time

def plain(completion, example):
    with open("started", "a") as file:
        file.write(f"{os.getpid()} {time.monotonic()} {completion.text}\\n")
    return ACTIONS[completion.text]()

def fail(error):
    raise error

def for_ever():
    while True:
        pass

def recurse():
    return recurse()

ACTIONS = {
    "fine": lambda: 1.0,
    "print": lambda: [print("x" * 1_000_000) for _ in range(20)] and 1.0,
    "raise": lambda: fail(ValueError("boom")),
    "recursion": recurse,
    "memory": lambda: len(bytearray(5 << 30)),
    "sys.exit": lambda: sys.exit(3),
    "nan": lambda: float("nan"),
    "str": lambda: "1.0",
    "os._exit": lambda: os._exit(3),
    "kill": lambda: os.kill(os.getpid(), 9),
    "segfault": lambda: ctypes.string_at(0),
    "while": for_ever,
    "regex": lambda: re.match(r"(a+)+$", "a" * 64 + "b"),
    "sleep": lambda: time.sleep(3600),
}
"""
STEPS = 5
FAULTS = {  # of each step
    "exception": ["raise"] * 8 + ["recursion"] * 5 + ["memory"] * 4 + ["sys.exit"] * 5,
    "value": ["nan"] * 5 + ["str"] * 5,
    "died": ["os._exit", "kill", "segfault"],
    "timeout": ["while", "regex", "regex", "while", "sleep"],
}


def test_two_hundred_faults_in_a_run(marked, tmp_path, monkeypatch):
    """Every one is counted in the metrics of its step, none is scored, and no process is left."""
    from posttrain.rewards import pool
    from posttrain.rollout.types import RolloutBatch
    from posttrain.training.collect import Collected

    ended = {}
    kill = pool._Worker.kill

    def noted(self):
        code = kill(self)
        ended[self.process.pid] = time.monotonic()
        return code

    monkeypatch.setattr(pool._Worker, "kill", noted)
    (tmp_path / "plain.py").write_text(PLAIN)
    texts = [text for faults in FAULTS.values() for text in faults] + ["fine"] * 15 + ["print"] * 2
    kinds = {text: kind for kind, faults in FAULTS.items() for text in faults}
    limit = 0.3
    with make_scorer({"name": "plain", "from": "plain.py", "timeout": limit}, memory_gib=2.0) as scorer:
        for step in range(STEPS):
            random.Random(step).shuffle(texts)
            rollouts = make_rollouts(texts)
            collected = Collected(RolloutBatch([]))
            collected.count(scorer.score(rollouts, step))
            assert collected.counts == {
                "rewards/cache_hits": 0,
                **{f"rewards/plain/errors/{kind}": len(faults) for kind, faults in FAULTS.items()},
            }
            for rollout in rollouts:
                error = rollout.reward_errors.get("plain", "none: ").partition(":")[0]
                assert error == kinds.get(rollout.completion.text, "none"), rollout.reward_errors
                assert rollout.reward == (1.0 if error == "none" else None)
        wait_until(lambda: len(marked()) == 2)
    wait_until(lambda: not marked())
    assert STEPS * sum(map(len, FAULTS.values())) == 200

    # From the start of the sample that was a process's last to the end of the process.
    last = {line.split()[0]: line.split() for line in (tmp_path / "started").open()}
    hung = [(int(pid), float(at)) for pid, at, text in last.values() if kinds.get(text) == "timeout"]
    seconds = sorted(ended[pid] - at for pid, at in hung)
    assert len(seconds) == STEPS * len(FAULTS["timeout"])
    assert seconds[0] >= limit
    # All but those for which a busy machine had no time.
    assert seconds[int(0.8 * len(seconds))] <= limit + 0.5, seconds


def test_async_faults(marked):
    # To an async reward sleeping is no hang: it is cancelled, the others of its worker go on.
    faults = ["raise", "nan", "os._exit", "segfault", "while", "regex", "sleep", "sleep"]
    texts = [text for fault in faults for text in (fault, "=0.5", "True", "None")]
    rollouts = make_rollouts(texts)
    with make_scorer(faulty("act_async", timeout=TIMEOUT)) as scorer:
        report = scorer.score(rollouts)
    assert_as_injected(texts, rollouts, report, KINDS)
    wait_until(lambda: not marked())


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("raise", "exception"),
        ("os._exit", "died"),
        ("segfault", "died"),
        ("while", "timeout"),
        ("short", "count"),
        ("scalar", "exception"),
    ],
)
def test_a_batch_fails_as_a_whole_and_alone(marked, fault, kind):
    texts = ["=1", "=2", "=3", fault, "=4", "=5"]
    rollouts = make_rollouts(texts, group_size=2)
    with make_scorer({"name": "declared_batch", "from": FAULTY, "timeout": TIMEOUT}) as scorer:
        report = scorer.score(rollouts)
    assert [rollout.reward for rollout in rollouts] == [1.0, 2.0, None, None, 4.0, 5.0]
    assert report.rewards["declared_batch"].errors == {kind: 2}
    wait_until(lambda: not marked())


def test_what_takes_too_much_of_the_machine(marked):
    texts = ["=1", "memory", "print 1 GB", "=2"]
    rollouts = make_rollouts(texts)
    with make_scorer(faulty("act", timeout=60.0), memory_gib=2.0) as scorer:
        report = scorer.score(rollouts)
    assert [rollout.reward for rollout in rollouts] == [1.0, None, 1.0, 2.0]
    assert next(iter(report.rewards.values())).errors == {"exception": 1}
    (error,) = rollouts[1].reward_errors.values()
    assert error.startswith("exception: MemoryError")


def test_processes_that_a_reward_starts_end_with_it(marked):
    texts = ["=1", "flood", "daemon", "=2"]
    rollouts = make_rollouts(texts)
    with make_scorer(faulty("act", timeout=3.0)) as scorer:
        report = scorer.score(rollouts)
        assert [rollout.reward for rollout in rollouts] == [1.0, None, None, 2.0]
        assert next(iter(report.rewards.values())).errors == {"timeout": 2}
        wait_until(lambda: len(marked()) == 2)  # the two workers
    wait_until(lambda: not marked())


def test_tensors(marked):
    """Apart from the others, as every replaced worker would import torch within a sample's time."""
    texts = ["tensor(0d)", "tensor(1d)", "=1"]
    rollouts = make_rollouts(texts)
    with make_scorer(faulty("act", timeout=120.0), workers=1) as scorer:
        report = scorer.score(rollouts)
    assert [rollout.reward for rollout in rollouts] == [0.75, None, 1.0]
    assert next(iter(report.rewards.values())).errors == {"value": 1}


def test_math_answers_that_do_not_come_to_an_end(marked):
    texts = ["\\boxed{42}", "\\boxed{9^{9^{9^{9}}}}", "\\boxed{((7!)!)!}", "\\boxed{41}"]
    rollouts = make_rollouts(texts * 2)
    with make_scorer({"name": "math_answer", "timeout": 3.0}) as scorer:
        scorer.score(rollouts)
        again = make_rollouts(["\\boxed{42.0}"])
        scorer.score(again)
    for rollout in rollouts:
        if rollout.completion.text in (texts[0], texts[3]):
            assert rollout.reward == float(rollout.completion.text == texts[0])
        else:  # either it is found to be wrong in time, or it has no score
            assert (rollout.reward is None) == ("math_answer" in rollout.reward_errors)
            assert rollout.reward in (None, 0.0)
    assert again[0].reward == 1.0
    wait_until(lambda: not marked())


def test_a_worker_that_dies_between_two_calls_is_replaced(marked):
    with make_scorer(faulty("act")) as scorer:
        rollouts = make_rollouts(["=1"] * 20)
        scorer.score(rollouts)
        wait_until(lambda: len(marked()) == 2)
        for pid in marked():
            psutil.Process(pid).kill()
        wait_until(lambda: all(worker.process.poll() is not None for worker in scorer._pool._workers))
        again = make_rollouts(["=2"] * 20)
        report = scorer.score(again)
    assert [rollout.reward for rollout in again] == [2.0] * 20
    assert report.errors == 0
    wait_until(lambda: not marked())


def test_an_interrupted_call_leaves_a_usable_scorer(marked, monkeypatch):
    from posttrain.rewards import pool

    with make_scorer(faulty("act", timeout=30.0)) as scorer:
        wait = pool.wait

        def interrupt(connections, timeout):
            wait(connections, min(timeout, 0.5))
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(pool, "wait", interrupt)
            with pytest.raises(KeyboardInterrupt):
                scorer.score(make_rollouts(["sleep"] * 4))
        rollouts = make_rollouts(["=1", "=2"])
        scorer.score(rollouts)
    assert [rollout.reward for rollout in rollouts] == [1.0, 2.0]
    wait_until(lambda: not marked())


@pytest.mark.parametrize("text", ["=1", "regex", "sleep"])
def test_workers_end_with_their_parent(marked, tmp_path, text):
    """Killed, not closed; idle workers and busy ones, also one that never lets go of the interpreter lock."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(FAULTY).parents[1])!r})
from rewards.scoring import *
scorer = make_scorer(faulty("act", timeout=1.5))
print("ready", flush=True)
scorer.score(make_rollouts([{text!r}] * 4))
sys.stdin.read()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path
    )
    with parent:
        assert parent.stdout.readline() == b"ready\n"
        time.sleep(0.5)  # into the call
        parent.kill()
    wait_until(lambda: not marked())
