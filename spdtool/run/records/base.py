"""What the records of several files share: the base class, files by digest, rows and machines."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Scores = dict[str, float]
"""Metric to value in [-1, 1]; the headline of the task stands under `score`."""
Cell = str | int | float | None
"""One cell of a table, before it is formatted."""
Role = Literal["teacher", "student"]


class Record(BaseModel):
    """Base of all records."""

    model_config = ConfigDict(validate_assignment=True)  # results are filled in while a stage runs


class FileRecord(Record):
    """One file of a finished stage, its path relative to the stage's folder."""

    path: str
    size: int
    sha256: str


class DataRecord(Record):
    """The rows that a stage worked on.

    Attributes:
        rows: number of rows by split.
        digest: of texts, labels and order of all rows with labels.
        unlabeled: of the texts without labels; None where the stage read none.
    """

    rows: dict[str, int]
    digest: str
    unlabeled: str | None = None

    def agrees(self, other: DataRecord) -> bool:
        """Tell whether another stage read the same rows; one of them may have had nothing to do with the unlabelled."""
        if None in (self.unlabeled, other.unlabeled):
            return self.digest == other.digest
        return (self.digest, self.unlabeled) == (other.digest, other.unlabeled)


class MachineRecord(Record):
    """Where a stage ran.

    Attributes:
        cpus: that this process may use.
        versions: of the installed packages that influence results.
        training_threads, arithmetic: of a training stage: number of threads, and hash of the last
            bits of a fixed calculation, see `models.arithmetic`.
        precision: in which a training stage computed: fp32, bf16 or fp16.
        device: on which it was trained, such as `cpu` or `NVIDIA H200`.
    """

    python: str
    system: str
    cpus: int | None
    versions: dict[str, str]
    training_threads: int | None = None
    arithmetic: str | None = None
    precision: str | None = None
    device: str | None = None

    def lines(self) -> list[tuple[str, str]]:
        """Describe the machine as names and texts."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return [("python", self.python), ("system", self.system), ("cpus", str(self.cpus)), ("versions", versions)]


class FileDigest(Record):
    """Size and sha256 of a file of a bundle."""

    bytes: int
    sha256: str


class LibraryRecord(Record):
    """Library of custom operators that a model needs, and the distribution that builds it."""

    model_config = ConfigDict(extra="allow")  # a plugin may say more of its library

    file: str | None = None
    distribution: str | None = None
    version: str | None = None
    platform: str | None = None
