"""Runs a server for as long as the process that asked for it: `python -I guard.py PARENT COMMAND…`.

It leads a process group of its own, in which the server and whatever that starts live. When the server ends,
or the parent process is gone (killed, too), the whole group is killed. Only the standard library is imported.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping

LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "MASTER_",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "TORCHELASTIC_",
    "ACCELERATE_",
)
"""How the variables of `accelerate launch` and `torchrun` begin."""
LOOK_EVERY = 0.5
"""Seconds between two looks at the parent."""


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a process of its own: it must not take itself for one of the trainer's ranks."""
    return {name: value for name, value in environment.items() if not name.startswith(LAUNCHER_VARIABLES)}


def main(parent: int, command: list[str]) -> None:
    """Run `command` until it ends or this process is no longer a child of `parent`; does not return."""
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    server = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    while os.getppid() == parent:
        try:
            code = server.wait(LOOK_EVERY)
        except subprocess.TimeoutExpired:
            continue
        print(f"the server ended with exit code {code}", flush=True)
        break
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
