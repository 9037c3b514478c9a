"""The console: tables, numbers, progress in lines and live, errors, JSON, untrusted text."""

from __future__ import annotations

import io
import json
import math
import re
import sys
import unicodedata
from typing import Any

import pytest
from rich.console import Console

from spdtool import console
from spdtool.errors import SpdError
from spdtool.run.forecast import Forecast, StageCost

LONG = "a path that is much longer than eighty columns/" * 5


@pytest.fixture
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output is not a terminal."""
    for name in ("COLUMNS", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    console.configure()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Both streams write to a terminal of 80 columns, whose text is returned."""
    screen = io.StringIO()
    display = Console(file=screen, force_terminal=True, width=80, height=24, highlight=False, color_system=None)
    monkeypatch.setattr(console, "_out", display)
    monkeypatch.setattr(console, "_err", display)
    monkeypatch.setattr(console, "_json", False)
    return screen


@pytest.mark.usefixtures("no_terminal")
def test_lines_are_not_wrapped_for_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    console.say(LONG)
    console.print_table(f"title {LONG}", ("name", "value"), [("row", LONG)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == LONG
    assert f"title {LONG}" in lines
    assert any(line.startswith("row") and LONG in line for line in lines)


@pytest.mark.usefixtures("no_terminal")
def test_a_requested_width_is_respected(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    console.configure()
    console.print_table("title", ("name", "value"), [("row", LONG)])
    assert max(map(len, capsys.readouterr().out.splitlines())) == 60


def test_lines_are_wrapped_at_words_on_a_terminal(terminal: io.StringIO) -> None:
    console.say("some words " * 20)
    lines = terminal.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert {word for line in lines for word in line.split()} == {"some", "words"}


@pytest.mark.usefixtures("no_terminal")
def test_columns_of_numbers_stand_on_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table(
        "t", ("engine", "bytes", "zeros", "what"), [("a", 1234567, "0.00%", "x"), ("b", None, "-", "longer")]
    )
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert "a       1,234,567  0.00%  x" in lines
    assert "b               -      -  longer" in lines


@pytest.mark.usefixtures("no_terminal")
def test_brackets_in_cells_titles_and_warnings_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table("runs/[red]x", ("name",), [("spdtool[cpu]",)])
    console.warn("pip install spdtool[cpu]")
    console.say(console.escape("spdtool[gpu]"))
    out, err = capsys.readouterr()
    assert "runs/[red]x" in out
    assert "spdtool[cpu]" in out
    assert "spdtool[gpu]" in out
    assert err == "note: pip install spdtool[cpu]\n"


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (None, "-"), (True, "True"), (1234567, "1,234,567"), (0.123456, "0.1235"), (12345.6, "12,346"), ("a", "a"),
        ((1, 8), "1, 8"), ([], "-"), (1e-8, "1e-08"),
    ],
)  # fmt: skip
def test_a_cell_as_text(cell: Any, text: str) -> None:
    assert console.format_cell(cell) == text


def test_with_json_standard_output_contains_only_json(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure(as_json=True)
    console.say("a line")
    console.print_table("a title", ("a",), [("cell",)])
    console.warn("a note")
    console.print_result({"score": math.nan, "all": (1, math.inf), "text": "ü"})
    out, err = capsys.readouterr()
    assert json.loads(out, parse_constant=pytest.fail) == {"score": None, "all": [1, None], "text": "ü"}
    assert all(text in err for text in ("a line", "a title", "cell", "a note"))


@pytest.mark.usefixtures("no_terminal")
def test_without_json_a_result_is_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_result({"score": 1})
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("no_terminal")
def test_an_error_is_printed_with_its_hint(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_error(SpdError("no [x] here", "give [y]"))
    assert capsys.readouterr() == ("", "SpdError: no [x] here\ntry: give [y]\n")


def test_an_error_as_a_panel(terminal: io.StringIO) -> None:
    console.print_error(SpdError("no [x] here", "give [y]"))
    assert "╭─ SpdError " in terminal.getvalue()
    assert "no [x] here" in terminal.getvalue()
    assert "try: give [y]" in terminal.getvalue()


def test_an_error_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure(as_json=True)
    console.print_error(SpdError("message"))
    assert json.loads(capsys.readouterr().out) == {"error": "SpdError", "message": "message", "hint": None}


EVENTS = [
    {"event": "resume", "step": 3},
    {"event": "prune", "step": 4, "sparsity": 0.25},
    {
        "event": "step", "step": 5, "epoch": 0.5, "epochs": 1.0, "losses": {"loss": 1.5, "hidden": 0.5},
        "examples_per_second": 12.34, "sparsity": 0.25, "replacing_rate": 0.8, "learning_rate": 1e-4,
        "drawn": [True, False],
    },
    {"event": "eval", "step": 10, "metrics": {"score": 0.75}, "best": True},
]  # fmt: skip


@pytest.mark.usefixtures("no_terminal")
def test_progress_in_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "PLAIN_SECONDS", -1.0)
    with console.progress("prune", 10) as watch:
        for event in EVENTS:
            watch(event)
    assert capsys.readouterr().out.splitlines() == [
        "prune 3/10  resumed",
        "prune 4/10  pruned to 0.2500",
        "prune 5/10  epoch 0.50 of 1  loss 1.5  hidden 0.5  examples/s 12.3  sparsity now 0.2500  "
        "replacing rate 0.800  learning rate 1.00e-04  under 1 min left of this stage",
        "prune 10/10  dev score 0.7500  best so far",
    ]


@pytest.mark.usefixtures("no_terminal")
def test_step_lines_are_few(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("prune", 10) as watch:
        for _ in range(100):
            watch(EVENTS[2])
    assert capsys.readouterr().out == ""


def test_progress_live(terminal: io.StringIO) -> None:
    with console.progress("prune", 10) as watch:
        for event in EVENTS:
            watch(event)
    output = terminal.getvalue()
    for text in (
        "phase 1 of 3: prune",
        "10/10",
        "0.50 of 1",
        "hidden 0.5",
        "score 0.7500  best so far",
        "■ □ ■ student",
    ):
        assert text in output
    assert max(len(line) for line in output.splitlines() if "│" in line and "\x1b" not in line) <= 80


def test_busy_prints_a_line_or_a_spinner(terminal: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    with console.busy("timing [x]"):
        pass
    assert "timing [x]" in terminal.getvalue()
    console.configure()
    with console.busy("timing [x]"):
        pass
    assert capsys.readouterr().out == "timing [x]\n"


# Untrusted text ------------------------------------------------------------------------------------------------------

HOSTILE = (
    "[/]",
    "[red]",
    "[link=http://example.org]x[/link]",
    "ends in a backslash\\",
    "two\\\\",
    ":warning:",
    "<b>bold</b>",
    "bell\x07 and \x1b[31mred\x1b[0m",
    "cleared\x1b[2J",
    "back\x08\x08\x08",
    "return\rspdtool: all is well",
    "\x9b31m",
    "right \u202eto left",
    "isolate \u2066x\u2069",
    "zero\u200bwidth",
    "line\u2028separator",
    "half \ud800 pair",
    "tag \U000e0041",
    "private \U000f0001",
    "two\nlines",
)
SPOKEN = {"[/]", "[red]", "[link=http://example.org]x[/link]", ":warning:", "<b>bold</b>"}  # printable as they are


def is_safe(text: str) -> bool:
    """Tell whether a printed text has no control characters except line feeds and tabs."""
    return not any(
        unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        for character in text
        if character not in "\n\t"
    )


@pytest.mark.usefixtures("no_terminal")
def test_markup_and_control_characters_in_text_are_printed_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    for text in HOSTILE:
        console.say(f"[bold]{console.escape(text)}[/] after")
        console.print_table(text, (text,), [(text,)])
        console.warn(text)
        console.print_error(SpdError(text, text))
        console.print_row({"label": text}, f"{text}\t0.9")
        with console.busy(text):
            pass
        out, err = capsys.readouterr()
        for stream in (out, err):
            assert is_safe(stream), repr(stream)
        if text in SPOKEN or text.endswith("\\"):
            assert f"{text} after\n" in out, text
        assert out.count(" after\n") == 1
        assert out.splitlines()[-2].endswith("\t0.9"), "a row takes one line"


def test_control_characters_do_not_reach_a_terminal(terminal: io.StringIO) -> None:
    for text in HOSTILE:
        console.say(f"[bold]{console.escape(text)}[/]")
        console.print_table(text, (text,), [(text,)])
        console.print_error(SpdError(text, text))
        with console.progress("prune", 10) as watch:
            watch({"event": "eval", "step": 1, "metrics": {text: 0.5}, "best": False})
            terminal.seek(0), terminal.truncate()
            terminal.write(str(console.make_text(text)))
        assert "\x1b[2J" not in terminal.getvalue()
        assert is_safe(terminal.getvalue().split("\x1b")[0]), text


def test_a_second_line_of_an_error_is_indented(no_terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    console.print_error(SpdError("label 'a\nnote: all is well'"))
    assert capsys.readouterr().err == "SpdError: label 'a\n  note: all is well'\n"


def test_json_escapes_control_characters_and_parses_to_the_same_text(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure(as_json=True)
    for text in HOSTILE:
        console.print_result({"label": text})
        out, _ = capsys.readouterr()
        assert json.loads(out) == {"label": text}
        assert is_safe(out), repr(out)


# Time left -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_terminal")
def test_a_stage_shows_the_remaining_time_of_all_stages(capsys: pytest.CaptureFixture[str]) -> None:
    costs = {"prune": StageCost(steps=10, step_seconds=60.0), "export": StageCost(other_seconds=600.0)}
    with console.forecast_run(Forecast(costs)):
        console.begin_stage("prune", "prune")
        console.begin_stage("export", "export")
    console.begin_stage("export", "export")
    assert capsys.readouterr().out.splitlines() == [
        "prune; about 20 min left", "export; about 10 min left", "export"
    ]  # fmt: skip


@pytest.mark.usefixtures("no_terminal")
def test_the_work_of_a_prune_event_is_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "PLAIN_SECONDS", -1)
    with (
        console.forecast_run(Forecast({"prune": StageCost(10, 6.0, ((5, 600.0),))})),
        console.progress("prune", 10, prune_events=[5]) as watch,
    ):
        watch({"event": "pruning", "step": 5, "work": "event 1 of 1, solving matrix 7 of 36"})
    line = "prune 5/10  pruning: event 1 of 1, solving matrix 7 of 36; about 10 min left\n"
    assert capsys.readouterr().out == line


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_live_display_keeps_its_times_at_any_width(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    screen = io.StringIO()
    display = Console(file=screen, force_terminal=True, width=width, height=30, highlight=False, color_system=None)
    monkeypatch.setattr(console, "_out", display)
    with console.forecast_run(Forecast({"prune": StageCost(10, 7200.0)})), console.progress("prune", 10) as watch:
        for event in EVENTS:
            watch(event)
        watch({"event": "pruning", "step": 10, "work": "event 2 of 2, solving matrix 7 of 36"})
    output = re.sub(r"[│\s]+", " ", screen.getvalue())
    for text in ("10/10", "elapsed 0:00:00", "left under 1 min", "solving matrix 7 of 36"):
        assert text in output, (width, text)


def test_text_that_an_encoding_lacks_is_spelt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"label": "caf\u00e9 \U0001f600"}
    for encoding, text in (("ascii", r"caf\xe9 \U0001f600"), ("latin-1", "caf\u00e9 \\U0001f600")):
        written = io.BytesIO()
        with monkeypatch.context() as patch:
            stream = io.TextIOWrapper(written, encoding=encoding)
            patch.setattr(sys, "stdout", stream)
            console.prepare_streams()
            for as_json in (False, True):
                console.configure(as_json=as_json)
                console.print_row(row, row["label"])
            console.configure()
            console.say(row["label"])
            stream.flush()
        line, json_line, said = written.getvalue().decode(encoding).splitlines()
        assert (line, json.loads(json_line), said) == (text, row, text), encoding
    console.configure()


def test_a_closed_standard_output_takes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    console.prepare_streams()
    console.configure(as_json=True)
    console.print_row({}, "")
    console.configure()
    console.say("a line")
    sys.stdout.close()
