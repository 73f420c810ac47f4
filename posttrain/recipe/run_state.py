"""A run's folder: whose it is, and how far the run has come."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from posttrain.errors import RecipeError
from posttrain.recipe.schema import ModelConfig
from posttrain.training.record import write_json

STATE = "state.json"
LOCK = "lock"
FORMAT = 1


@dataclass(frozen=True)
class FinishedStage:
    """A stage that is done: the model it handed on, what it has to say, and the seconds it took."""

    stage: str
    kind: str
    model: ModelConfig
    summary: dict[str, Any]
    seconds: float


@dataclass
class RunState:
    """`state.json`: the finished stages of a run, and the folder that its recipe's paths start from."""

    directory: str
    stages: list[FinishedStage] = field(default_factory=list)
    finished: bool = False

    @classmethod
    def read(cls, run_dir: Path) -> RunState:
        """The state of the run in a folder.

        Raises:
            RecipeError: there is none, or it cannot be read.
        """
        path = run_dir / STATE
        if not path.is_file():
            raise RecipeError(f"{run_dir} is not the folder of a run that can be resumed: it has no {STATE}")
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
            stages = [
                FinishedStage(**{**stage, "model": ModelConfig.model_validate(stage["model"])})
                for stage in content["stages"]
            ]
            return cls(content["directory"], stages, content["finished"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecipeError(f"{path} cannot be read: {error}") from None

    def write(self, run_dir: Path) -> None:
        """Write the state as a whole."""
        stages = [{**asdict(stage), "model": stage.model.model_dump(by_alias=True)} for stage in self.stages]
        content = {"directory": self.directory, "finished": self.finished, "stages": stages}
        write_json(run_dir / STATE, {"format": FORMAT, **content})


class RunLock:
    """Keeps a second process away from a run folder. The lock of a process that has ended is none."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            RecipeError: another process works in the folder, whose PID is given, or it cannot be locked.
        """
        try:
            file = (self.run_dir / LOCK).open("a+")
            # A POSIX lock: unlike flock's it is not inherited by forked children that may outlive us.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip()
            file.close()
            raise RecipeError(f"run folder {self.run_dir} is in use by process {owner}") from None
        except OSError as error:
            raise RecipeError(f"run folder {self.run_dir} cannot be locked: {error.strerror}") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        self._file = file

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()


def check_folder(run_dir: Path, *, overwrite: bool) -> list[Path]:
    """What is in the way of a new run in a folder, and may be removed.

    Raises:
        RecipeError: the folder exists and `overwrite` is off, or it is not a run's.
    """
    content = [path for path in run_dir.iterdir() if path.name != LOCK] if run_dir.exists() else []
    if content and not overwrite:
        raise RecipeError(
            f"run folder {run_dir} exists already; `posttrain resume {run_dir}` goes on with it, --overwrite "
            f"replaces it, name=… gives the run another"
        )
    if content and not (run_dir / "recipe.yaml").is_file():
        raise RecipeError(f"{run_dir} is not the folder of a run; it is not overwritten")
    return content


def make_folder(run_dir: Path, lock: RunLock, *, overwrite: bool) -> None:
    """An empty folder for a new run, with our lock in it.

    Raises:
        RecipeError: it exists and `overwrite` is off, is not a run's folder, or is in use.
    """
    content = check_folder(run_dir, overwrite=overwrite)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"run folder {run_dir} cannot be made: {error.strerror}") from None
    lock.acquire()
    for path in content:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
