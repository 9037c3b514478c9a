"""Measure a small student for browsers: its bytes, its speed in onnxruntime-web, and whether that gives its answers.

    npm install onnxruntime-web                                       # where the script is started, or set NODE_PATH
    spdtool compress --task sst2 --data GLUE --model all-MiniLM-L6-v2 --speedup 3 --on web \\
        --set finetune.vocabulary=data --set 'export.optional=["onnx-int8"]' --run runs/browser
    python benchmarks/browser.py runs/browser --rows 200 --shapes 1x32,1x128

Prints JSON. `bytes` are those of the ONNX files, and `smaller` how many times smaller the student's int8 file is than
the teacher's float32 one. `speed` has the ratio of the teacher's time to the student's in the same form, of interleaved
rounds in onnxruntime-web under Node.js, with the 95 % interval of the median. `flipped` counts the dev rows whose
prediction by the student's int8 file differs between onnxruntime-web and plain onnxruntime, and `difference` is the
largest difference of their logits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from spdtool.bench.engines import Engine, Shape
from spdtool.bench.latency import time_engines
from spdtool.bench.ratios import median_ms, paired_ratio
from spdtool.bench.runtimes import run_in, runtime_version
from spdtool.data.tokens import tokenize
from spdtool.export.target import MODEL_FILE
from spdtool.models.load import load_tokenizer
from spdtool.run.fingerprint import describe_processor
from spdtool.run.folder import Run
from spdtool.tasks.prepare import find_task

LOGITS = Path(__file__).parents[1] / "tests/clients/onnxruntime_web.mjs"
FORMS = {"fp32": "", "int8": "onnx-int8"}  # to the folder of the target under export/
WARMUP = 2


def list_files(run: Path) -> dict[tuple[str, str], Path]:
    """Map form and role to the ONNX file of a run."""
    files = {}
    for form, target in FORMS.items():
        for role in ("teacher", "student"):
            files[form, role] = run / "export" / target / role / MODEL_FILE
    return files


def time_in_web(
    files: Mapping[tuple[str, str], Path], shapes: Sequence[Shape], *, threads: int, rounds: int, seconds: float
) -> dict[str, Any]:
    """Time every file in onnxruntime-web; return the speed of the student over the teacher by form and shape."""
    engines = []
    for (form, role), file in files.items():
        config = json.loads((file.parents[1] / "config.json").read_text("utf-8"))
        pad = config.get("pad_token_id") or 0
        engine = Engine(f"{form} {role}", "onnxruntime", str(file), config["vocab_size"], pad)
        engines.append(run_in(engine, "web"))
    result = time_engines(engines, shapes, threads=(threads,), rounds=rounds, warmup=WARMUP, seconds=seconds)
    timings = {timing.engine.name: timing for timing in result.timings}
    figures: dict[str, Any] = {}
    for form in FORMS:
        teacher, student = timings[f"{form} teacher"], timings[f"{form} student"]
        for shape in shapes:
            ratio = paired_ratio([teacher], student, [shape])
            figures.setdefault(form, {})[str(shape)] = {
                "teacher_ms": round(median_ms(teacher.rounds[shape]), 2),
                "student_ms": round(median_ms(student.rounds[shape]), 2),
                "speed": [round(value, 2) for value in (ratio.median, ratio.low, ratio.high)],
                "rounds": len(student.rounds[shape]),
            }
    return figures


def compare_answers(file: Path, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Any]:
    """Run rows through a file in onnxruntime-web and in plain onnxruntime, one by one, and compare the logits."""
    words = ["node", str(LOGITS), str(file)]
    request = json.dumps(list(rows))
    process = subprocess.run(words, input=request, capture_output=True, text=True, check=True)
    in_web = np.array(json.loads(process.stdout)["logits"])
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    plain = []
    for row in rows:
        plain.append(session.run(None, {name: np.array([row[name]], np.int64) for name in names})[0])
    logits = np.concatenate(plain)
    return {
        "rows": len(rows),
        "flipped": int((in_web.argmax(1) != logits.argmax(1)).sum()),
        "difference": float(np.abs(in_web - logits).max()),
    }


def read_dev_rows(run: Run, count: int) -> list[dict[str, list[int]]]:
    """Tokenize the first dev rows with the tokenizer of the student."""
    recipe = run.recipe.without_unlabeled()
    rows = find_task(recipe).read_rows(recipe)["dev"]
    rows = rows.select(range(min(count, len(rows))))
    encoded = tokenize(load_tokenizer(run.path / "export/student"), rows, recipe.max_length)
    batches = [encoded.collate(np.array([index])) for index in range(len(rows))]
    return [{name: values[0].tolist() for name, values in batch.items()} for batch in batches]


def read_shape(text: str) -> Shape:
    """Read a shape such as 1x128."""
    batch, length = text.split("x")
    return Shape(int(batch), int(length))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run that exported onnx-int8")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--shapes", default="1x32,1x128")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    run = Run.open(options.run)
    files = list_files(run.path)
    sizes = {" ".join(key): file.stat().st_size for key, file in files.items()}
    shapes = [read_shape(text) for text in options.shapes.split(",")]
    figures = {
        "web": runtime_version("web"),
        "processor": describe_processor(),
        "threads": options.threads,
        "bytes": sizes,
        "smaller": round(sizes["fp32 teacher"] / sizes["int8 student"], 2),
        "answers": compare_answers(files["int8", "student"], read_dev_rows(run, options.rows)),
        "speed": time_in_web(files, shapes, threads=options.threads, rounds=options.rounds, seconds=options.seconds),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
