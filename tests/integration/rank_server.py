"""Starts the ranks of distributed tests: everything is imported once, every rank is a fork of that process.

Standard input has one job a line, as JSON: the environment of each rank, the command line that all of them
run, and a file for their output. The answer to each is a line with their exit codes.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def load_everything() -> None:
    """What a training process imports, so that no rank has to."""
    import accelerate
    import deepspeed
    import deepspeed.runtime.zero.muon.original_muon  # compiles functions, for which torch imports a lot
    import peft
    import trl
    from transformers import Qwen2ForCausalLM, Trainer

    import posttrain.recipe.run
    import posttrain.stages.evaluate
    import posttrain.stages.policy
    import posttrain.stages.sft

    posttrain.recipe.summary.versions()  # looks through all installed packages, once in a process
    assert all((accelerate, peft, trl.SFTTrainer, Qwen2ForCausalLM, Trainer))
    # DeepSpeed would compile a shared-memory backend for processes on one machine first, which takes longer
    # than all of these tests; with none of its compiled operations it leaves communication to gloo.
    deepspeed.ops.__compatible_ops__ = {}


def run_rank(job: dict[str, Any], rank: int) -> int:
    """The life of one rank, in a process of its own: returns its exit code."""
    output = os.open(f"{job['output']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(job["environments"][rank])
    os.chdir(job["folder"])
    if job["fsdp_on_cpu"]:
        import fsdp_on_cpu

        fsdp_on_cpu.enable()
    try:
        if job["target"] == "posttrain":
            from posttrain.cli import main

            return main(job["arguments"]) or 0
        import rank_checks

        getattr(rank_checks, job["target"])(*job["arguments"])
        return 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run_job(job: dict[str, Any]) -> list[int]:
    """Exit codes of all ranks; when one fails the others, which may wait for it for ever, are killed."""
    children: dict[int, int] = {}
    for rank in range(len(job["environments"])):
        pid = os.fork()
        if pid == 0:
            os._exit(run_rank(job, rank))
        children[pid] = rank
    codes = [0] * len(children)
    while children:
        pid, status = os.wait()
        if pid not in children:
            continue
        codes[children.pop(pid)] = os.waitstatus_to_exitcode(status)
        if status != 0:
            for other in children:
                os.kill(other, 9)
    return codes


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed on the way is no answer
    load_everything()
    for line in sys.stdin:
        print(json.dumps(run_job(json.loads(line))), file=answers, flush=True)
