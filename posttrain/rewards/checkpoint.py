"""The files of a reward model: where they are, what they hold, and which they are exactly.

Nothing heavy is imported: recipes are checked with this, and workers find their server by it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from posttrain.errors import RewardError
from posttrain.recipe.rewards_schema import RewardModelConfig

Head = Literal["sequence", "token"]

HEADS: dict[str, Head] = {"ForSequenceClassification": "sequence", "ForTokenClassification": "token"}
"""Ends of the architectures' names."""
_SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py")
_OTHER = (
    "training_args.bin",
    "trainer_state.json",
    "optimizer.bin",
    "scheduler.bin",
    "generation_config.json",
)
"""Files in checkpoints that no score depends on."""
_SCORED_BY = {
    "template",
    "head",
    "label",
    "activation",
    "step_separator",
    "step_reduce",
    "dtype",
    "max_length",
}
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a model, and the commit it is where it comes from the hub."""

    folder: Path
    commit: str | None = None

    def files(self) -> list[Path]:
        """Everything that scores depend on: weights, configuration, tokenizer, code, by name."""
        found = [path for path in self.folder.iterdir() if path.suffix in _SUFFIXES and path.is_file()]
        return sorted(path for path in found if path.name not in _OTHER)

    def stamp(self) -> list[tuple[str, int, int]]:
        """Name, size and time of every file: changes when one of them is written."""
        return [(path.name, (at := path.stat()).st_size, at.st_mtime_ns) for path in self.files()]

    def sha256(self) -> str:
        """One hash for all files: that of the lines that `sha256sum` prints for them.

        Each file is read once by a process while size and time stay the same, and not at all in the hub's
        cache, where large files are stored under their hash.
        """
        lines = [f"{_hash_of(path)}  {path.name}\n" for path in self.files()]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def version(self, config: RewardModelConfig) -> str:
        """The commit or `local`, and a hash of the settings that scores depend on besides the files."""
        settings = config.model_dump(mode="json", include=_SCORED_BY)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return f"{self.commit or 'local'}+{digest[:8]}"

    def config(self) -> dict[str, Any]:
        """What config.json says.

        Raises:
            RewardError: there is none, or it is no JSON object.
        """
        path = self.folder / "config.json"
        if not path.is_file():
            raise RewardError(f"{self.folder} has no config.json, so it is no model")
        try:
            config = json.loads(path.read_bytes())
        except ValueError:
            config = None
        if not isinstance(config, dict):
            raise RewardError(f"{path} is not a JSON object")
        return config

    def head(self, wanted: Literal["auto", "sequence", "token"] = "auto") -> Head:
        """What the model gives: one score for a text, or one for every token.

        Raises:
            RewardError: its configuration says neither, and `wanted` is `auto`.
        """
        config = self.config()
        if wanted != "auto":
            return wanted
        names = [*(config.get("architectures") or ()), *(config.get("auto_map") or ())]
        for name in names:
            for end, head in HEADS.items():
                if str(name).endswith(end):
                    return head
        found = ", ".join(map(str, names)) or "an unknown architecture"
        raise RewardError(
            f"{self.folder} is {found}; a reward model is a sequence or token classification checkpoint"
        )


def find_checkpoint(config: RewardModelConfig, download: bool = True) -> Checkpoint:
    """The folder of a reward model; one of the hub is downloaded into the hub's cache, unless it is there.

    Raises:
        RewardError: there is no such folder, and the hub or, without `download`, its cache does not have it.
    """
    assert config.path is not None
    folder = Path(config.path).expanduser()
    if folder.is_dir():
        return Checkpoint(folder.resolve())
    from huggingface_hub import snapshot_download

    def fetch(*suffixes: str) -> Path:
        return Path(
            snapshot_download(
                str(config.path),
                revision=config.revision,
                allow_patterns=[f"*{suffix}" for suffix in suffixes],
                ignore_patterns=["*/*"],
                local_files_only=not download,
            )
        )

    try:
        snapshot = fetch(*(suffix for suffix in _SUFFIXES if suffix != ".bin"))
        if not list(snapshot.glob("*.safetensors")):
            snapshot = fetch(".bin")
    except Exception as error:  # there is no such repository, no network, no permission, no disk space
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RewardError(f"there is no folder {config.path}, and the hub does not give it: {why}") from error
    return Checkpoint(snapshot, snapshot.name)


def _hash_of(path: Path) -> str:
    blob = path.resolve()
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name
    status = path.stat()
    return _read_hash(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _read_hash(path: Path, size: int, time: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
