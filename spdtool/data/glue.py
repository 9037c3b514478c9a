"""The nine GLUE tasks (Wang et al., 2018, arXiv 1804.07461) as one table, read from the hub or from the official files.

Label names and their order are those of `nyu-mll/glue` on the hub, so that a teacher fine-tuned elsewhere fits. The
test sets are never read: their labels are not public.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spdtool import console
from spdtool.data.dataset import Dataset, Rows, plain_name
from spdtool.data.files import Table, read_tsv
from spdtool.errors import DataError
from spdtool.plugins import datasets

HUB = "nyu-mll/glue"
ENTAILMENT = ("entailment", "not_entailment")


@dataclass(frozen=True)
class Glue:
    """One GLUE task: what its labels and metrics are, and where its columns stand.

    Attributes:
        folder: the folder of the official files.
        text, label: names of the columns in the official files.
        hub_text: names of the text columns on the hub, where the label column is always `label`.
        labels: names by index; empty for regression.
        spelt: whether the official files spell labels by name; else they hold the index.
        header: names of the columns where the official files have no header row.
        dev: `(split, official file, split on the hub)` of each dev set.
        short: the share of rows with missing fields that the official files may hold; the hub leaves them out too.
    """

    about: str
    folder: str
    text: tuple[str, ...]
    hub_text: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    label: str = "label"
    spelt: bool = False
    header: tuple[str, ...] | None = None
    dev: tuple[tuple[str, str, str], ...] = (("dev", "dev.tsv", "validation"),)
    short: float = 0.0

    def index(self, label: str) -> int | float:
        """The label of an official file as the number that it stands for; raises ValueError if it is none of them."""
        if not self.labels:
            score = float(label)
            if not math.isfinite(score):
                raise ValueError(label)
            return score
        return self.labels.index(label) if self.spelt else [str(i) for i in range(len(self.labels))].index(label)


GLUE = {
    "cola": Glue(
        about="is the sentence acceptable English",
        folder="CoLA",
        text=("sentence",),
        hub_text=("sentence",),
        labels=("unacceptable", "acceptable"),
        metrics=("matthews",),
        header=("source", "label", "star", "sentence"),
    ),
    "sst2": Glue(
        about="sentiment of a film review's phrase",
        folder="SST-2",
        text=("sentence",),
        hub_text=("sentence",),
        labels=("negative", "positive"),
    ),
    "mrpc": Glue(
        about="do two sentences from the news say the same",
        folder="MRPC",
        text=("#1 String", "#2 String"),
        hub_text=("sentence1", "sentence2"),
        labels=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
        label="Quality",
    ),
    "stsb": Glue(
        about="how alike two sentences are, from 0 to 5",
        folder="STS-B",
        text=("sentence1", "sentence2"),
        hub_text=("sentence1", "sentence2"),
        labels=(),
        metrics=("pearson", "spearman"),
        label="score",
    ),
    "qqp": Glue(
        about="do two questions ask the same",
        folder="QQP",
        text=("question1", "question2"),
        hub_text=("question1", "question2"),
        labels=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
        label="is_duplicate",
        short=0.001,
    ),
    "mnli": Glue(
        about="does the premise entail the hypothesis, contradict it, or neither; with both dev sets",
        folder="MNLI",
        text=("sentence1", "sentence2"),
        hub_text=("premise", "hypothesis"),
        labels=("entailment", "neutral", "contradiction"),
        label="gold_label",
        spelt=True,
        dev=(
            ("dev", "dev_matched.tsv", "validation_matched"),
            ("dev_mm", "dev_mismatched.tsv", "validation_mismatched"),
        ),
    ),
    "qnli": Glue(
        about="does the sentence answer the question",
        folder="QNLI",
        text=("question", "sentence"),
        hub_text=("question", "sentence"),
        labels=ENTAILMENT,
        spelt=True,
    ),
    "rte": Glue(
        about="does the text entail the hypothesis",
        folder="RTE",
        text=("sentence1", "sentence2"),
        hub_text=("sentence1", "sentence2"),
        labels=ENTAILMENT,
        spelt=True,
    ),
    "wnli": Glue(
        about="does the sentence follow when its pronoun is resolved",
        folder="WNLI",
        text=("sentence1", "sentence2"),
        hub_text=("sentence1", "sentence2"),
        labels=("not_entailment", "entailment"),
    ),
}


def load_glue(name: str, data: str | None) -> dict[str, Rows]:
    """The splits `train` and `dev` (for mnli also `dev_mm`) of the GLUE task `name`.

    Args:
        data: the task's folder of official files, or the folder that holds it; None: the hub.

    Raises:
        DataError: the files or the hub cannot be read, or hold something else than this task.
    """
    return from_hub(name) if data is None else from_folder(name, Path(data))


def from_folder(name: str, folder: Path) -> dict[str, Rows]:
    """The splits of `name` from its official TSV files; raises as `load_glue` does."""
    glue = GLUE[name]
    files = {"train": "train.tsv"} | {split: file for split, file, _ in glue.dev}
    found = _task_folder(glue, folder, tuple(files.values()))
    return {split: from_tsv(name, found / file) for split, file in files.items()}


def from_tsv(name: str, path: Path) -> Rows:
    """The rows of one official file of `name`, in its order; raises as `load_glue` does."""
    glue = GLUE[name]
    if not path.is_file():
        raise DataError(f"{path} is missing", f"the official files of {name} are train.tsv and {_dev_files(glue)}")
    table = read_tsv(path, glue.header, short=glue.short)
    for column in (*glue.text, glue.label):
        if column not in table.columns:
            raise DataError(
                f"{path} has no column {column!r}, which {name} needs; it has {', '.join(map(repr, table.columns))}",
                "is this the folder of another task?",
            )
    text = [table.column(column) for column in glue.text]
    return Rows(text[0], text[1] if len(text) == 2 else None, _labels(name, table))


def from_hub(name: str) -> dict[str, Rows]:
    """The splits of `name` from the hub; raises as `load_glue` does."""
    glue = GLUE[name]
    try:
        from datasets import load_dataset

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it announces every retry
        with console.busy(f"reading {HUB} ({name}) from the hub or its cache"):
            source: Any = load_dataset(HUB, name)
        splits = {"train": source["train"]} | {split: source[theirs] for split, _, theirs in glue.dev}
        columns = {
            split: [list(rows[column][:]) for column in (*glue.hub_text, "label")] for split, rows in splits.items()
        }
    except Exception as error:  # the hub's client raises whatever its transport and its caches do
        reason = (str(error).strip() or "no reason given").split("\n")[0]
        raise DataError(
            f"{HUB} ({name}) could not be loaded from the hub: {type(error).__name__}: {reason}",
            f"with the official files at hand, give --data FOLDER, a folder with {glue.folder}/train.tsv",
        ) from None
    for split, (*_, labels) in columns.items():
        strange = set(labels) - set(range(len(glue.labels))) if glue.labels else set()
        if strange:
            raise DataError(f"{HUB} ({name}) has the labels {sorted(strange)} in {split}, which are not known")
    return {split: Rows(text[0], text[1] if len(text) == 2 else None, y) for split, (*text, y) in columns.items()}


def _task_folder(glue: Glue, folder: Path, files: tuple[str, ...]) -> Path:
    """`folder` itself or the folder in it that is named as the task is."""
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {problem}", f"give a folder with {' and '.join(files)}")
    inside = sorted(
        path for path in folder.iterdir() if path.is_dir() and plain_name(path.name) == plain_name(glue.folder)
    )
    found = next((path for path in (folder, *inside) if (path / "train.tsv").is_file()), None)
    if found is None:
        raise DataError(
            f"{folder} has no train.tsv; looked for train.tsv and {glue.folder}/train.tsv",
            f"the official files are {' and '.join(files)}",
        )
    return found


def _labels(name: str, table: Table) -> list[int] | list[float]:
    glue = GLUE[name]
    labels: list[Any] = []
    for row, label in enumerate(table.column(glue.label)):
        try:
            labels.append(glue.index(label))
        except ValueError:
            known = glue.labels if glue.spelt else [str(i) for i in range(len(glue.labels))]
            table.refuse(
                row,
                f"the label {label!r} is none of {name}'s",
                f"known: {', '.join(known)}" if glue.labels else "a finite number was expected",
            )
    return labels


def _dev_files(glue: Glue) -> str:
    return " and ".join(file for _, file, _ in glue.dev)


for _name, _glue in GLUE.items():
    datasets.register(_name)(
        Dataset(
            name=_name,
            kind="classification" if _glue.labels else "regression",
            text=_glue.hub_text,
            labels=_glue.labels,
            metrics=_glue.metrics,
            load=lambda data, seed, name=_name: load_glue(name, data),  # type: ignore[misc]  # noqa: ARG005
            about=_glue.about,
        )
    )
