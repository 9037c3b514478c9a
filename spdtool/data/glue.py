"""The nine GLUE tasks (Wang et al., 2018, arXiv 1804.07461) as one table, read from the hub or from the official files.

Label names and their order are those of `nyu-mll/glue` on the hub, so that a teacher fine-tuned elsewhere fits. The
test sets are never read: their labels are not public.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spdtool import console
from spdtool.data.dataset import Dataset, Rows, plain_name
from spdtool.data.formats.separated import read_tsv
from spdtool.data.formats.table import Table
from spdtool.errors import DataError
from spdtool.plugins import datasets

HUB = "nyu-mll/glue"
ENTAILMENT = ("entailment", "not_entailment")


@dataclass(frozen=True)
class GlueTask:
    """One GLUE task: its labels and metrics, and the names of its files and columns.

    Attributes:
        about: one line for listings.
        folder: the folder of the official files.
        text: names of the text columns in the official files.
        hub_text: names of the text columns on the hub, where the label column is always `label`.
        labels: names by index; empty for regression.
        metrics: see `Dataset.metrics`.
        label: name of the label column in the official files.
        labels_by_name: whether the official files have labels by name; else they have the index.
        header: names of the columns where the official files have no header row.
        dev: `(split, official file, split on the hub)` of each dev set.
        short_rows: the share of rows with missing fields that the official files may have; the hub omits them too.
    """

    about: str
    folder: str
    text: tuple[str, ...]
    hub_text: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    label: str = "label"
    labels_by_name: bool = False
    header: tuple[str, ...] | None = None
    dev: tuple[tuple[str, str, str], ...] = (("dev", "dev.tsv", "validation"),)
    short_rows: float = 0.0

    @property
    def label_spellings(self) -> tuple[str, ...]:
        """The labels as the official files write them, by index."""
        if self.labels_by_name:
            return self.labels
        return tuple(map(str, range(len(self.labels))))


GLUE = {
    "cola": GlueTask(
        about="is the sentence acceptable English",
        folder="CoLA",
        text=("sentence",),
        hub_text=("sentence",),
        labels=("unacceptable", "acceptable"),
        metrics=("matthews",),
        header=("source", "label", "star", "sentence"),
    ),
    "sst2": GlueTask(
        about="sentiment of a film review's phrase",
        folder="SST-2",
        text=("sentence",),
        hub_text=("sentence",),
        labels=("negative", "positive"),
    ),
    "mrpc": GlueTask(
        about="do two sentences from the news say the same",
        folder="MRPC",
        text=("#1 String", "#2 String"),
        hub_text=("sentence1", "sentence2"),
        labels=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
        label="Quality",
    ),
    "stsb": GlueTask(
        about="how alike two sentences are, from 0 to 5",
        folder="STS-B",
        text=("sentence1", "sentence2"),
        hub_text=("sentence1", "sentence2"),
        labels=(),
        metrics=("pearson", "spearman"),
        label="score",
    ),
    "qqp": GlueTask(
        about="do two questions ask the same",
        folder="QQP",
        text=("question1", "question2"),
        hub_text=("question1", "question2"),
        labels=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
        label="is_duplicate",
        short_rows=0.001,  # the published file has rows that are cut off
    ),
    "mnli": GlueTask(
        about="does the premise entail the hypothesis, contradict it, or neither; with both dev sets",
        folder="MNLI",
        text=("sentence1", "sentence2"),
        hub_text=("premise", "hypothesis"),
        labels=("entailment", "neutral", "contradiction"),
        label="gold_label",
        labels_by_name=True,
        dev=(
            ("dev", "dev_matched.tsv", "validation_matched"),
            ("dev_mm", "dev_mismatched.tsv", "validation_mismatched"),
        ),
    ),
    "qnli": GlueTask(
        about="does the sentence answer the question",
        folder="QNLI",
        text=("question", "sentence"),
        hub_text=("question", "sentence"),
        labels=ENTAILMENT,
        labels_by_name=True,
    ),
    "rte": GlueTask(
        about="does the text entail the hypothesis",
        folder="RTE",
        text=("sentence1", "sentence2"),
        hub_text=("sentence1", "sentence2"),
        labels=ENTAILMENT,
        labels_by_name=True,
    ),
    "wnli": GlueTask(
        about="does the sentence follow when its pronoun is resolved",
        folder="WNLI",
        text=("sentence1", "sentence2"),
        hub_text=("sentence1", "sentence2"),
        labels=("not_entailment", "entailment"),
    ),
}


def load_glue(name: str, data: str | None) -> dict[str, Rows]:
    """Load the splits `train` and `dev` (for mnli also `dev_mm`) of the GLUE task `name`.

    Args:
        name: key of `GLUE`.
        data: the task's folder of official files, or the folder that holds it; None: the hub.

    Raises:
        DataError: the files or the hub cannot be read, or hold something else than this task.
    """
    return load_from_hub(name) if data is None else load_from_folder(name, Path(data))


def load_from_folder(name: str, folder: Path) -> dict[str, Rows]:
    """Load the splits of `name` from its official TSV files; raises as `load_glue` does."""
    task = GLUE[name]
    files = {"train": "train.tsv"}
    for split, file, _ in task.dev:
        files[split] = file
    task_folder = _find_task_folder(task, folder, " and ".join(files.values()))
    return {split: read_official_file(name, task_folder / file) for split, file in files.items()}


def read_official_file(name: str, path: Path) -> Rows:
    """Read one official file of `name`; raises as `load_glue` does."""
    task = GLUE[name]
    if not path.is_file():
        files = " and ".join(["train.tsv", *(file for _, file, _ in task.dev)])
        raise DataError(f"{path} is missing", f"the official files of {name} are {files}")
    table = read_tsv(path, task.header, tolerated_short_rows=task.short_rows)
    for column in (*task.text, task.label):
        if column not in table.columns:
            raise DataError(
                f"{path} has no column {column!r}, which {name} needs; it has {', '.join(map(repr, table.columns))}",
                "is this the folder of another task?",
            )
    texts = [list(map(str, table.column(column))) for column in task.text]
    return _make_rows(texts, _read_labels(name, table))


def _read_labels(name: str, table: Table) -> list[int] | list[float]:
    task = GLUE[name]
    if not task.labels:
        return _read_scores(name, table)
    labels = []
    for row, cell in enumerate(table.column(task.label)):
        if cell not in task.label_spellings:
            table.refuse(row, f"the label {cell!r} is none of {name}'s", f"known: {', '.join(task.label_spellings)}")
        labels.append(task.label_spellings.index(cell))
    return labels


def _read_scores(name: str, table: Table) -> list[float]:
    scores = []
    for row, cell in enumerate(table.column(GLUE[name].label)):
        try:
            score = float(str(cell))
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            table.refuse(row, f"the label {cell!r} is none of {name}'s", "a finite number was expected")
        scores.append(score)
    return scores


def load_from_hub(name: str) -> dict[str, Rows]:
    """Load the splits of `name` from the hub; raises as `load_glue` does."""
    task = GLUE[name]
    hub_splits = {"train": "train"}
    for split, _, hub_split in task.dev:
        hub_splits[split] = hub_split
    columns: dict[str, list[list[Any]]] = {}
    try:
        from datasets import load_dataset

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it announces every retry
        with console.busy(f"reading {HUB} ({name}) from the hub or its cache"):
            source = load_dataset(HUB, name)
        for split, hub_split in hub_splits.items():
            rows = source[hub_split]
            columns[split] = [list(rows[column][:]) for column in (*task.hub_text, "label")]
    except Exception as error:  # the hub's client raises whatever its transport and its caches do
        reason = (str(error).strip() or "no reason given").split("\n")[0]
        raise DataError(
            f"{HUB} ({name}) could not be loaded from the hub: {type(error).__name__}: {reason}",
            f"with the official files at hand, give --data FOLDER, a folder with {task.folder}/train.tsv",
        ) from None
    splits = {}
    for split, (*texts, labels) in columns.items():
        unknown = set(labels) - set(range(len(task.labels)))
        if task.labels and unknown:  # a test set has -1 for labels that are not public
            raise DataError(f"{HUB} ({name}) has the labels {sorted(unknown)} in {split}, which are not known")
        splits[split] = _make_rows(texts, labels)
    return splits


def _make_rows(texts: Sequence[list[str]], labels: list[int] | list[float]) -> Rows:
    if len(texts) == 2:
        return Rows(texts[0], texts[1], labels)
    return Rows(texts[0], None, labels)


def _find_task_folder(task: GlueTask, folder: Path, files: str) -> Path:
    """Return `folder` itself, or the folder in it that is named as the task is."""
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {problem}", f"give a folder with {files}")
    candidates = [folder]
    for path in sorted(folder.iterdir()):
        if path.is_dir() and plain_name(path.name) == plain_name(task.folder):
            candidates.append(path)
    for candidate in candidates:
        if (candidate / "train.tsv").is_file():
            return candidate
    raise DataError(
        f"{folder} has no train.tsv; looked for train.tsv and {task.folder}/train.tsv",
        f"the official files are {files}",
    )


def _register(name: str, task: GlueTask) -> None:
    def load(data: str | None, _seed: int) -> dict[str, Rows]:
        return load_glue(name, data)

    datasets.register(name)(
        Dataset(
            name=name,
            kind="classification" if task.labels else "regression",
            text=task.hub_text,
            labels=task.labels,
            metrics=task.metrics,
            load=load,
            about=task.about,
        )
    )


for _name, _task in GLUE.items():
    _register(_name, _task)
