"""vLLM's API servers, in forks of one process that has imported it: `vllm_servers.py [[FLAG, …], …]` (JSON).

Importing takes a server ten seconds of CPU time. The process ends with its servers, and they with it: who
starts it leads a process group and kills that (`posttrain.rollout.guard`).
"""

from __future__ import annotations

import json
import os
import runpy
import sys

MODULE = "vllm.entrypoints.openai.api_server"


def main() -> None:
    import vllm.entrypoints.launchers.api_server.entry
    import vllm.v1.engine.async_llm

    assert vllm.entrypoints.launchers.api_server.entry.main
    for flags in json.loads(sys.argv[1]):
        if os.fork() == 0:
            sys.argv = [MODULE, *flags]
            runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
            return
    _, status = os.wait()  # one has ended, so none of this is of any use
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
