"""Measure a GPU and spdtool on it, in one process, within a number of seconds.

    python benchmarks/gpu.py --budget 330 --out part1.jsonl
    python benchmarks/gpu.py --part 2 --budget 240 --out part2.jsonl
    python benchmarks/gpu.py --device cpu --tiny            # the same code, in seconds, without a GPU

The clock is looked at before each item: one that would not end in time is skipped, and one that does not end is broken
off. What is expected of an item is printed before it runs, what was measured at once after it, each as one line of
JSON. The table comes last. The first line says what is not installed, and which items need it; the others go on.
`--only` and `--skip` choose items by name. `--vendor` adds a folder of packages, for a machine without pydantic.
spdtool itself need not be installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).parent))  # its other files, also where this one is imported by its path

from gpu_guard import Guard, add_packages, device_is_lost, is_missing, read_state, tidy_up, write_state

MARGIN = 5.0  # seconds that the table and the last line need
PATIENCE = 2.0  # times its own estimate, an item is broken off
STATE = "state.json"


class NotAvailableError(Exception):
    """What an item needs is not here; its text says what."""


@dataclass
class Context:
    """What every item is given.

    Attributes:
        device: `cuda` or `cpu`. tiny: toy sizes, as the tests use.
        folder: for files of items; it is removed at the end.
        measured: figures of the items before, by name.
        figures: of the running item. It adds them one by one: they are reported also if it does not end.
        deadline: of the running item, by `time.monotonic`.
    """

    device: str
    tiny: bool
    folder: Path
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    deadline: float = math.inf

    def has_time(self, seconds: float) -> bool:
        """Whether a further row of the running item, which takes so long, ends before the item is broken off."""
        return time.monotonic() + (0.0 if self.tiny else seconds) < self.deadline


@dataclass(frozen=True)
class Item:
    """One measurement.

    Attributes:
        seconds: what it is expected to take on an H200; the guard compares it with what is left.
        expected: figure to what is expected of it on an H200, written down before it was ever run.
        needs: packages without which it is not even begun.
    """

    name: str
    seconds: float
    expected: dict[str, str]
    measure: Callable[[Context], dict[str, Any]]
    needs: tuple[str, ...] = ()


def main(arguments: list[str] | None = None) -> int:
    """Run the items of one part; return 0, or 1 if any of them failed.

    Args:
        arguments: of the command line; None: this process is the script's alone, and may be started anew.
    """
    options = read_options(arguments)
    end = time.monotonic() + options.budget
    lines = Lines(options.out)
    if options.resume is not None:
        state = read_state(options.resume / STATE)
        lines.results, end = state["results"], time.monotonic() + state["end"] - time.time()
        shutil.rmtree(options.resume, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        add_packages(folder, options.vendor)
        items = choose_items(options)
        if options.resume is None:
            lines.write(describe_call(options, items))
        context = Context(options.device, options.tiny, folder)
        for result in lines.results:
            context.measured[result["item"]] = result.get("measured", {})

        def save() -> list[str]:
            write_state(folder / STATE, lines.results, end - time.monotonic())
            return ["--resume", str(folder)]

        guard = Guard(save, lines.write, can_restart=arguments is None)
        done = {result["item"] for result in lines.results}
        for item in items:
            if item.name not in done:
                lines.write(run_item(item, context, end - MARGIN - time.monotonic(), lines, guard))
                if device_is_lost(options.device):
                    guard.restart()
    print(render_table(lines.results), flush=True)
    return int(any("error" in result for result in lines.results))


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=330.0, help="seconds of this call")
    parser.add_argument("--part", type=int, choices=(1, 2), default=1)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--out", type=Path, help="file for the lines of JSON, besides standard output")
    parser.add_argument("--only", nargs="*", default=[], help="items to run; none: all of the part")
    parser.add_argument("--skip", nargs="*", default=[], help="items to leave out")
    parser.add_argument("--vendor", type=Path, help="folder of further Python packages")
    parser.add_argument("--resume", type=Path, help=argparse.SUPPRESS)  # given by the script to itself
    return parser.parse_args(arguments)


def describe_call(options: argparse.Namespace, items: list[Item]) -> dict[str, Any]:
    """Return the first line: what is asked for, what is not installed, and what cannot be measured without it."""
    needed = dict.fromkeys(package for item in items for package in item.needs)
    missing = [package for package in needed if is_missing(package)]
    without = {}
    for item in items:
        lacking = [package for package in item.needs if package in missing]
        if lacking:
            without[item.name] = lacking
    return {
        "part": options.part,
        "budget": options.budget,
        "device": options.device,
        "not_installed": missing,
        "cannot_run": without,
    }


class Lines:
    """Write each result as a line at once, so that a killed process leaves what it has measured."""

    def __init__(self, file: Path | None, stream: TextIO | None = None) -> None:
        self.file = file
        # while an item runs, `sys.stdout` is another one
        self.stream = stream or sys.stdout
        self.results: list[dict[str, Any]] = []

    def write(self, line: dict[str, Any]) -> None:
        """Write one line to standard output, and to the file."""
        text = json.dumps(line, default=str)
        print(text, file=self.stream, flush=True)
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(text + "\n")
        if "item" in line and "about_to_run" not in line:
            self.results.append(line)


def choose_items(options: argparse.Namespace) -> list[Item]:
    """List the items of a part; their modules import neither torch nor spdtool at the top."""
    import gpu_items
    import gpu_spdtool_items

    first = [*gpu_items.FIRST, *gpu_spdtool_items.FIRST, *gpu_items.LAST]
    items = first if options.part == 1 else [*gpu_items.SECOND, *gpu_spdtool_items.SECOND]
    chosen = []
    for item in items:
        if item.name not in options.skip and (not options.only or item.name in options.only):
            chosen.append(item)
    return chosen


def run_item(item: Item, context: Context, seconds_left: float, lines: Lines, guard: Guard) -> dict[str, Any]:
    """Run one item unless the time does not suffice, or a package is missing; return its line."""
    if (item.seconds > seconds_left and not context.tiny) or seconds_left <= 0:
        return {"item": item.name, "skipped": f"it may take {item.seconds:.0f} s, and {seconds_left:.0f} s are left"}
    missing = [package for package in item.needs if is_missing(package)]
    if missing:
        return {"item": item.name, "not_available": f"not installed: {', '.join(missing)}"}
    lines.write({"item": item.name, "about_to_run": True, "expected": item.expected})
    limit = seconds_left if context.tiny else min(PATIENCE * item.seconds, seconds_left)
    start = time.monotonic()
    context.figures, context.deadline = {}, start + limit
    result: dict[str, Any] = {"item": item.name}
    try:
        # what libraries print is no line of JSON
        with contextlib.redirect_stdout(sys.stderr), guard.limit(item.name, limit, context.figures):
            result["measured"] = item.measure(context)
        context.measured[item.name] = result["measured"]
    except NotAvailableError as reason:
        result["not_available"] = str(reason)
    except ImportError as error:
        result["not_available"] = f"{error.name or 'a module'} is not installed: {error}"
    except Exception as error:  # one broken item must not cost the others their time
        result["error"] = describe_error(error)
    if context.figures:  # also of an item that was broken off
        result.setdefault("measured", context.figures)
    with contextlib.suppress(Exception):  # a lost device, which is looked for next
        tidy_up(context.device)
    result["seconds"] = round(time.monotonic() - start, 2)
    return result


def describe_error(error: BaseException) -> str:
    """Return the kind and first line of an error, and the last line of this project that it came through."""
    first_line = str(error).splitlines()[0] if str(error) else ""
    text, traceback = f"{type(error).__name__}: {first_line}", error.__traceback__
    place = ""
    while traceback is not None:
        file = Path(traceback.tb_frame.f_code.co_filename)
        if "spdtool" in file.parts or file.parent == Path(__file__).parent:
            place = f" ({file.name}:{traceback.tb_lineno})"
        traceback = traceback.tb_next
    return text + place


def render_table(results: list[dict[str, Any]]) -> str:
    """Format every figure and its expected value as a Markdown table."""
    rows = ["| item | figure | measured | expected |", "|---|---|---|---|"]
    expected: dict[str, dict[str, str]] = {}
    for result in results:
        name = result["item"]
        for state in ("skipped", "not_available", "error"):
            if state in result:
                rows.append(f"| {name} | {state.replace('_', ' ')} | {result[state]} | |")
        for figure, value in flatten(result.get("measured", {})):
            rows.append(f"| {name} | {figure} | {value} | {expected_of(name, figure, expected)} |")
    return "\n".join(rows)


def expected_of(name: str, figure: str, cache: dict[str, dict[str, str]]) -> str:
    """Return the expected value of a figure, found by the longest matching prefix of its name."""
    import gpu_items
    import gpu_spdtool_items

    if not cache:
        parts = (gpu_items.SECOND, gpu_spdtool_items.SECOND, gpu_items.FIRST, gpu_spdtool_items.FIRST, gpu_items.LAST)
        for items in parts:
            cache.update({item.name: item.expected for item in items})
    beginnings = [key for key in cache.get(name, {}) if figure.startswith(key)]
    return cache[name][max(beginnings, key=len)] if beginnings else ""


def flatten(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested figures as `outer inner` and text."""
    rows = []
    for key, inner in value.items():
        name = f"{prefix} {key}".strip()
        if isinstance(inner, dict):
            rows += flatten(inner, name)
        else:
            rows.append((name, f"{inner:.4g}" if isinstance(inner, float) else str(inner)))
    return rows


if __name__ == "__main__":
    sys.modules.setdefault("gpu", sys.modules["__main__"])  # the items import its classes from here
    raise SystemExit(main())
