"""Runs a server for as long as the process that asked for it: `python -I guard.py PARENT COMMAND…`.

It leads a process group of its own, in which the server and whatever that starts live. When the server ends,
or the parent process is gone (killed, too), the whole group is killed. Only the standard library is imported.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

LOOK_EVERY = 0.5
"""Seconds between two looks at the parent."""


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
