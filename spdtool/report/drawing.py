"""How figures are drawn: one style for all; PNG for slides, SVG to stand inside a page.

Everything is drawn once, in the colours of a light page; in the SVG each of these colours is a CSS variable of
`page.css` instead, so that the page decides, by day and by night. The colours of series are Okabe and Ito's, which
colour-blind people can tell apart; the fifth is darkened, to be seen on white.
"""

from __future__ import annotations

import functools
import html
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec

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
DPI = 200
DOTS = 72  # of an SVG to the inch
LARGEST = 1.4  # times its natural size that a figure may take on a wide page


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in `STYLE`, and leave matplotlib's settings as they were."""

    @functools.wraps(draw)
    def drawn(*arguments: P.args, **options: P.kwargs) -> Figure:
        import matplotlib

        with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
            return draw(*arguments, **options)

    return drawn


def figure_with_axes(size: tuple[float, float], heights: Sequence[float] = (1.0,)) -> tuple[Figure, list[Axes]]:
    """A figure with one column of axes that share their x axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=list(heights))
    return figure, list(grid[:, 0])


def escape_dollars(text: str) -> str:
    """Text in which a dollar sign begins no formula."""
    return text.replace("$", r"\$")


def save_png(figure: Figure, file: Path) -> Path:
    """Write the figure as it is on a light page; return the file."""
    import matplotlib

    file.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure.savefig(file, dpi=DPI)
    return file


def to_svg(figure: Figure, name: str, about: str) -> str:
    """The figure as an element for a page: colours are its variables, and every id begins with `name`."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure.savefig(stream, format="svg", transparent=True)
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\b(id="|href="#|url\(#)', lambda found: found.group(0) + f"{name}-", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    head, rest = text.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    widest = LARGEST * DOTS * figure.get_figwidth()
    return f'{head} role="img" aria-label="{html.escape(about)}" style="max-width: {widest:.0f}px">{rest}'
