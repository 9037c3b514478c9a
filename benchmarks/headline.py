"""Measure and draw the picture of the README: speed, size and score of students and of their dense teacher.

    python benchmarks/headline.py measure RUN:sparse-cpu RUN:sparse-cpu-int8 RUN:onnx --openvino-python PATH
    python benchmarks/headline.py draw                     draw docs/images/headline.svg and .png from the figures

`measure` writes docs/results/headline.json, then draws. Each RUN is a finished run whose `export` holds the target that
follows the colon; all have the same teacher. The first also has `export/onnx-int8/teacher`. OpenVINO's int8 form is
made here: the dense teacher, quantised statically by NNCF on training rows. PATH is an interpreter with both:

    python -m venv build/openvino && build/openvino/bin/pip install openvino nncf

OpenVINO chooses the precision of what is not int8 itself: bfloat16 where the CPU has AMX.

All engines are timed in interleaved rounds, with one thread each. A ratio is taken inside a round, against the faster
form (fused or unfused) of the dense model in onnxruntime. The JSON holds the median of the ratios and the 95 % interval
of this median. Scores are those of the whole dev set, or of `--score-rows`: a folder like the run's data, whose dev
rows picked nothing. A rival that changes its score by more than our own int8 budget is marked.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

ROOT = Path(__file__).parents[1]
DATA, IMAGES = ROOT / "docs/results/headline.json", ROOT / "docs/images"
WORKER = Path(__file__).with_name("openvino_worker.py")
DENSE, UNFUSED = "dense, onnxruntime fp32", "dense, onnxruntime fp32, unfused"
INT8, OPENVINO, OPENVINO_INT8 = "dense, onnxruntime int8", "dense, OpenVINO", "dense, OpenVINO int8"
SHAPES = ("1x32", "1x128", "8x128", "32x128")
CALIBRATION_ROWS = 300  # NNCF's own default for its subset
INT8_BUDGET = 0.005  # of the dev score, as for the int8 targets of spdtool
INK, MUTED, PAPER, GREY, TEAL = "#1f2328", "#59636e", "#fffffe", "#b7bec6", "#0a7d6c"
DARK = {INK: "#e6edf3", MUTED: "#9198a1", PAPER: "#0d1117", GREY: "#4d5661", TEAL: "#2bb3a0"}


# ---------------------------------------------------------------------------------------------------- measure


def processor() -> str:
    """Return the name of the CPU and its instruction sets for int8 and float32 products."""
    file = Path("/proc/cpuinfo")
    text = file.read_text() if file.exists() else ""
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.*)$", text, re.MULTILINE)
    cpu_flags = set(flags.group(1).split()) if flags else set()
    notable = {"AVX2": "avx2", "AVX-512": "avx512f", "VNNI": "avx512_vnni", "AVX-VNNI": "avx_vnni", "AMX": "amx_int8"}
    sets = [label for label, flag in notable.items() if flag in cpu_flags]
    return f"{name.group(1) if name else platform.processor()} ({', '.join(sets)})"


def median_and_interval(ratios: np.ndarray) -> list[float]:
    """Return the median of some ratios and the 95 % interval of that median, by order statistics."""
    rank = max(1, int(stats.binom.ppf(0.025, len(ratios), 0.5)))
    ordered = np.sort(ratios)
    return [round(float(value), 3) for value in (np.median(ordered), ordered[rank - 1], ordered[-rank])]


def save_rows(rows: Any, file: Path) -> None:
    """Write tokenised rows as flat arrays, for an interpreter without spdtool."""
    arrays: dict[str, Any] = {name: np.asarray(flat) for name, flat in rows.columns.items()}
    np.savez(file, offsets=np.asarray(rows.offsets), **arrays)


def onnx_file(folder: Path) -> Path:
    """Return the one ONNX file of an exported folder.

    Raises:
        SystemExit: there is none, or more than one.
    """
    files = sorted(folder.rglob("*.onnx"))
    if len(files) != 1:
        sys.exit(f"{folder} holds {len(files)} ONNX files, not one: export this target first")
    return files[0]


def openvino_logits(python: str, model: Path, rows: Any, scratch: Path) -> np.ndarray:
    """Return the logits of rows in OpenVINO, [rows, labels]."""
    save_rows(rows, scratch / "rows.npz")
    subprocess.run([python, WORKER, "logits", model, scratch / "rows.npz", scratch / "logits.npy"], check=True)
    logits: np.ndarray = np.load(scratch / "logits.npy")
    return logits


def describe_student(recipe: Any, target: str) -> str:
    """Return the name of a student: what is missing of it, and what runs it."""
    prune = recipe.prune
    if prune.is_structured:
        return f"student, fewer heads and neurons, {target}"
    zeros = f"student, {recipe.sparsity:.0%} zeros"
    return f"{zeros}, {target}" if prune.pattern == "unstructured" else f"{zeros} in {prune.pattern}, {target}"


def open_student(name: str, dense: Any) -> Any:
    """Return the engine of `RUN:TARGET`, by its name in the picture.

    Raises:
        SystemExit: the run does not hold the target.
    """
    from spdtool.export.target import get_target
    from spdtool.run.folder import Run

    folder, _, target = name.rpartition(":")
    exported = Path(folder) / "export"
    student = exported / "student" if target == "onnx" else exported / target / "student"
    if not student.is_dir():
        sys.exit(f"{student} is not there: export this target first")
    libraries = tuple(map(str, get_target(target).libraries(student)))
    runtime = "onnxruntime fp32" if target == "onnx" else target
    label = describe_student(Run.open(Path(folder)).recipe, runtime)
    return replace(dense, name=label, path=str(onnx_file(student)), libraries=libraries)


@dataclass
class Lineup:
    """The engines that are timed, with the score and the bytes of each by its name."""

    engines: list[Any]
    students: list[Any]
    scores: dict[str, float]
    sizes: dict[str, int]

    def add_openvino(self, python: str, dense: Any, dev: Any, scratch: Path) -> None:
        """Add the dense model in OpenVINO, as it is and quantised to int8; `scratch` keeps what is made for it."""
        int8 = scratch / "int8.xml"
        save_rows(dev.calibration_rows, scratch / "train.npz")
        subprocess.run([python, WORKER, "quantize", dense.path, scratch / "train.npz", int8], check=True)
        for name, model in ((OPENVINO, Path(dense.path)), (OPENVINO_INT8, int8)):
            outputs = {split: openvino_logits(python, model, rows, scratch) for split, rows in dev.splits.items()}
            self.scores[name] = dev.task.score_splits(outputs, dev.splits)["score"]
            self.sizes[name] = sum(file.stat().st_size for file in model.parent.glob(f"{model.stem}.*"))
            self.engines.append(
                replace(dense, name=name, path=str(model), command=(python, str(WORKER), "serve-rounded"))
            )

    def describe(self, engine: Any, times: dict[str, Any], shapes: list[Any]) -> dict[str, Any]:
        """Return the row of an engine in the JSON file; `times` has milliseconds by name, shape and round."""
        name = engine.name
        speeds = {}
        for shape in shapes:
            fastest = min((DENSE, UNFUSED), key=lambda form: np.median(times[form][shape]))
            engine_times = np.array(times[fastest if name == DENSE else name][shape])
            ratios = np.array(times[fastest][shape]) / engine_times
            speeds[str(shape)] = {
                "ms": round(float(np.median(engine_times)), 4),
                "speed": median_and_interval(ratios),
            }
        is_student = engine in self.students
        return {
            "name": name,
            "is_student": is_student,
            "bytes": self.sizes[name],
            "score": self.scores[name],
            "over_budget": not is_student and abs(self.scores[name] - self.scores[DENSE]) > INT8_BUDGET,
            "speeds": speeds,
        }


def measure(names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Time and score every engine; return the content of the JSON file."""
    from spdtool.bench import engines, latency
    from spdtool.export import onnx_session
    from spdtool.export.gates.reference import prepare_dev_sets
    from spdtool.models import predict
    from spdtool.run.folder import Run

    run_folder = Path(names[0].rpartition(":")[0])
    recipe = Run.open(run_folder).recipe
    if options.score_rows is not None:
        recipe = recipe.model_copy(update={"data": str(options.score_rows)})
    exported = run_folder / "export"
    config = json.loads((exported / "teacher/config.json").read_text("utf-8"))
    export_section = recipe.export.model_copy(update={"calibration": CALIBRATION_ROWS})
    dev = prepare_dev_sets(run_folder / "teacher", recipe.model_copy(update={"export": export_section}))
    assert dev.task is not None  # the recipe of a run names one
    dense = engines.Engine(
        name=DENSE,
        kind="onnxruntime",
        path=str(onnx_file(exported / "teacher")),
        vocabulary=config["vocab_size"],
        pad=config.get("pad_token_id") or 0,
    )
    int8 = replace(dense, name=INT8, path=str(onnx_file(exported / "onnx-int8/teacher")))
    students = [open_student(name, dense) for name in names]
    lineup = Lineup([dense, replace(dense, name=UNFUSED, fused=False), int8, *students], students, {}, {})
    for engine in lineup.engines:
        session = onnx_session.open_session(Path(engine.path), "cpu", 0, engine.libraries, fused=engine.fused)
        lineup.scores[engine.name] = predict.evaluate(dev.task, predict.onnx_forward(session), dev.splits)["score"]
        lineup.sizes[engine.name] = Path(engine.path).stat().st_size
    shapes = [
        engines.Shape(int(batch), int(length)) for batch, length in (shape.split("x") for shape in options.shapes)
    ]
    with tempfile.TemporaryDirectory() as folder:
        if options.openvino_python is not None:
            lineup.add_openvino(options.openvino_python, dense, dev, Path(folder))
        timing_result = latency.time_engines(
            lineup.engines, shapes, threads=(1,), rounds=options.rounds, warmup=1, seconds=options.seconds
        )
    times = {timing.engine.name: timing.rounds for timing in timing_result.timings}
    shown = sorted((engine for engine in lineup.engines if engine.name != UNFUSED), key=lambda row: row in students)
    layers, width = config["num_hidden_layers"], config["hidden_size"]
    return {
        "cpu": processor(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/headline.py measure RUN:TARGET ... --openvino-python PATH --score-rows FOLDER",
        "task": recipe.task,
        "metrics": list(dev.task.dataset.metrics),
        "dev_rows": len(dev.splits["dev"]),
        "unseen_rows": options.score_rows is not None,
        "model": f"{layers} layers, width {width}",
        "recipe": recipe.name,
        "threads": 1,
        "rounds": len(next(iter(times[DENSE].values()))),
        "engines": [lineup.describe(engine, times, shapes) for engine in shown],
    }


# ------------------------------------------------------------------------------------------------------- draw


@dataclass(frozen=True)
class Column:
    """One panel: for each engine (value, smallest, largest), None if not measured, and the text at its bar."""

    title: str
    bars: list[tuple[float, float, float] | None]
    texts: list[str]


def bars(axes: Any, column: Column, colours: list[str]) -> None:
    """Draw a horizontal bar for each engine, first one on top, with its interval and its text at the end."""
    ends = [0.0 if bar is None else max(bar) for bar in column.bars]
    reach = max(ends)
    for row, (bar, end, text, colour) in enumerate(zip(column.bars, ends, column.texts, colours, strict=True)):
        if bar is None:
            axes.text(0.02 * reach, row, "not measured", va="center", color=MUTED, fontsize=8.5)
            continue
        value, smallest, largest = bar
        axes.barh(row, value, height=0.62, color=colour)
        axes.plot([smallest, largest], [row, row], color=INK, linewidth=1.2, solid_capstyle="butt")
        weight = "bold" if colour == TEAL else "normal"
        axes.text(end + 0.03 * reach, row, text, va="center", color=INK, fontsize=9, fontweight=weight)
    axes.set_title(column.title, loc="left", color=INK, fontsize=9.5, fontweight="bold")
    axes.set_xlim(0, 1.5 * reach)
    axes.set_ylim(len(ends) - 0.4, -0.6)
    axes.set_facecolor("none")
    axes.set_xticks([])
    axes.tick_params(length=0)
    for spine in ("top", "right", "bottom"):
        axes.spines[spine].set_visible(False)
    axes.spines["left"].set_color(GREY)


def columns_of(measured: dict[str, Any], shape: str) -> list[Column]:
    """Return the panels with measurements: speed, size and score."""
    engines = measured["engines"]
    speeds = [tuple(engine["speeds"][shape]["speed"]) for engine in engines]
    columns = [Column(f"Speed, {shape}", list(speeds), [f"{speed[0]:.1f}x" for speed in speeds])]
    for title, key, factor, form in (("Model file", "bytes", 1e-6, "{:.3g} MB"), ("Score", "score", 100, "{:.1f}")):
        scaled, texts = [], []
        for engine in engines:
            value = engine[key]
            scaled.append(None if value is None else (factor * value,) * 3)
            texts.append("" if value is None else form.format(factor * value))
            if key == "score" and engine["over_budget"]:
                texts[-1] += "*"
        columns.append(Column(title, scaled, texts))
    return [column for column in columns if any(column.bars)]


def notes_of(measured: dict[str, Any]) -> str:
    """Return the notes below the picture: model, task, machine, and the meaning of the marks."""
    threads = "one thread" if measured["threads"] == 1 else f"{measured['threads']} threads"
    first = f"{measured['model']}; "
    if measured["task"]:
        rows = f"{measured['dev_rows']} " + ("rows that picked nothing" if measured["unseen_rows"] else "dev rows")
        first += f"{measured['task'].upper()}, {rows}, recipe {measured['recipe']}"
    else:
        first += "random weights"
    second = f"{measured['cpu']}, {threads}"
    third = "1x is the faster dense form in onnxruntime"
    if measured["rounds"]:
        third += f"; lines: 95 % interval of the median of {measured['rounds']} rounds"
    if any(engine["over_budget"] for engine in measured["engines"]):
        third += f"; * changes the score by more than {100 * INT8_BUDGET:g} points"
    return f"{first}\n{second}\n{third}"


def figure_of(measured: dict[str, Any], shape: str) -> Any:
    """Draw speed, size and score side by side; return the matplotlib figure."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.hashsalt": "spdtool", "font.family": "DejaVu Sans", "font.size": 9.5}
    engines = measured["engines"]
    colours = [TEAL if engine["is_student"] else GREY for engine in engines]
    columns = columns_of(measured, shape)
    figure = Figure(figsize=(8.4, 1.4 + 0.4 * len(engines)), facecolor=PAPER)
    panels = figure.subplots(1, len(columns), sharey=True)
    height = figure.get_figheight()
    # inches of the titles above and of the notes below do not depend on the number of bars
    figure.subplots_adjust(left=0.365, right=0.99, top=1 - 0.38 / height, bottom=0.7 / height, wspace=0.1)
    for panel, column in zip(panels, columns, strict=True):
        bars(panel, column, colours)
        panel.tick_params(axis="y", labelleft=panel is panels[0])
    panels[0].set_yticks(range(len(engines)), [engine["name"] for engine in engines])
    panels[0].tick_params(axis="y", labelcolor=INK)
    figure.text(0.012, 0.03, notes_of(measured), color=MUTED, fontsize=7.5, linespacing=1.5)
    return figure


def adapt_to_dark(svg: str) -> str:
    """Return an SVG whose colours follow the reader's light or dark setting."""
    rules = "".join(f"--c{number}:{colour};" for number, colour in enumerate(DARK))
    dark = "".join(f"--c{number}:{colour};" for number, colour in enumerate(DARK.values()))
    for number, colour in enumerate(DARK):
        svg = svg.replace(colour, f"var(--c{number})")
    style = f"<style>:root{{{rules}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    start = svg.index(">", svg.index("<svg")) + 1
    return svg[:start] + style + svg[start:]


def draw(measured: dict[str, Any], shape: str, folder: Path) -> list[Path]:
    """Write headline.svg and headline.png to a folder; return both."""
    figure = figure_of(measured, shape)
    svg, png = folder / "headline.svg", folder / "headline.png"
    figure.savefig(svg, metadata={"Date": None, "Creator": None})
    svg.write_text(adapt_to_dark(svg.read_text("utf-8")), "utf-8")
    figure.savefig(png, dpi=200, metadata={"Software": None})
    return [svg, png]


def main() -> None:
    """Measure and draw, or draw stored measurements."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("measure", "draw"))
    parser.add_argument("students", nargs="*", metavar="RUN:TARGET", help="run folder and target, for `measure`")
    parser.add_argument("--openvino-python", help="interpreter with openvino and nncf; without it that row is missing")
    parser.add_argument("--score-rows", type=Path, help="folder whose dev rows give the scores (default: the run's)")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="batch x length")
    parser.add_argument("--shape", default="1x128", help="the one in the picture")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=300.0, help="for all rounds")
    parser.add_argument("--data", type=Path, default=DATA, help="file that the figures are written to, or read from")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of headline.svg and headline.png")
    options = parser.parse_args()
    if options.what == "measure":
        if not options.students:
            parser.error("measure needs at least one RUN:TARGET")
        measured = measure(options.students, options)
        options.data.parent.mkdir(parents=True, exist_ok=True)
        options.data.write_text(json.dumps(measured, indent=2) + "\n", "utf-8")
    for file in draw(json.loads(options.data.read_text("utf-8")), options.shape, options.images):
        print(file)


if __name__ == "__main__":
    main()
