"""Folders that are either complete or not there: files with hashes, forced to disk, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1
STAGING = ".writing"
"""Folder beside the finished ones where one is written; what a kill leaves there is deleted."""


def checkpoint_name(step: int) -> str:
    """`step-000012`."""
    return f"step-{step:06d}"


def checkpoint_step(checkpoint: Path) -> int:
    """The optimiser step that a checkpoint was written after."""
    return int(checkpoint.name.removeprefix("step-"))


def write_manifest(folder: Path, **about: Any) -> None:
    """List every file below `folder` with size and SHA-256 in `manifest.json`, beside what `about` says."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    content = {"format": FORMAT, **about, "files": files}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Check a folder against its manifest and return it.

    Raises:
        ValueError: a file is missing or differs; the text names it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files, version = manifest["files"], manifest["format"]
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{MANIFEST} cannot be read") from None
    if version != FORMAT:
        raise ValueError(f"{MANIFEST} has format {version}, this version reads {FORMAT}")
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != expected["size"]:
            raise ValueError(f"{name} has {path.stat().st_size} bytes instead of {expected['size']}")
        if _digest(path) != expected["sha256"]:
            raise ValueError(f"{name} is not what was written: its SHA-256 differs")
    return manifest


def find_checkpoint(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint in `folder` that is what was written, or None.

    A damaged one is reported, in one line, and the one before is tried. What an interrupted write has left is
    deleted.
    """
    shutil.rmtree(folder / STAGING, ignore_errors=True)
    for _, checkpoint in reversed(_checkpoints(folder)):
        try:
            read_manifest(checkpoint)
        except ValueError as problem:
            report(f"checkpoint {checkpoint} is damaged and not used: {problem}")
        else:
            return checkpoint
    return None


def publish(staged: Path, target: Path) -> None:
    """Force a folder to disk and give it its final name, in place of one that was there."""
    folders = [staged]
    for path in staged.rglob("*"):
        if path.is_dir():
            folders.append(path)
        else:
            _sync(path)
    for folder in reversed(folders):
        _sync(folder)
    if target.exists():
        shutil.rmtree(target)
    staged.rename(target)
    _sync(target.parent)


def remove_older(folder: Path, step: int, keep: int) -> None:
    """Keep the newest `keep` checkpoints up to that of `step`; later ones are an abandoned attempt's."""
    ours = [path for number, path in _checkpoints(folder) if number <= step]
    for path in ours[:-keep]:
        doomed = folder / STAGING / path.name  # so that a kill leaves no half of a checkpoint under its name
        doomed.parent.mkdir(exist_ok=True)
        path.rename(doomed)
    shutil.rmtree(folder / STAGING, ignore_errors=True)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    return sorted((checkpoint_step(path), path) for path in folder.glob("step-*"))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
