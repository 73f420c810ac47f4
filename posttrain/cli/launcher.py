"""`accelerate launch` that gives its processes time to act on a signal, and ends with their exit code.

Run as `python -m posttrain.cli.launcher`, with the arguments of `accelerate launch`. By itself accelerate
ends with code 1 and a traceback whatever happened, and kills processes 30 s after it passed a signal on.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

import psutil
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

GRACE_SECONDS = 24 * 3600
"""A step and its checkpoint may take long; whoever is in a hurry sends a second signal."""


def main(arguments: Sequence[str]) -> int:
    """Start the processes and wait for them. Returns the exit code of the one that failed first, or 0."""
    # Read by torchrun, which does the work for accelerate.
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGUSR1,SIGHUP,SIGQUIT"
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(GRACE_SECONDS)
    logging.disable(logging.ERROR)  # how processes end is told by them and by the exit code
    try:
        launch_command(launch_command_parser().parse_args(arguments))
        return 0
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    except SignalException as error:
        return 128 + int(error.sigval)
    finally:
        for child in psutil.Process().children():  # after a second signal there are some
            child.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
