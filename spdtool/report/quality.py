"""What the page says of scores and probabilities: test scores, calibration, confusion, and rows that differ."""

from __future__ import annotations

from dataclasses import dataclass

from spdtool.report.records import TextTable, format_optional, text_table
from spdtool.run.records import Quality

MOST_CLASSES = 12  # of a confusion matrix; with more, the largest confusions are listed
LISTED_CONFUSIONS = 20
CALIBRATION_COLUMNS = (
    *("rows", "model", "temperature", "ECE raw", "ECE", "Brier raw", "Brier"),
    *("log-likelihood raw", "log-likelihood"),
)
DIFFERING_COLUMNS = ("gold", "teacher", "probability", "student", "its probability", "text", "second text")


@dataclass(frozen=True)
class QualityContent:
    """Lines on the test score, and tables; empty tables where nothing was measured."""

    lines: list[tuple[str, str]]
    calibration: TextTable
    confusion: TextTable
    differing: TextTable


def quality_content(quality: Quality | None) -> QualityContent:
    """Gather what was measured; None before the export."""
    if quality is None:
        quality, lines = Quality(), []
    else:
        lines = quality.lines()
    return QualityContent(lines, calibration_table(quality), confusion_table(quality), differing_table(quality))


def calibration_table(quality: Quality) -> TextTable:
    """Return how far probabilities are from frequencies, before and after the temperature."""
    rows = []
    for split, models in quality.calibration.items():
        for role, pair in models.items():
            cells = [split, role, f"{quality.temperatures.get(role, 1.0):.3f}"]
            for name in ("ece", "brier", "nll"):
                sign = -1 if name == "nll" else 1
                cells += [f"{sign * getattr(figures, name):.4f}" for figures in (pair.raw, pair.calibrated)]
            rows.append(cells)
    return text_table("probabilities against frequencies", CALIBRATION_COLUMNS, rows)


def confusion_table(quality: Quality) -> TextTable:
    """Return the student's dev rows by gold and predicted class; of many classes the largest confusions."""
    counts = {(gold, predicted): count for gold, predicted, count in quality.confusion}
    classes = list(dict.fromkeys([*(gold for gold, _ in counts), *(predicted for _, predicted in counts)]))
    if len(classes) <= MOST_CLASSES:
        matrix: list[list[object]] = []
        for gold in classes:
            matrix.append([gold, *(counts.get((gold, predicted), 0) for predicted in classes)])
        return text_table("the student's dev rows, gold class by predicted class", ["gold", *classes], matrix)
    wrong = sorted((cell for cell in quality.confusion if cell[0] != cell[1]), key=lambda cell: -cell[2])
    return text_table(
        "the student's commonest confusions on dev rows", ["gold", "predicted", "rows"], wrong[:LISTED_CONFUSIONS]
    )


def differing_table(quality: Quality) -> TextTable:
    """Return the dev rows on which student and teacher answer differently."""
    rows: list[list[object]] = []
    for row in quality.differing:
        teacher = [row.teacher, format_optional(row.teacher_probability, ".3f")]
        student = [row.student, format_optional(row.student_probability, ".3f")]
        rows.append([row.gold, *teacher, *student, row.text, row.pair or "-"])
    title = f"{quality.differing_rows:,} of {quality.dev_rows:,} dev rows on which student and teacher differ"
    return text_table(f"{title}; shown: {len(rows):,}", DIFFERING_COLUMNS, rows)
