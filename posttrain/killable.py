"""Processes for code that may do anything: they can be killed at any time, with all they have started."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

STALL_SECONDS = 30
"""Time for which a message may be stuck half-way: a stray thread in a process must not stop the trainer."""
PR_SET_CHILD_SUBREAPER = 36

_BOOT = (
    "import importlib, json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "importlib.import_module(sys.argv[2]).main(*map(int, sys.argv[3:]))"
)


class KillableProcess:
    """A fresh interpreter (not a fork of a process with threads and CUDA) that runs a module's `main`.

    `main` is given the descriptor of a socket, whose other end is `connection`, then `descriptors`, which it
    inherits, and at the end `memory_limit`, in bytes (see `confine`; 0 is none).
    """

    def __init__(self, main: Callable[..., None], descriptors: Sequence[int] = (), memory_limit: int = 0):
        ours, theirs = socket.socketpair()
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", STALL_SECONDS, 0))
        with theirs:
            inherited = [theirs.fileno(), *descriptors]
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    _BOOT,
                    json.dumps([*map(str, sys.path), str(Path.cwd())]),
                    main.__module__,
                    *map(str, [*inherited, memory_limit]),
                ],
                pass_fds=inherited,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the trainer's; and the whole group can be killed
                # One thread each: the pool is the parallelism. Equal hashes: sets iterate in equal order.
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            )
        self.connection = Connection(ours.detach())

    def kill(self) -> int:
        """End the process and all it started; returns the exit code, that of its own end if it had one."""
        started: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):  # it is gone
            started = psutil.Process(self.process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in started:  # those with a session of their own are in no group of ours
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.connection.close()
        return self.process.wait()


def confine(memory_limit: int) -> None:
    """In the process: allow so many bytes (0 is no limit), and stay the ancestor of all that is started here,
    so that the parent finds and ends it.
    """
    if memory_limit:
        # Of private writable memory: address space that is only reserved, as CUDA does, does not count.
        resource.setrlimit(resource.RLIMIT_DATA, (memory_limit, memory_limit))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
