"""`spdtool report`: one page without network or scripts, and the same figures as PNG files beside it.

Reads: run folders, or the folder of a sweep. Writes: the page, and `<page>-<figure>.png` for each of its figures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spdtool.errors import RunError
from spdtool.report import drawing
from spdtool.report import figures as plots
from spdtool.report.content import Comparison, RunContent, compare, content_of
from spdtool.run.folder import Run
from spdtool.run.records import StudentRow, SweepRecord
from spdtool.sweep.rows import row_of_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SWEEP = "sweep.json"
SHOWN = 12  # runs that a page of several shows one by one
BARS = "mean over seeds, bars: sample deviation"
OWED = "; of the best exported form, to which rounding, fusion and padding left out add beside the zeros"
DEFAULT = Path("report") / "report.html"


@dataclass(frozen=True)
class PageFigure:
    """A figure of the page as SVG, and the name of its PNG file."""

    svg: str
    about: str
    file: str


@dataclass(frozen=True)
class RunSection:
    """One run of the page, with its figures."""

    content: RunContent
    training: list[PageFigure]
    zeros: list[PageFigure]


@dataclass(frozen=True)
class ComparisonSection:
    """The comparison of several runs, with its figures."""

    content: Comparison
    figures: list[PageFigure]


@dataclass
class Page:
    """Keeps what a page will hold: runs, the rows that are compared, and the figures by their file names."""

    runs: list[Run]
    rows: list[StudentRow]
    file: Path
    images: list[Path] = field(default_factory=list)

    def figure(self, drawn: Figure, name: str, about: str) -> PageFigure:
        """The figure for the page; its PNG is written beside it."""
        image = drawing.png(drawn, self.file.with_name(f"{self.file.stem}-{name}.png"))
        self.images.append(image)
        return PageFigure(drawing.svg(drawn, name, about), about, image.name)


def write(folders: Sequence[Path], to: Path | None = None) -> Page:
    """Write the page of these runs, or of this sweep.

    Args:
        to: the page; None: `report/report.html` in the folder, or where we are if there are several.

    Raises:
        RunError: a folder is neither a run nor a sweep.
        Corrupt: a record of a run cannot be read.
    """
    sweep = [folder for folder in folders if not (folder / "run.json").is_file() and (folder / SWEEP).is_file()]
    pairs = [pair for folder in folders for pair in (of_sweep(folder) if folder in sweep else [_of_folder(folder)])]
    page = Page(
        [run for run, _ in pairs if run is not None],
        [row for _, row in pairs],
        to or (folders[0] / DEFAULT if len(folders) == 1 else DEFAULT),
    )
    several = bool(sweep) or len(page.runs) > 1
    page.file.parent.mkdir(parents=True, exist_ok=True)
    shown = page.runs[:SHOWN]
    content = {
        "several": several,
        "comparison": _comparison(page) if several else None,
        "runs": [_run(page, run, f"run{number}-" if several else "") for number, run in enumerate(shown, 1)],
        "hidden": [str(run.path) for run in page.runs[SHOWN:]],
        "smoke": any(row.smoke for row in page.rows),
    }
    page.file.write_text(render(content), "utf-8")
    return page


def of_sweep(folder: Path) -> list[tuple[Run | None, StudentRow]]:
    """The rows of a sweep, each with its run as far as there is one."""
    try:
        rows = SweepRecord.model_validate(json.loads((folder / SWEEP).read_text("utf-8"))).rows
    except ValueError as error:
        raise RunError(f"{folder / SWEEP} cannot be read: {error}", "run the sweep again: it goes on") from None
    return [_of_row(folder, row) for row in rows]


def render(content: dict[str, Any]) -> str:
    """The page; every text is escaped, and only the figures are markup."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spdtool", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = files("spdtool.report").joinpath("page.css").read_text("utf-8")
    return environment.get_template("page.html").render(content | {"style": style})


def _of_folder(folder: Path) -> tuple[Run, StudentRow]:
    run = Run.open(folder)
    return run, row_of_run(run)


def _of_row(folder: Path, row: StudentRow) -> tuple[Run | None, StudentRow]:
    path = folder / row.run
    if not (path / "run.json").is_file():
        return None, row
    run = Run.open(path)
    if row.status in ("failed", "stopped"):
        return run, row
    return run, row_of_run(run).model_copy(update={"task": row.task, "run": row.run})


def _comparison(page: Page) -> ComparisonSection:
    comparison = compare(page.rows)
    drawn = []
    for name, figure in plots.pareto_figures(comparison.summaries):
        about = BARS if name.endswith("-nonzeros") else BARS + OWED
        drawn.append(page.figure(figure, name, about))
    return ComparisonSection(comparison, drawn)


def _run(page: Page, run: Run, prefix: str) -> RunSection:
    content = content_of(run)
    return RunSection(content, list(_training_figures(page, content, prefix)), _zero_figures(page, content, prefix))


def _training_figures(page: Page, content: RunContent, prefix: str) -> Iterator[PageFigure]:
    if content.student.phases:
        about = (
            "the student: dev and train score, loss, sparsity, replacing rate, learning rate; green lines: prune events"
        )
        yield page.figure(plots.training_curves(content.student, content.row.teacher), f"{prefix}student", about)
    if content.teacher.phases:
        about = "the teacher: dev and train score, loss, learning rate"
        yield page.figure(plots.training_curves(content.teacher, None), f"{prefix}teacher", about)


def _zero_figures(page: Page, content: RunContent, prefix: str) -> list[PageFigure]:
    zeros = content.zeros
    if not zeros.values:
        return []
    drawn = plots.sparsity_map(zeros.layers, zeros.matrices, zeros.values)
    return [page.figure(drawn, f"{prefix}sparsity", f"zeros in each matrix after {zeros.phase}, by layer")]
