"""Measure a GPU and spdtool on it, in one process, within a number of seconds.

    python benchmarks/gpu.py --budget 330 --out part1.jsonl
    python benchmarks/gpu.py --part 2 --budget 240 --out part2.jsonl
    python benchmarks/gpu.py --device cpu --tiny            # the same code, in seconds, without a GPU

The clock is looked at before each item: one that would not end in time is skipped. What is expected of an item is
printed before it runs, what was measured at once after it, each as one line of JSON. The table comes last. An item that
needs what is not installed says so; the others go on. `--only` and `--skip` choose items by name. `--vendor` adds a
folder of packages, for a machine without pydantic.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # its other files, also where this one is imported by its path
sys.path.append(str(Path(__file__).parents[1]))  # spdtool itself, where it is not installed

NEEDED = (
    "torch", "transformers", "onnx", "onnxruntime", "onnxscript", "pydantic", "datasets", "accelerate", "tokenizers",
    "safetensors", "sklearn", "scipy", "spdtool",
)  # fmt: skip
MARGIN = 5.0  # seconds that the table and the last line need


class NotAvailableError(Exception):
    """What an item needs is not here; its text says what."""


@dataclass
class Context:
    """What every item is given.

    Attributes:
        device: `cuda` or `cpu`. tiny: toy sizes, as the tests use.
        folder: for files of items; it is removed at the end.
        measured: figures of the items before, by name.
    """

    device: str
    tiny: bool
    folder: Path
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """One measurement.

    Attributes:
        seconds: what it takes at most on an H200; the guard compares it with what is left.
        expected: figure to what is expected of it on an H200, written down before it was ever run.
    """

    name: str
    seconds: float
    expected: dict[str, str]
    measure: Callable[[Context], dict[str, Any]]


def main(arguments: list[str] | None = None) -> int:
    """Run the items of one part; return 0, or 1 if any of them failed."""
    options = read_options(arguments)
    start = time.monotonic()
    if options.vendor:
        sys.path.append(str(options.vendor))
    lines = Lines(options.out)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    lines.write({"part": options.part, "budget": options.budget, "device": options.device, "not_installed": missing})
    with tempfile.TemporaryDirectory() as folder:
        context = Context(options.device, options.tiny, Path(folder))
        for item in choose_items(options):
            seconds_left = options.budget - MARGIN - (time.monotonic() - start)
            lines.write(run_item(item, context, seconds_left, lines))
    print(render_table(lines.results))
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
    return parser.parse_args(arguments)


class Lines:
    """Write each result as a line at once, so that a killed process leaves what it has measured."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.results: list[dict[str, Any]] = []

    def write(self, line: dict[str, Any]) -> None:
        """Write one line to standard output, and to the file."""
        text = json.dumps(line, default=str)
        print(text, flush=True)
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(text + "\n")
        if "item" in line and "about_to_run" not in line:
            self.results.append(line)


def choose_items(options: argparse.Namespace) -> list[Item]:
    """List the items of a part; their modules import neither torch nor spdtool at the top."""
    import gpu_items
    import gpu_spdtool_items

    first = [*gpu_items.FIRST, *gpu_spdtool_items.FIRST]
    items = first if options.part == 1 else [*gpu_items.SECOND, *gpu_spdtool_items.SECOND]
    chosen = []
    for item in items:
        if item.name not in options.skip and (not options.only or item.name in options.only):
            chosen.append(item)
    return chosen


def run_item(item: Item, context: Context, seconds_left: float, lines: Lines) -> dict[str, Any]:
    """Run one item unless the time does not suffice; return its line."""
    if item.seconds > seconds_left and not context.tiny:
        return {"item": item.name, "skipped": f"it may take {item.seconds:.0f} s, and {seconds_left:.0f} s are left"}
    lines.write({"item": item.name, "about_to_run": True, "expected": item.expected})
    start = time.monotonic()
    result: dict[str, Any] = {"item": item.name}
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no line of JSON
            result["measured"] = item.measure(context)
        context.measured[item.name] = result["measured"]
    except NotAvailableError as reason:
        result["not_available"] = str(reason)
    except ImportError as error:
        result["not_available"] = f"{error.name or 'a module'} is not installed: {error}"
    except Exception as error:  # one broken item must not cost the others their time
        result["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    result["seconds"] = round(time.monotonic() - start, 2)
    return result


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
        for items in (gpu_items.FIRST, gpu_items.SECOND, gpu_spdtool_items.FIRST, gpu_spdtool_items.SECOND):
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
