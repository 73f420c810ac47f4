"""The command line in forks of one process that has imported everything: see `run_server.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Ended:
    """A run that has come to an end."""

    code: int
    output: str
    spans: dict[str, list[float]] = field(default_factory=dict)


class RunServer:
    """The process that forks runs, and the folder they work in."""

    def __init__(self, folder: Path):
        self.folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        script = Path(__file__).with_name("run_server.py")
        self.process = subprocess.Popen(
            [sys.executable, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(
        self, *arguments: str, trigger: dict[str, Any] | None = None, folder: Path | None = None
    ) -> Ended:
        output = self.folder / "output.txt"
        output.write_text("")
        where = str(folder or self.folder)
        job = {"arguments": arguments, "folder": where, "output": str(output), "trigger": trigger}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        self.process.stdout.readline()
        answer = json.loads(self.process.stdout.readline())
        return Ended(answer["code"], output.read_text(), answer["spans"])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)
