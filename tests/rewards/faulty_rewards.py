"""Rewards that do what their completion says. Loaded by path, in the workers only."""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import sys
import time

import numpy as np

from posttrain import reward


def act(completion, example):
    return _act(completion.text)


async def act_async(completion, example):
    await asyncio.sleep(0.01)
    if completion.text == "sleep":
        await asyncio.sleep(3600)
    return _act(completion.text)


@reward("declared", version="7", range=(0.0, 1.0), timeout=1.5, deterministic=False)
def act_declared(completion, example):
    """Does what it is told.

    And says so.
    """
    return _act(completion.text)


@reward("declared_batch", version="3", batched=True)
def act_batch(completions, examples):
    texts = [completion.text for completion in completions]
    if "short" in texts:
        return [1.0] * (len(texts) - 1)
    if "scalar" in texts:
        return 1.0
    return np.array([_act(text) for text in texts], dtype=object)


def act_trl(prompts, completions, answer, bonus=0.0, **kwargs):
    return [bonus + _act(text) if isinstance(_act(text), float) else _act(text) for text in completions]


class Counting:
    """State: how often this instance was called."""

    def __init__(self, start: int = 0):
        self.calls = start

    def __call__(self, completion, example):
        self.calls += 1
        return self.calls


def _recurse():
    return _recurse()


def _act(text):
    if text.startswith("="):
        return float(text[1:])
    if text == "fork":
        if os.fork() == 0:
            return 0.0  # the child goes back into the worker's loop
        return 1.0
    return ACTIONS[text]()


def _flood():
    for _ in range(200):  # and no more, should nothing stop them
        if os.fork() == 0:
            time.sleep(3600)
            os._exit(0)
    _forever()


def _daemon():
    """A process with a session and a parent of its own, as servers are started."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(3600)
        os._exit(0)
    _forever()


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError


def _raise(error):
    raise error


def _forever():
    while True:
        pass


def _tensor(value):
    import torch

    return torch.tensor(value)


ACTIONS = {
    # good values
    "None": lambda: None,
    "True": lambda: True,
    "int": lambda: 1,
    "np.float32": lambda: np.float32(0.5),
    "np.int64": lambda: np.int64(1),
    "np.bool": lambda: np.bool_(True),
    "np.array(0d)": lambda: np.array(0.25),
    "tensor(0d)": lambda: _tensor(0.75),
    "print": lambda: [print("x" * 1_000_000) for _ in range(50)] and 1.0,
    "print 1 GB": lambda: [print("x" * 10_000_000) for _ in range(100)] and 1.0,
    # bad values
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-inf": lambda: float("-inf"),
    "np.nan": lambda: np.float64("nan"),
    "huge": lambda: 10**400,
    "str": lambda: "1.0",
    "list": lambda: [1.0],
    "tensor(1d)": lambda: _tensor([1.0]),
    "complex": lambda: np.complex128(1j),
    "np.str": lambda: np.str_("1"),
    "2": lambda: 2.0,
    # exceptions
    "raise": lambda: _raise(ValueError("boom\nand bust")),
    "unprintable": lambda: _raise(Unprintable()),
    "sys.exit": lambda: sys.exit(3),
    "recursion": _recurse,
    # the process
    "os._exit": lambda: os._exit(3),
    "kill": lambda: os.kill(os.getpid(), 9),
    "segfault": lambda: ctypes.string_at(0),
    "closed": lambda: os.closerange(0, 256),
    # resources
    "memory": lambda: float(len(bytearray(5 << 30))),
    "flood": _flood,
    "daemon": _daemon,
    # time
    "while": _forever,
    "regex": lambda: re.match(r"(a+)+$", "a" * 64 + "b"),
    "sleep": lambda: time.sleep(3600),
}
