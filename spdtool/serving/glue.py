"""`spdtool predict --format glue`: the answers to a test.tsv of GLUE, as gluebenchmark.com takes them.

A submission has the columns `index` and `prediction`, and a line for every row of the file. Labels
are written as the official training files write them: names for MNLI, QNLI and RTE, numbers for the
others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from spdtool.data.formats.separated import read_tsv
from spdtool.data.formats.table import Table
from spdtool.data.glue import GLUE, GlueTask
from spdtool.errors import DataError, RecipeError
from spdtool.export.bundle.manifest import read_manifest
from spdtool.export.classifier import Classifier
from spdtool.run.records import BundleManifest

INDEX_NAMES = ("index", "id")  # QQP has the second
HEADER = "index\tprediction"
HIGHEST_SIMILARITY = 5.0  # of STS-B, whose submissions may not be outside of 0 to 5


def find_glue_task(classify: Classifier) -> tuple[str, GlueTask]:
    """Return the GLUE task that a bundle was trained on, with its name.

    Raises:
        RecipeError: it was trained on something else.
    """
    manifest = None if classify.bundle is None else read_manifest(classify.bundle.folder)
    name = manifest.task if isinstance(manifest, BundleManifest) else ""
    if name not in GLUE:
        raise RecipeError(
            f"--format glue writes a submission to GLUE, and the model is of the task {name or 'unknown'!r}",
            f"a bundle of one of {', '.join(GLUE)}; without --format, rows are labelled with the model's names",
        )
    return name, GLUE[name]


def submission_lines(classify: Classifier, file: Path, batch_size: int) -> Iterator[str]:
    """Yield the lines of a submission: the header, then one for each row of a test.tsv.

    Raises:
        RecipeError: as `find_glue_task`.
        DataError: the file lacks a text column, or a row its text.
    """
    name, task = find_glue_task(classify)
    table = read_tsv(file)
    columns = _text_columns(table, name, task)
    texts = [list(map(str, table.column(column))) for column in columns]
    for row, cells in enumerate(zip(*texts, strict=True)):
        if not all(cell.strip() for cell in cells):
            table.refuse(row, "a text is empty", "a submission needs an answer for every row")
    index_name = next((column for column in INDEX_NAMES if column in table.columns), None)
    indices = range(len(table.rows)) if index_name is None else table.column(index_name)
    logits = classify.logits(texts[0], texts[1] if len(texts) == 2 else None, batch_size=batch_size)
    spellings = dict(zip(task.labels, task.label_spellings, strict=True))
    yield HEADER
    for index, answer in zip(indices, classify.decide(logits), strict=True):
        yield f"{index}\t{_write_label(answer, spellings)}"


def _text_columns(table: Table, name: str, task: GlueTask) -> tuple[str, ...]:
    for columns in (task.text, task.hub_text):
        if set(columns) <= set(table.columns):
            return columns
    raise DataError(
        f"{table.path} has no {' and '.join(map(repr, task.text))}; it has {', '.join(map(repr, table.columns))}",
        f"the official file is {task.folder}/test.tsv, and the model is of the task {name}",
    )


def _write_label(answer: object, spellings: Mapping[str, str]) -> str:
    """Write a label as the official files do, and a number within the scale of STS-B."""
    if isinstance(answer, float):
        return f"{min(max(answer, 0.0), HIGHEST_SIMILARITY):.3f}"
    if answer not in spellings:  # a teacher of others may have called its labels otherwise
        raise DataError(f"the model answers {answer!r}, and the labels of GLUE are {', '.join(spellings)}")
    return spellings[str(answer)]
