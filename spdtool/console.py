"""The one place that draws: lines, tables, the live training display, errors, and JSON for machines.

Three ways to speak, chosen once by the command line: a rich live display on a terminal, plain lines elsewhere, and
with `--json` one JSON value on standard output while everything else goes to standard error.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from spdtool import ranks as processes
from spdtool.errors import SpdError

Watch = Callable[[dict[str, Any]], None]
Follow = Callable[[str, int, dict[str, Any]], None]

PLAIN_SECONDS = 20.0  # between two progress lines when the output is not a terminal
UNFOLDED = 1000  # columns: wider than any line of ours
EMPTY = (None, "", "-")  # cells without a value

_json = False
_silent = False
_follow: Follow | None = None
_out = Console(highlight=False, quiet=not processes.is_main())
_err = Console(stderr=True, highlight=False, quiet=not processes.is_main())


def setup(*, as_json: bool = False) -> None:
    """Choose how to speak. Consoles are made anew, so that redirected streams are respected."""
    global _json, _out, _err
    _json = as_json
    _err = _console(stderr=True)
    _out = _err if as_json else _console()


def _console(*, stderr: bool = False) -> Console:
    """A console as wide as its terminal; a file or a pipe has no width, so nothing is folded for it.

    Of several processes that train together only the main one speaks.
    """
    console = Console(stderr=stderr, highlight=False, quiet=not processes.is_main())
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = UNFOLDED
    return console


def say(text: str) -> None:
    """One line for the user; markup such as [bold] is understood, so escape what is not yours."""
    if not _silent:
        _out.print(text, soft_wrap=not _out.is_terminal)


def plain(text: Any) -> str:
    """Text for `say` in which brackets mean nothing."""
    return escape(str(text))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the lines of what is done inside to ourselves; a live display, warnings and errors are still shown."""
    global _silent
    before, _silent = _silent, True
    try:
        yield
    finally:
        _silent = before


def warn(text: str) -> None:
    """Something that the user asked for is not done as asked, or deserves attention."""
    _err.print(f"[yellow]note:[/] {escape(text)}", soft_wrap=not _err.is_terminal)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table under its title; columns after the first are aligned right when their cells are numbers."""
    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, header_style="bold")
    for index, column in enumerate(columns):
        cells = [row[index] for row in rows]
        drawn.add_column(column, justify="right" if index and numeric(cells) else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*[escape(number(cell)) for cell in row])
    say(f"\n[bold]{escape(title)}[/]")
    _out.print(drawn)


def numeric(cells: Sequence[Any]) -> bool:
    """Whether a column is read as numbers: `12`, `3.5%`, `1.02x` and `3.1 ± 0.2` are, among cells that may be empty."""
    filled = [number(cell) for cell in cells if cell not in EMPTY]
    return bool(filled) and all(re.fullmatch(r"-?[\d,.]+(e-?\d+)?[%xM]?( ± (-|[\d.]+))?", cell) for cell in filled)


def result(value: Any) -> None:
    """The result of a command: JSON on standard output with `--json`, nothing otherwise."""
    if _json and processes.is_main() and not processes.has_launcher():
        sys.stdout.write(json.dumps(_finite(value), indent=2, ensure_ascii=False, default=str) + "\n")
        sys.stdout.flush()


def row(value: dict[str, Any], text: str) -> None:
    """One row of a result that is told as it comes: `value` as one line of JSON with `--json`, else `text`."""
    line = json.dumps(_finite(value), ensure_ascii=False, default=str) if _json else text
    sys.stdout.write(line + "\n")


def _finite(value: Any) -> Any:
    """`value` with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fail(error: SpdError) -> None:
    """Show an error of the user's: what was asked and found, then what to try; or leave it to who tells it for us."""
    processes.leave_word(error)
    if not processes.is_main() or processes.has_launcher():
        return
    if _json:
        result({"error": type(error).__name__, "message": error.message, "hint": error.hint})
        return
    body = escape(error.message) + (f"\n[dim]try:[/] {escape(error.hint)}" if error.hint else "")
    if _err.is_terminal:
        _err.print(Panel(body, title=type(error).__name__, title_align="left", border_style="red"))
    else:
        _err.print(f"{type(error).__name__}: {body}", soft_wrap=True)


def number(cell: Any) -> str:
    """A cell as text: floats with four significant digits, whole numbers with separators."""
    if isinstance(cell, list | tuple):
        return ", ".join(map(str, cell)) or "-"
    if isinstance(cell, bool) or not isinstance(cell, int | float):
        return "-" if cell is None else str(cell)
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:.4g}" if abs(cell) < 1e4 else f"{cell:,.0f}"


def scores(metrics: dict[str, float], *, best: bool = False) -> str:
    """Metrics on one line."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()) + ("  best so far" if best else "")


@contextmanager
def following(follow: Follow) -> Iterator[None]:
    """Let `follow(stage, steps, event)` see every event of training stages; what it raises ends the stage."""
    global _follow
    before, _follow = _follow, follow
    try:
        yield
    finally:
        _follow = before


@contextmanager
def progress(stage: str, steps: int) -> Iterator[Watch]:
    """Show a training stage while it runs; yields the function that `training.fit` calls with what happened."""
    follow = _follow
    if _out.is_terminal:
        display = _Display(stage, steps)
        with Live(get_renderable=display.draw, console=_out, refresh_per_second=4, transient=True):
            yield _both(display.take, stage, steps, follow)
    else:
        yield _both(_lines(stage, steps), stage, steps, follow)


def _both(shown: Watch, stage: str, steps: int, follow: Follow | None) -> Watch:
    if follow is None:
        return shown

    def take(event: dict[str, Any]) -> None:
        shown(event)
        follow(stage, steps, event)

    return take


@contextmanager
def busy(text: str) -> Iterator[None]:
    """Show that something without steps is going on."""
    if _out.is_terminal:
        with _out.status(escape(text)):
            yield
    else:
        say(escape(text))
        yield


class _Display:
    """Keeps the latest of each kind of event, and draws them as one panel."""

    def __init__(self, stage: str, steps: int) -> None:
        self.stage, self.step, self.score = stage, {}, {}
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.completed}/{task.total}"),
            TextColumn("elapsed"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self.task: TaskID = self.bar.add_task(stage, total=steps)

    stage: str
    step: dict[str, Any]
    score: dict[str, Any]

    def take(self, event: dict[str, Any]) -> None:
        if event["event"] == "step":
            self.step |= event
        elif event["event"] == "eval":
            self.score = event
        elif event["event"] == "prune":
            self.step["sparsity"] = event["sparsity"]
        if "step" in event:
            self.bar.update(self.task, completed=event["step"])

    def draw(self) -> Panel:
        grid = Table.grid(padding=(0, 2))
        for name, value in _facts(self.step):
            grid.add_row(f"[dim]{name}[/]", escape(value))
        if self.score:
            shown = scores(self.score["metrics"], best=self.score["best"]) + _beside(self.score)
            grid.add_row("[dim]last dev score[/]", escape(shown))
        drawn = self.step.get("drawn")
        if drawn:
            blocks = Text.assemble(*[("■ " if own else "□ ", "green" if own else "blue") for own in drawn])
            grid.add_row("[dim]layers of this draw[/]", Text.assemble(blocks, ("■ student  □ teacher", "dim")))
        return Panel(Group(self.bar, grid), title=f"spdtool {self.stage}", title_align="left")


def _lines(stage: str, steps: int) -> Watch:
    last = time.monotonic()

    def take(event: dict[str, Any]) -> None:
        nonlocal last
        head = f"{stage} {event.get('step', 0)}/{steps}"
        if event["event"] == "eval":
            say(escape(f"{head}  dev {scores(event['metrics'], best=event['best'])}{_beside(event)}"))
        elif event["event"] == "prune":
            kept = f"; prune.least kept more of {len(event['clamped'])} matrices alive" if "clamped" in event else ""
            say(escape(f"{head}  pruned to {event['sparsity']:.4f}{kept}"))
        elif event["event"] == "left":
            say(escape(f"{head}  left at sparsity {event['sparsity']:g}: dev {scores(event['dev'])}"))
        elif event["event"] == "resume":
            say(escape(f"{head}  resumed"))
        elif event["event"] == "step" and time.monotonic() - last > PLAIN_SECONDS:
            last = time.monotonic()
            say(escape(f"{head}  " + "  ".join(f"{name} {value}" for name, value in _facts(event))))

    return take


def _beside(event: dict[str, Any]) -> str:
    """The score on training rows, to be read beside the dev score: far above it, the model has learnt them by heart."""
    return f"  (train {event['train']['score']:.4f})" if "train" in event else ""


def _facts(event: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "epoch" in event:
        yield "epoch", f"{event['epoch']:.2f} of {event['epochs']:g}"
    if "losses" in event:
        total = event["losses"].get("loss")
        terms = {name: value for name, value in event["losses"].items() if name != "loss"}
        shown = [
            *([] if total is None else [f"{total:.4g}"]),
            *(f"{name} {value:.4g}" for name, value in terms.items()),
        ]
        yield "loss", "  ".join(shown)
    if "examples_per_second" in event:
        yield "examples/s", f"{event['examples_per_second']:.1f}"
    if event.get("sparsity") is not None:
        yield "sparsity now", f"{event['sparsity']:.4f}"
    if event.get("replacing_rate") is not None:
        yield "replacing rate", f"{event['replacing_rate']:.3f}"
    if "learning_rate" in event:
        yield "learning rate", f"{event['learning_rate']:.2e}"
