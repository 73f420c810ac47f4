"""Who uses the shared server of a reward model, and when it may go: file locks in a private folder.

    lease    shared by every process that uses the server; when the server gets it for itself, nobody does
    server   the server's, from before it loads the model until it is gone, so there is never a second one
    start    that of the process which starts it
    socket   where it answers; who removes it asks it to end

The locks are those of `flock`: the system lets them go when their process ends, whatever ends it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import posttrain
from posttrain.errors import RewardError
from posttrain.recipe.rewards_schema import RewardModelConfig
from posttrain.rewards.checkpoint import Checkpoint

LOOK_SECONDS = 0.2
"""Between two looks at a lock or socket."""
LONGEST_SOCKET = 100
"""Bytes of a socket's path; systems allow 104 to 108."""
_NOT_THE_SERVERS = ("range", "token_env")
"""Settings that make no difference to a server."""


class Room:
    """The folder of one shared server."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def of(cls, config: RewardModelConfig, checkpoint: Checkpoint) -> Room:
        """The folder of a model's server: the same for all processes of this user with equal settings and
        files.

        Raises:
            RewardError: it is not this user's alone, or its path is too long.
        """
        settings = {k: v for k, v in config.model_dump(mode="json").items() if k not in _NOT_THE_SERVERS}
        settings["path"] = str(checkpoint.folder)
        key = json.dumps([posttrain.__version__, settings, checkpoint.stamp()], sort_keys=True)
        base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
        base = base if os.access(base, os.W_OK) else tempfile.gettempdir()
        parent = _private(Path(base) / f"posttrain-{os.getuid()}")
        room = cls(_private(parent / hashlib.sha256(key.encode()).hexdigest()[:16]))
        if len(os.fsencode(room.socket)) > LONGEST_SOCKET:
            raise RewardError(f"{room.socket} is too long for a socket; set TMPDIR to a shorter folder")
        return room

    @property
    def socket(self) -> Path:
        """Where the server answers."""
        return self.folder / "socket"

    @property
    def log(self) -> Path:
        """What the server prints, where it has no better place."""
        return self.folder / "server.log"

    def lease(self, check: Callable[[], None]) -> int:
        """Become a user of the server; returns the open file to give to `leave`."""
        return _wait_for(self.folder / "lease", fcntl.LOCK_SH, check)

    @contextmanager
    def starting(self, check: Callable[[], None]) -> Iterator[None]:
        """Be the only one who starts the server."""
        file = _wait_for(self.folder / "start", fcntl.LOCK_EX, check)
        try:
            yield
        finally:
            os.close(file)

    def leave(self, lease: int, seconds: float) -> None:
        """Stop using the server. If nobody else does, it is asked to end and waited for."""
        os.close(lease)
        alone = _take(self.folder / "lease", fcntl.LOCK_EX)
        if alone is None:
            return
        self.socket.unlink(missing_ok=True)
        os.close(alone)
        deadline = time.monotonic() + seconds
        while self.occupied() and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS / 4)

    def occupied(self) -> bool:
        """Whether there is a server: loading, answering or about to end."""
        file = self.move_in()
        if file is not None:
            os.close(file)
        return file is None

    def move_in(self) -> int | None:
        """Become the server: an open file that has to stay open, or None if there is one."""
        return _take(self.folder / "server", fcntl.LOCK_EX)


class Vigil:
    """A server's looking out for the end of its use; see `over`."""

    def __init__(self, room: Room, idle: float):
        self._room = room
        self._idle = idle
        self._used = time.monotonic()

    def over(self) -> bool:
        """Whether the server has to end, as its socket was removed or nobody has used it for `idle` seconds.

        In the second case nobody can become a user until the process is gone.
        """
        if not self._room.socket.exists():
            return True
        lease = _take(self._room.folder / "lease", fcntl.LOCK_EX)
        if lease is None:
            self._used = time.monotonic()
            return False
        if time.monotonic() - self._used > self._idle:
            self._room.socket.unlink(missing_ok=True)
            return True
        os.close(lease)
        return False


def _take(path: Path, kind: int) -> int | None:
    """The open file with a lock of a kind; None if someone has one that excludes it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file


def _wait_for(path: Path, kind: int, check: Callable[[], None]) -> int:
    while (file := _take(path, kind)) is None:
        check()
        time.sleep(LOOK_SECONDS / 4)
    return file


def _private(folder: Path) -> Path:
    """Make a folder that nobody else can look into, or make sure that it is one."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise RewardError(f"{folder} has to be a folder of this user that nobody else can look into")
    return folder
