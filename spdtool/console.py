"""The one module that draws: lines, tables, the live training display, errors, and JSON for machines.

Three ways to print, chosen once by the command line: a rich live display on a terminal, plain lines elsewhere, and
with `--json` one JSON value on standard output while everything else goes to standard error.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from spdtool import ranks
from spdtool.errors import SpdError
from spdtool.escaping import PROTECT, RESTORE, escape_json, make_visible
from spdtool.recipe import PHASES
from spdtool.run.forecast import Forecast, format_duration

Event = dict[str, Any]  # one line of metrics.jsonl
OnEvent = Callable[[Event], None]
OnStageEvent = Callable[[str, int, Event], None]

PLAIN_SECONDS = 20.0  # between two progress lines when the output is not a terminal
UNFOLDED = 1000  # columns: wider than any line that is printed
EMPTY = (None, "", "-")  # cells without a value
NUMBER = re.compile(r"-?[\d,.]+(e-?\d+)?[%xM]?( ± (-|[\d.]+))?")  # 12, 3.5%, 1.02x, 3.1 ± 0.2

_json = False
_silent = False
_listener: OnStageEvent | None = None
_forecast = Forecast()
# Ranks other than the main one print nothing.
_out = Console(highlight=False, quiet=not ranks.is_main())
_err = Console(stderr=True, highlight=False, quiet=not ranks.is_main())


def prepare_streams() -> None:
    """Let every text be printed: what an encoding lacks is spelt out, and a stream that is closed takes nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell; the first file that is opened would take its place
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def configure(*, as_json: bool = False) -> None:
    """Choose how to print. Consoles are created anew, so that redirected streams are respected."""
    global _json, _out, _err
    _json = as_json
    _err = _new_console(stderr=True)
    _out = _err if as_json else _new_console()


def _new_console(*, stderr: bool = False) -> Console:
    console = Console(stderr=stderr, highlight=False, quiet=not ranks.is_main())
    # A file or a pipe has no width: nothing is folded for it, so that it can be searched.
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = UNFOLDED
    return console


def say(text: str) -> None:
    """Print a line for the user; markup such as [bold] is understood, so `escape` foreign text."""
    if not _silent:
        _out.print(read_markup(text), soft_wrap=not _out.is_terminal)


def escape(text: object, *, lines: bool = False) -> str:
    """Return text for `say` in which brackets are no markup, and control characters are spelt out.

    Args:
        lines: leave line feeds as they are.
    """
    return make_visible(text, lines=lines).translate(PROTECT)


def read_markup(text: str) -> Text:
    """Return styled text; what was escaped is plain."""
    styled = Text.from_markup(text, emoji=False)
    styled.plain = styled.plain.translate(RESTORE)  # one character for one, so the styles stay where they were
    return styled


@contextmanager
def quiet() -> Iterator[None]:
    """Print no lines inside the block; a live display, warnings and errors are still shown."""
    global _silent
    before, _silent = _silent, True
    try:
        yield
    finally:
        _silent = before


def warn(text: str) -> None:
    """Print a note: a request is not carried out as it was made, or something deserves attention."""
    _err.print(read_markup(f"[yellow]note:[/] {escape(text)}"), soft_wrap=not _err.is_terminal)


def warn_from_signal(text: str) -> None:
    """Print a note from a signal handler: straight to the descriptor, since a console may be in the midst of a line."""
    if ranks.is_main():
        with suppress(OSError):  # no one reads a terminal that has hung up
            os.write(2, f"\nnote: {text}\n".encode())


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table under its title; columns of numbers, after the first, are aligned right."""
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
        header_style="bold",
    )
    for index, column in enumerate(columns):
        is_number = index > 0 and is_numeric([row[index] for row in rows])
        table.add_column(make_text(column), justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*[make_text(format_cell(cell)) for cell in row])
    say(f"\n[bold]{escape(title)}[/]")
    _out.print(table)


def make_text(text: object) -> Text:
    """Return foreign text as rich draws it: without markup, its control characters spelt out."""
    return Text(make_visible(text))


def print_lines(title: str, lines: Sequence[tuple[str, str]]) -> None:
    """Print names and texts in two columns under a title, without the frame of a table."""
    say(f"\n[bold]{escape(title)}[/]")
    if not _out.is_terminal:
        width = max(len(name) for name, _ in lines)
        for name, text in lines:
            say(f"{escape(name):{width}}  {escape(text)}")
        return
    grid = Table.grid(padding=(0, 2))
    for name, text in lines:
        grid.add_row(make_text(name), make_text(text))
    _out.print(grid)


def is_numeric(cells: Sequence[object]) -> bool:
    """Return whether a column reads as numbers, among cells that may be empty."""
    texts = [format_cell(cell) for cell in cells if cell not in EMPTY]
    return bool(texts) and all(map(NUMBER.fullmatch, texts))


def format_cell(cell: object) -> str:
    """Format a cell: floats with four significant digits, whole numbers with separators."""
    if isinstance(cell, list | tuple):
        return ", ".join(map(str, cell)) or "-"
    if cell is None:
        return "-"
    if isinstance(cell, bool) or not isinstance(cell, int | float):
        return str(cell)
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:.4g}" if abs(cell) < 1e4 else f"{cell:,.0f}"


def format_bytes(count: float) -> str:
    """Format a number of bytes with two or three digits: `1.9 GB`, `438 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:,.1f} {unit}" if count < 10 and unit != "bytes" else f"{count:,.0f} {unit}"


def format_scores(metrics: Mapping[str, float], *, best: bool = False) -> str:
    """Format metrics on one line."""
    line = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    return f"{line}  best so far" if best else line


def can_ask() -> bool:
    """Return whether a person can be asked: on a terminal, and not for a program that reads JSON."""
    return sys.stdin.isatty() and not _json


def print_result(value: object) -> None:
    """Print the result of a command: JSON on standard output with `--json`, nothing otherwise."""
    # Of several processes one prints: the launcher, or else the main one.
    if _json and ranks.is_main() and not ranks.has_launcher():
        sys.stdout.write(_write_json(value, indent=2) + "\n")
        sys.stdout.flush()


def print_row(value: Mapping[str, object], text: str) -> None:
    """Print one row of a result as soon as it is there: one line of JSON with `--json`, else `text`."""
    cells = map(make_visible, text.split("\t"))  # columns are separated by tabs
    line = _write_json(value) if _json else "\t".join(cells)
    sys.stdout.write(line + "\n")


def _write_json(value: object, indent: int | None = None) -> str:
    """Write JSON that standard output can hold: only UTF-8 has every character."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    is_utf_8 = codecs.lookup(encoding).name == "utf-8"
    return escape_json(json.dumps(_finite(value), indent=indent, ensure_ascii=not is_utf_8, default=str))


def _finite(value: object) -> object:
    """Return `value` with null for nan and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def print_error(error: SpdError) -> None:
    """Print an error of the user: what was asked and found, then what to try."""
    ranks.report_failure(error)  # the launcher prints it for its ranks
    if not ranks.is_main() or ranks.has_launcher():
        return
    if _json:
        print_result({"error": type(error).__name__, "message": error.message, "hint": error.hint})
        return
    text = _escape_lines(error.message)
    if error.hint:
        text += f"\n[dim]try:[/] {_escape_lines(error.hint)}"
    if _err.is_terminal:
        body = read_markup(text)
        _err.print(Panel(body, title=type(error).__name__, title_align="left", border_style="red"))
    else:
        _err.print(read_markup(f"{type(error).__name__}: {text}"), soft_wrap=True)


def _escape_lines(text: str) -> str:
    """Escape text of several lines; the further ones are indented, so that none passes for a line of this module."""
    return escape(text, lines=True).replace("\n", "\n  ")


@contextmanager
def mute() -> Iterator[None]:
    """Print nothing inside the block, not even warnings or a live display, and call no listener."""
    global _out, _err, _listener, _forecast
    before = _out, _err, _listener, _forecast
    _out = _err = Console(quiet=True)
    _listener, _forecast = None, Forecast()
    try:
        yield
    finally:
        _out, _err, _listener, _forecast = before


@contextmanager
def busy(text: str) -> Iterator[None]:
    """Show that work without steps is going on."""
    if _out.is_terminal:
        with _out.status(make_text(text)):
            yield
    else:
        say(escape(text))
        yield


@contextmanager
def listen(listener: OnStageEvent) -> Iterator[None]:
    """Call `listener(stage, steps, event)` for every event of a training stage; its errors end the stage."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


@contextmanager
def forecast_run(forecast: Forecast) -> Iterator[None]:
    """Inside the block, show the time that remains of all stages of `forecast`."""
    global _forecast
    before, _forecast = _forecast, forecast
    try:
        yield
    finally:
        _forecast = before


def begin_stage(stage: str, title: str) -> None:
    """Print the title of a stage, with the time that remains where it is forecast."""
    _forecast.begin(stage)
    left = describe_time_left()
    say(f"[bold]{title}[/]" + (f"; {left}" if left else ""))


def describe_time_left() -> str:
    """Return the time that remains, such as `about 25 min left`, and of what; empty where it is not known."""
    seconds = _forecast.seconds_left()
    if seconds is None:
        return ""
    scope = "" if _forecast.covers_all else " of this stage"
    duration = format_duration(seconds)
    return f"{duration} left{scope}" if duration.startswith("under") else f"about {duration} left{scope}"


@contextmanager
def progress(stage: str, steps: int, *, grafting: bool = True, prune_events: Sequence[int] = ()) -> Iterator[OnEvent]:
    """Show a training stage while it runs; yield the function that `fit` calls with each event.

    Args:
        grafting: whether the teacher's layers stand in at all; if not, no replacing rate is shown.
        prune_events: optimiser steps at which the stage prunes.
    """
    listener = _listener
    _forecast.begin(stage, steps, prune_events)

    def on_event(event: Event) -> None:
        _forecast.observe(event)
        show(event)
        if listener is not None:
            listener(stage, steps, event)

    # A file or a pipe keeps every frame of a live display: plain lines there.
    if not _out.is_terminal:
        show = _PlainProgress(stage, steps, grafting).show
        yield on_event
        return
    from rich.live import Live  # here, as in _LiveProgress: `--help` need not wait for it

    display = _LiveProgress(stage, steps, grafting)
    show = display.show
    with Live(get_renderable=display.draw, console=_out, refresh_per_second=4, transient=True):
        yield on_event


def phase_title(stage: str) -> str:
    """Return the name of a stage as titles have it, such as `phase 2 of 3: distill`."""
    if stage not in PHASES:
        return stage
    return f"phase {PHASES.index(stage) + 1} of {len(PHASES)}: {stage}"


class _LiveProgress:
    """Live display of a stage: the latest event of each kind in one panel."""

    def __init__(self, stage: str, steps: int, grafting: bool) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._stage, self._grafting = stage, grafting
        self._step: Event = {}
        self._evaluation: Event = {}
        self._work = ""
        self._started = time.monotonic()
        # The times are rows below it: beside a bar a narrow terminal would cut them.
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(None),
            TextColumn("{task.completed}/{task.total}"),
        )
        self._task = self._bar.add_task(stage, total=steps)

    def show(self, event: Event) -> None:
        """Take an event into the display, which is redrawn by the clock."""
        if event["event"] == "step":
            self._step |= event
        elif event["event"] == "eval":
            self._evaluation = event
        elif event["event"] == "prune":
            self._step["sparsity"] = event["sparsity"]
        self._work = event["work"] if event["event"] == "pruning" else ""
        if "step" in event:
            self._bar.update(self._task, completed=event["step"])

    def draw(self) -> Panel:
        """Draw the panel."""
        grid = Table.grid(padding=(0, 2))
        grid.add_row("[dim]elapsed[/]", str(timedelta(seconds=int(time.monotonic() - self._started))))
        left = describe_time_left()
        if left:
            grid.add_row("[dim]left[/]", left.replace(" left", ""))
        if self._work:
            grid.add_row("[dim]pruning[/]", self._work)
        for name, value in _step_rows(self._step, self._grafting):
            grid.add_row(f"[dim]{name}[/]", make_text(value))
        if self._evaluation:
            grid.add_row("[dim]last dev score[/]", make_text(_evaluation_text(self._evaluation)))
        draw = self._step.get("drawn")
        if draw and self._grafting:
            blocks = Text()
            for is_student in draw:
                blocks.append("■ " if is_student else "□ ", "green" if is_student else "blue")
            grid.add_row("[dim]layers of this draw[/]", blocks.append("■ student  □ teacher", "dim"))
        elif self._stage in PHASES and not self._grafting:
            grid.add_row("[dim]grafting[/]", "off in this recipe")
        return Panel(Group(self._bar, grid), title=f"spdtool {phase_title(self._stage)}", title_align="left")


class _PlainProgress:
    """Progress of a stage as plain lines: every event but the steps, of which one each `PLAIN_SECONDS`."""

    def __init__(self, stage: str, steps: int, grafting: bool) -> None:
        self._stage, self._steps, self._grafting = stage, steps, grafting
        self._printed_at = time.monotonic()

    def show(self, event: Event) -> None:
        """Print the line of an event, if it has one."""
        text = self._text(event)
        if text is not None:
            say(escape(f"{self._stage} {event.get('step', 0)}/{self._steps}  {text}"))

    def _text(self, event: Event) -> str | None:
        match event["event"]:
            case "eval":
                return f"dev {_evaluation_text(event)}"
            case "prune":
                text = f"pruned to {event['sparsity']:.4f}"
                if "clamped" in event:
                    text += f"; prune.least kept more of {len(event['clamped'])} matrices alive"
                return text
            case "student":
                return f"student saved at sparsity {event['sparsity']:g}: dev {format_scores(event['dev'])}"
            case "resume":
                return "resumed"
            case "step" if self._is_due():
                values = [f"{name} {value}" for name, value in _step_rows(event, self._grafting)]
                return "  ".join(filter(None, [*values, describe_time_left()]))
            case "pruning" if self._is_due():
                return f"pruning: {event['work']}; {describe_time_left()}"
        return None

    def _is_due(self) -> bool:
        """Whether a line of progress is to be printed now."""
        if time.monotonic() - self._printed_at <= PLAIN_SECONDS:
            return False
        self._printed_at = time.monotonic()
        return True


def _evaluation_text(event: Event) -> str:
    """Format a dev score; far below the train score beside it, the model has learnt the rows by heart."""
    text = format_scores(event["metrics"], best=event["best"])
    if "train" in event:
        text += f"  (train {event['train']['score']:.4f})"
    return text


def _step_rows(event: Event, grafting: bool) -> Iterator[tuple[str, str]]:
    if "epoch" in event:
        yield "epoch", f"{event['epoch']:.2f} of {event['epochs']:g}"
    if "losses" in event:
        losses = dict(event["losses"])
        total = losses.pop("loss", None)
        texts = [f"{name} {value:.4g}" for name, value in losses.items()]
        if total is not None:
            texts.insert(0, f"{total:.4g}")
        yield "loss", "  ".join(texts)
    if "examples_per_second" in event:
        yield "examples/s", f"{event['examples_per_second']:.1f}"
    if event.get("sparsity") is not None:
        yield "sparsity now", f"{event['sparsity']:.4f}"
    if grafting and event.get("replacing_rate") is not None:
        yield "replacing rate", f"{event['replacing_rate']:.3f}"
    if "learning_rate" in event:
        yield "learning rate", f"{event['learning_rate']:.2e}"
