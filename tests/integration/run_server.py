"""Runs the command line in forks of one process that has imported everything, so that a run starts at once.

Standard input has one job a line, as JSON: `arguments` of the command line, the working directory `folder`, a
file for the `output`, and optionally `trigger`: at which call of which function, and how long after its
start, the process sends itself which signal. A job is answered by two lines: the process, as `{"pid": …}`,
and when it has ended `{"code": …, "spans": …}`, with the seconds of every call of those functions.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def points() -> dict[str, tuple[type, str]]:
    """What a run does, by name: functions that are called once each time it does it."""
    from accelerate import Accelerator
    from transformers import Trainer

    from posttrain.rewards.scorer import Scorer
    from posttrain.rollout.transformers import TransformersEngine
    from posttrain.training.checkpoint import Checkpointer

    return {
        "generate": (TransformersEngine, "generate"),
        "score": (Scorer, "score"),
        "backward": (Accelerator, "backward"),
        "save": (Trainer, "save_model"),
        "publish": (Checkpointer, "on_save"),
    }


def watch(name: str, owner: type, attribute: str, spans: dict[str, list[float]], trigger: Any) -> None:
    """Record how long the calls of a function take, and pull the trigger in the one that it names."""
    original: Callable[..., Any] = getattr(owner, attribute)

    def watched(*args: Any, **kwargs: Any) -> Any:
        taken = spans.setdefault(name, [])
        if trigger and trigger["point"] == name and len(taken) == trigger["call"]:
            if trigger["delay"]:
                threading.Timer(trigger["delay"], os.kill, (os.getpid(), trigger["signal"])).start()
            else:
                for _ in range(trigger.get("times", 1)):
                    os.kill(os.getpid(), trigger["signal"])
        started = time.monotonic()
        try:
            return original(*args, **kwargs)
        finally:
            taken.append(time.monotonic() - started)

    setattr(owner, attribute, watched)


def run_job(job: dict[str, Any], report: int) -> int:
    """The life of one run, in a process of its own: returns its exit code."""
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(job["folder"])
    spans: dict[str, list[float]] = {}
    for name, (owner, attribute) in points().items():
        watch(name, owner, attribute, spans, job.get("trigger"))
    from posttrain.cli import main

    try:
        return main(job["arguments"])
    except BaseException:
        traceback.print_exc()
        return 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(report, json.dumps(spans).encode())


def serve() -> None:
    import peft
    import trl
    from transformers import Qwen2ForCausalLM

    import posttrain.recipe.run
    import posttrain.stages.annotate_preferences
    import posttrain.stages.evaluate
    import posttrain.stages.policy
    import posttrain.stages.sft  # noqa: F401

    assert all((peft, trl.SFTTrainer, Qwen2ForCausalLM, points()))
    for line in sys.stdin:
        job = json.loads(line)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os._exit(run_job(job, writing))
        os.close(writing)
        print(json.dumps({"pid": pid}), flush=True)
        with os.fdopen(reading) as pipe:
            spans = json.loads(pipe.read() or "{}")
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"code": code, "spans": spans}), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    serve()
