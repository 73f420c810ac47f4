"""A folder of verified meta-experiences: parquet files that say where each comes from, each of them once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from posttrain.errors import DataError
from posttrain.rollout.types import derive_seed
from posttrain.training.record import replacing


@dataclass(frozen=True)
class Experience:
    """A verified meta-experience and its provenance.

    `problem`, `wrong` and `right` are what it was made from, `sections` its parts; `passes` of `replays`
    solutions with it in context were right, `base_rate` of those without. `leaks` says whether it contains
    the answer.
    """

    fingerprint: int
    text: str
    sections: list[str]
    example_id: str
    problem: str
    answer: str | None
    wrong: str
    right: str
    wrong_id: str
    right_id: str
    step: int
    policy_version: int
    passes: int
    replays: int
    base_rate: float
    leaks: bool


class ExperienceStore:
    """Writes meta-experiences that are not there yet; `known` are the fingerprints of those that are.

    Every call of `add` writes a file of its own, named after the step and what is in it: a step that is done
    again after a restart writes the same files.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        self.known: set[int] | None = None

    def new(self, fingerprints: Iterable[int]) -> set[int]:
        """Those that the store has not.

        Raises:
            DataError: a file in the folder is no file of a store.
        """
        if self.known is None:
            self.known = {row.fingerprint for row in read_experiences(self.folder)}
        return set(fingerprints) - self.known

    def add(self, experiences: Sequence[Experience]) -> None:
        """Write some that are new to the store."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not experiences:
            return
        step, name = experiences[0].step, derive_seed(*(one.fingerprint for one in experiences))
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / f"step-{step:06d}-{name:016x}.parquet") as file:
            pq.write_table(pa.Table.from_pylist([asdict(one) for one in experiences]), file)


def read_experiences(folder: str | Path) -> list[Experience]:
    """Everything that is in a store, in the order of the steps; nothing where there is no folder.

    Raises:
        DataError: a file in the folder is no file of a store.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    found: list[Experience] = []
    for path in sorted(Path(folder).expanduser().glob("*.parquet")):
        try:
            found += [Experience(**row) for row in pq.read_table(path).to_pylist()]
        except (TypeError, pa.ArrowInvalid) as error:
            raise DataError(f"{path} is no file of a store of meta-experiences: {error}") from None
    return found
