"""`spdtool report`: one page without network or scripts, and the same figures as PNG files beside it.

Reads: run folders, or the folder of a sweep. Writes: the page, and `<page>-<figure>.png` for each
of its figures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from spdtool.errors import RunError
from spdtool.escaping import make_visible
from spdtool.report.content import Comparison, RunContent, compare, content_of
from spdtool.report.drawing import save_png, to_svg
from spdtool.report.figures import pareto_figures, reliability_figure, sparsity_figure, training_figure
from spdtool.run.folder import Run
from spdtool.run.records import Quality, StudentRow, SweepRecord
from spdtool.run.storage import write_text
from spdtool.sweep.rows import row_of_run
from spdtool.sweep.run_sweep import RESULT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_RUNS = 12  # that a page of several shows one by one: each adds about half a megabyte
DEFAULT_PAGE = Path("report") / "report.html"
NONZEROS_CAPTION = "mean over seeds, bars: sample deviation"
COST_CAPTION = (
    f"{NONZEROS_CAPTION}; of the best exported form, "
    "to which rounding, fusion and padding left out add beside the zeros"
)


@dataclass(frozen=True)
class PageFigure:
    """A figure of the page as SVG, and the name of its PNG file."""

    svg: str
    caption: str
    file: str


@dataclass(frozen=True)
class RunSection:
    """One run of the page, with its figures."""

    content: RunContent
    training: list[PageFigure]
    zeros: list[PageFigure]
    reliability: list[PageFigure]


@dataclass(frozen=True)
class ComparisonSection:
    """The comparison of several runs, with its figures."""

    content: Comparison
    figures: list[PageFigure]


@dataclass
class Page:
    """Collects what a page holds: runs, the rows that are compared, and the files of the figures."""

    runs: list[Run]
    rows: list[StudentRow]
    file: Path
    images: list[Path] = field(default_factory=list)

    def add_figure(self, figure: Figure, name: str, caption: str) -> PageFigure:
        """Write the PNG of a figure beside the page, and return the figure for the page."""
        image = save_png(figure, self.file.with_name(f"{self.file.stem}-{name}.png"))
        self.images.append(image)
        return PageFigure(to_svg(figure, name, caption), caption, image.name)


def write_page(folders: Sequence[Path], to: Path | None = None) -> Page:
    """Write the page of these runs, or of this sweep.

    Args:
        to: the page; None: `report/report.html` in the folder, or in the current folder if there are several.

    Raises:
        RunError: a folder is neither a run nor a sweep.
        Corrupt: a record of a run cannot be read.
    """
    runs: list[Run] = []
    rows: list[StudentRow] = []
    several = False
    for folder in folders:
        if not (folder / "run.json").is_file() and (folder / RESULT).is_file():
            several = True
            for row in read_sweep(folder):
                rows.append(_add_run(folder, row, runs))
        else:
            runs.append(Run.open(folder))
            rows.append(row_of_run(runs[-1]))
    # A sweep is compared even where one run of it is left.
    several = several or len(runs) > 1
    if to is None:
        to = DEFAULT_PAGE
        if len(folders) == 1:
            to = folders[0] / DEFAULT_PAGE
    page = Page(runs, rows, to)
    page.file.parent.mkdir(parents=True, exist_ok=True)
    comparison = _compare_runs(page) if several else None
    sections = []
    for number, run in enumerate(runs[:MOST_RUNS], 1):
        prefix = ""
        if several:  # the figures of all runs lie beside one page, and their SVG ids in one document
            prefix = f"run{number}-"
        sections.append(_show_run(page, run, prefix))
    others = [str(run.path) for run in runs[MOST_RUNS:]]
    smoke = any(row.smoke for row in rows)
    write_text(page.file.resolve(), render(sections, comparison, others, smoke=smoke))
    return page


def read_sweep(folder: Path) -> list[StudentRow]:
    """Read the rows of a sweep.

    Raises:
        RunError: its sweep.json cannot be read.
    """
    file = folder / RESULT
    try:
        return SweepRecord.model_validate(json.loads(file.read_text("utf-8"))).rows
    except ValueError as error:  # of json, of UTF-8 and of the record
        raise RunError(f"{file} cannot be read: {error}", "run the sweep again: it goes on") from None


def render(
    runs: Sequence[RunSection], comparison: ComparisonSection | None, others: Sequence[str], *, smoke: bool
) -> str:
    """Fill the template; every text is escaped, and only the figures are markup.

    Args:
        comparison: None for the page of a single run.
        others: folders of runs that are not shown one by one.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spdtool", "report"),
        # Texts of the user's data and paths of any file are on the page.
        autoescape=True,
        # A misspelt field would leave a hole that nobody sees.
        undefined=jinja2.StrictUndefined,
        finalize=show_controls,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = files("spdtool.report").joinpath("page.css").read_text("utf-8")
    template = environment.get_template("page.html")
    return template.render(runs=runs, comparison=comparison, others=others, smoke=smoke, style=style)


def show_controls(value: object) -> object:
    """Spell out the control characters of a text: a bidirectional one would reorder the page around it."""
    # Markup is ours; what is no text has no such characters.
    return make_visible(value, lines=True) if type(value) is str else value


def _add_run(folder: Path, row: StudentRow, runs: list[Run]) -> StudentRow:
    """Append the run of a row as far as there is one; return the row as the run has it now."""
    path = folder / row.run
    if not (path / "run.json").is_file():
        return row
    run = Run.open(path)
    runs.append(run)
    if row.status in ("failed", "stopped"):  # a run folder does not know that
        return row
    return row_of_run(run).model_copy(update={"task": row.task, "run": row.run})


def _compare_runs(page: Page) -> ComparisonSection:
    comparison = compare(page.rows)
    figures = []
    for name, figure in pareto_figures(comparison.summaries):
        caption = COST_CAPTION
        if name.endswith("-nonzeros"):
            caption = NONZEROS_CAPTION
        figures.append(page.add_figure(figure, name, caption))
    return ComparisonSection(comparison, figures)


def _show_run(page: Page, run: Run, prefix: str) -> RunSection:
    """Gather one run and draw its figures.

    Args:
        prefix: of the names of its figures.
    """
    content = content_of(run)
    section = RunSection(content, [], [], [])
    if content.student.phases:
        caption = "the student: dev and train score, loss, sparsity, learning rate; green lines: prune events"
        if content.student.grafted:
            caption = caption.replace("sparsity,", "sparsity, replacing rate,")
        figure = training_figure(content.student, content.row.teacher)
        section.training.append(page.add_figure(figure, f"{prefix}student", caption))
    if content.teacher.phases:
        caption = "the teacher: dev and train score, loss, learning rate"
        section.training.append(page.add_figure(training_figure(content.teacher, None), f"{prefix}teacher", caption))
    quality = run.export_result().quality if run.done("export") else Quality()
    for split, pairs in quality.calibration.items():
        caption = f"how often answers on {split} rows are right, by how sure the models are; pale: without temperature"
        figure = reliability_figure(pairs)
        section.reliability.append(page.add_figure(figure, f"{prefix}reliability-{split}", caption))
    zeros = content.zeros
    if zeros.values:
        caption = f"zeros in each matrix after {zeros.phase}, by layer"
        figure = sparsity_figure(zeros.layers, zeros.matrices, zeros.values)
        section.zeros.append(page.add_figure(figure, f"{prefix}sparsity", caption))
    return section
