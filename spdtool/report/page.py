"""`spdtool report`: one page without network or scripts, and the same figures as PNG files beside it.

Reads: run folders, or the folder of a sweep. Writes: the page, and `<page>-<figure>.png` for each of its figures.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from spdtool.errors import RunError
from spdtool.report import content as gather
from spdtool.report import drawing
from spdtool.report import figures as plots
from spdtool.run.folder import Run
from spdtool.sweep import rows as report_rows
from spdtool.sweep.rows import FAILED, STOPPED, Row

SWEEP = "sweep.json"
SHOWN = 12  # runs that a page of several shows one by one
BARS = "mean over seeds, bars: sample deviation"
OWED = "; of the best exported form, to which rounding, fusion and padding left out add beside the zeros"
DEFAULT = Path("report") / "report.html"


@dataclass
class Page:
    """Keeps what a page will hold: runs, the rows that are compared, and the figures by their file names."""

    runs: list[Run]
    rows: list[Row]
    file: Path
    images: list[Path] = field(default_factory=list)

    def figure(self, drawn: Any, name: str, about: str) -> dict[str, str]:
        """The figure for the page; its PNG is written beside it."""
        image = drawing.png(drawn, self.file.with_name(f"{self.file.stem}-{name}.png"))
        self.images.append(image)
        return {"svg": drawing.svg(drawn, name, about), "about": about, "file": image.name}


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


def of_sweep(folder: Path) -> list[tuple[Run | None, Row]]:
    """The rows of a sweep, each with its run as far as there is one."""
    try:
        records = json.loads((folder / SWEEP).read_text("utf-8"))["rows"]
        rows = [report_rows.read(record) for record in records]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
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


def _of_folder(folder: Path) -> tuple[Run, Row]:
    run = Run.open(folder)
    return run, report_rows.of_run(run)


def _of_row(folder: Path, row: Row) -> tuple[Run | None, Row]:
    path = folder / row.run
    if not (path / "run.json").is_file():
        return None, row
    run = Run.open(path)
    return run, row if row.status in (FAILED, STOPPED) else replace(report_rows.of_run(run), task=row.task, run=row.run)


def _comparison(page: Page) -> dict[str, Any]:
    found = gather.comparison(page.rows)
    figures = plots.pareto_figures(found["summaries"])
    drawn = [page.figure(figure, name, BARS if name.endswith("-nonzeros") else BARS + OWED) for name, figure in figures]
    return found | {"figures": drawn}


def _run(page: Page, run: Run, prefix: str) -> dict[str, Any]:
    found = gather.of_run(run)
    return found | {"figures": list(_figures(page, found, prefix)), "map": list(_map(page, found["zeros"], prefix))}


def _figures(page: Page, found: dict[str, Any], prefix: str) -> Iterator[dict[str, str]]:
    score = found["row"].teacher
    if found["student"].phases:
        about = (
            "the student: dev and train score, loss, sparsity, replacing rate, learning rate; green lines: prune events"
        )
        yield page.figure(plots.course(found["student"], score), f"{prefix}student", about)
    if found["teacher"].phases:
        about = "the teacher: dev and train score, loss, learning rate"
        yield page.figure(plots.course(found["teacher"], None), f"{prefix}teacher", about)


def _map(page: Page, zeros: dict[str, Any], prefix: str) -> Iterable[dict[str, str]]:
    if zeros["values"]:
        drawn = plots.sparsity_map(zeros["layers"], zeros["matrices"], zeros["values"])
        yield page.figure(drawn, f"{prefix}sparsity", f"zeros in each matrix after {zeros['phase']}, by layer")
