"""How figures are drawn: one style for all; PNG for slides, SVG to stand inside a page.

Everything is drawn once, in the colours of a light page; in the SVG each of these colours is a CSS
variable of `page.css` instead, so that the page decides, by day and by night. The colours of series
are Okabe and Ito's, which colour-blind people can tell apart; the fifth is darkened, to be seen on
white.
"""

from __future__ import annotations

import functools
import html
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec

from spdtool.escaping import make_visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")

PAPER, INK, MUTED, GRID = "#fffffe", "#1b1f23", "#57606a", "#d8dee4"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
VARIABLES = {PAPER: "paper", INK: "ink", MUTED: "muted", GRID: "grid"} | {
    colour: f"series-{index}" for index, colour in enumerate(SERIES)
}
STYLE = {
    "font.size": 9.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "spdtool",
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.6,
}
DPI = 200  # sharp when a slide shows a figure at twice its size
POINTS_PER_INCH = 72  # of an SVG
LARGEST_SCALE = 1.4  # times its natural size that a figure may take on a wide page


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in `STYLE`, and restore matplotlib's settings."""

    @functools.wraps(draw)
    def draw_in_style(*args: P.args, **kwargs: P.kwargs) -> Figure:
        import matplotlib

        with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
            return draw(*args, **kwargs)

    return draw_in_style


def figure_with_axes(size: tuple[float, float], heights: Sequence[float] = (1.0,)) -> tuple[Figure, list[Axes]]:
    """Return a figure with one column of axes that share their x axis.

    Args:
        size: width and height in inches. heights: of the axes, relative to each other.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")  # no pyplot: it would keep every figure in memory
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=list(heights))
    return figure, list(grid[:, 0])


def escape_dollars(text: str) -> str:
    """Return text in which a dollar sign begins no formula, and no control character does anything."""
    return make_visible(text).replace("$", r"\$")


def save_png(figure: Figure, file: Path) -> Path:
    """Write the figure as it is on a light page; return the file."""
    import matplotlib

    file.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure.savefig(file, dpi=DPI)
    return file


def to_svg(figure: Figure, name: str, description: str) -> str:
    """Return the figure as an element for a page: colours are CSS variables, and every id begins with `name`."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure.savefig(stream, format="svg", transparent=True)
    text = stream.getvalue()
    # the metadata and the namespaces are addresses, which a page without network must not have
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<0>{name}-", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)  # the page's font, not the one of this machine
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    head, rest = text.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)  # the page scales it
    max_width = LARGEST_SCALE * POINTS_PER_INCH * figure.get_figwidth()
    label = html.escape(description)
    return f'{head} role="img" aria-label="{label}" style="max-width: {max_width:.0f}px">{rest}'
