"""Run Python programs that nobody has read, such as a model's.

`Sandbox.run` runs programs one after the other, each in an interpreter of its own. What the isolation covers
(Linux 5.14 or later; no privileges are needed where the system allows user namespaces):

- Files: the program sees the interpreter, its standard library without installed packages, and the system's
  /lib and /usr/lib, for their shared libraries, all of it read-only; and a directory in memory, its own,
  which is gone afterwards. No /proc, no other programs.
- Processes: namespaces of its own for processes, users, mounts, network (nothing but a loopback that is
  down), IPC and host name. It cannot see, signal or trace anything outside; what it leaves running is killed.
- Privileges: an ordinary user without capabilities and without a way to gain any; no tracing, keyrings, BPF,
  io_uring, sockets to the host of a virtual machine, and a few more of the kernel's calls.
- Inheritance: an empty environment, no descriptors, no terminal, no keyring.
- Limits: wall-clock and CPU time, address space and number of processes (together they bound memory), size
  and number of files, output.

What it does not cover: defects of the kernel in the calls that remain, side channels such as timing and load,
and the machine's CPU and memory up to the limits; shared memory and anonymous files are limited one by one,
not in sum (of all that runs, the programs are what a system short of memory ends first). Root without another
id to give away, as in a namespace that has only one, cannot limit the number of processes.

With `isolation="none"` there remain the limits (that on processes does not bind root), the empty environment,
the private directory, the closed descriptors and the time-out, after which the program and its descendants
are killed. Such a program can read what you can read, send it anywhere, and kill and change what you can.
"""

from __future__ import annotations

import contextlib
import getpass
import marshal
import os
import site
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from posttrain.errors import RewardError

Isolation = Literal["required", "none"]
Status = Literal["exited", "timeout", "output"]

STARTUP_SECONDS = 20.0
"""Time for the sandbox itself besides the programs' time, on a machine that is busy."""

_CHILD = str(Path(__file__).with_name("sandbox_child.py"))
_PROBE = "print('ready')"
_MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What programs may use.

    `seconds` is the wall-clock time of each program, `total_seconds` that of all programs of one call.
    `memory_mib` is the address space of each process, `disk_mib` the size of the private directory (in
    memory) and of each file; `processes` counts threads, too.
    """

    seconds: float = 5.0
    total_seconds: float = 30.0
    memory_mib: int = 512
    disk_mib: int = 64
    processes: int = 16


class Program(NamedTuple):
    """Source code, its standard input, and the bytes of standard output after which it is stopped."""

    source: str
    stdin: bytes = b""
    max_output: int = _MIB


class Result(NamedTuple):
    """How a program ended.

    `status` says whether it ended by itself, took too long or wrote too much; `code` is the exit code
    (negative: the signal that ended it), None if there was no time left to start it.
    """

    status: Status
    code: int | None
    stdout: bytes
    stderr: str


class Sandbox:
    """Runs programs; see the module for what it protects from. May be used by several threads at once."""

    def __init__(self, isolation: Isolation = "required", limits: Limits | None = None):
        """Try it with a program of its own.

        Raises:
            RewardError: the machine does not allow isolation and it is required, or nothing can be run.
        """
        self._isolated = isolation == "required"
        self._limits = limits or Limits()
        self._python, self._visible, self._hidden = _interpreter()
        if sys.platform != "linux":
            raise RewardError("model-written programs can be run on Linux only")
        try:
            (result,) = self.run([Program(_PROBE)], _PROBE_LIMITS)
            if result.stdout.strip() != b"ready":
                raise RewardError(
                    f"the interpreter does not start: {result.status}, {result.stderr[-300:]!r}"
                )
        except RewardError as error:
            if not self._isolated:
                raise
            raise RewardError(
                f"model-written programs cannot be isolated here, as user {_user()} ({error}): this needs "
                "Linux 5.14 or later with user namespaces allowed; `isolation: none` in the reward's args "
                "runs them unprotected"
            ) from error

    def run(
        self, programs: Sequence[Program], limits: Limits | None = None, stop_at_failure: bool = False
    ) -> list[Result]:
        """Run programs, one after the other, to the end or to the first that does not exit with code 0.

        A program that fails, hangs or is killed for what it uses is a result.

        Raises:
            RewardError: the sandbox failed; this says nothing about the programs.
        """
        limits = limits or self._limits
        private = tempfile.TemporaryDirectory(prefix="posttrain-", ignore_cleanup_errors=True)
        with contextlib.nullcontext() if self._isolated else private as directory:
            request = {
                "parent": os.getpid(),
                "isolated": self._isolated,
                "directory": directory,
                "python": self._python,
                "visible": self._visible,
                "hidden": self._hidden,
                "seconds": limits.seconds,
                "total_seconds": limits.total_seconds,
                "memory_bytes": limits.memory_mib * _MIB,
                "disk_bytes": limits.disk_mib * _MIB,
                "processes": limits.processes,
                "stop_at_failure": stop_at_failure,
                "programs": [(p.source.encode("utf-8", "replace"), p.stdin, p.max_output) for p in programs],
            }
            reply = self._ask(request, limits.total_seconds + STARTUP_SECONDS)
        if "fault" in reply:
            raise RewardError(f"the sandbox failed: {reply['fault']}")
        runs: list[tuple[Any, int | None, bytes, bytes]] = reply["runs"]
        if any(status == "oom" for status, *_ in runs):
            raise RewardError("the sandbox failed: the system is short of memory and ended the program")
        return [Result(*run[:3], run[3].decode("utf-8", "replace")) for run in runs]

    def _ask(self, request: dict[str, Any], patience: float) -> dict[str, Any]:
        process = subprocess.Popen(
            [self._python, "-I", "-S", "-B", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            start_new_session=True,  # no terminal to push characters into
        )
        with process:
            try:
                output, errors = process.communicate(marshal.dumps(request), timeout=patience)
            except subprocess.TimeoutExpired:
                raise RewardError(f"the sandbox failed: no reply after {patience:g} s") from None
            finally:
                process.kill()  # and with it everything it has started
        try:
            reply: dict[str, Any] = marshal.loads(output)
        except (EOFError, ValueError, TypeError):
            last = errors.decode("utf-8", "replace").strip().rpartition("\n")[2]
            raise RewardError(
                f"the sandbox failed: no reply (exit code {process.returncode}) {last}".rstrip()
            ) from None
        return reply


_PROBE_LIMITS = Limits(seconds=STARTUP_SECONDS)


def _interpreter() -> tuple[str, list[str], list[str]]:
    """The interpreter outside of any virtual environment, the paths it needs, and those not to be shown."""
    base = Path(sys.base_prefix)
    python = base / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    if not python.exists():
        python = Path(sys.executable).resolve()
    wanted = [*(Path(root) / lib for root in ("/", "/usr", base) for lib in ("lib", "lib64")), python]
    wanted += map(Path, ("/etc/ld.so.cache", "/usr/share/zoneinfo"))
    wanted += [Path("/dev") / name for name in ("null", "zero", "full", "random", "urandom")]
    visible: list[str] = []
    for path in wanted:
        if str(path) not in visible and not any(parent in map(Path, visible) for parent in path.parents):
            visible.append(str(path))
    hidden = [*site.getsitepackages([str(base)]), *map(str, Path("/usr/lib").glob("python3*/dist-packages"))]
    return str(python), visible, list(dict.fromkeys(hidden))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an id without a name
        return str(os.getuid())
