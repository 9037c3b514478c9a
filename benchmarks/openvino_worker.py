"""Run OpenVINO as an engine of `spdtool.bench.engines`; needs an interpreter with openvino and nncf, not spdtool.

    python benchmarks/openvino_worker.py                                  answer requests of spdtool.bench.engines
    python benchmarks/openvino_worker.py serve-rounded                    the same, in the precision it prefers
    python benchmarks/openvino_worker.py quantize MODEL ROWS.npz OUT.xml  static int8 by NNCF, calibrated on rows
    python benchmarks/openvino_worker.py logits MODEL ROWS.npz OUT.npy    logits of rows, in the precision it prefers

ROWS.npz holds `offsets` and flat columns such as `input_ids`; row i is `column[offsets[i]:offsets[i + 1]]`.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from deepsparse_worker import batch, process_memory, time_call

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}  # what is not int8 stays float32, and is not rounded to bfloat16


def feed(columns: dict[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    """Return the inputs that a model names, [rows, tokens]; real tokens have mask 1 and type 0 unless given."""
    ids = columns["input_ids"]
    defaults = {"attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {name: (defaults | columns)[name] for name in names}


def rows_of(file: str, names: list[str]) -> Iterator[dict[str, np.ndarray]]:
    """Yield the inputs of each row of an npz file, [1, tokens]."""
    flat = dict(np.load(file))
    offsets = flat.pop("offsets")
    for start, end in itertools.pairwise(offsets):
        yield feed({name: column[None, start:end].astype(np.int64) for name, column in flat.items()}, names)


def input_names(model: Any) -> list[str]:
    """Return the names of a model's inputs."""
    return [value.get_any_name() for value in model.inputs]


def quantize(model_file: str, rows_file: str, out: str) -> None:
    """Quantise a model to int8 weights and activations, with ranges calibrated on the rows."""
    import nncf
    import openvino

    model = openvino.Core().read_model(model_file)
    rows = list(rows_of(rows_file, input_names(model)))
    calibration = nncf.Dataset(rows)
    quantized = nncf.quantize(model, calibration, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows))
    openvino.save_model(quantized, out, compress_to_fp16=False)


def logits(model_file: str, rows_file: str, out: str) -> None:
    """Write the logits of every row, float32 [rows, labels]."""
    import openvino

    core = openvino.Core()
    model = core.read_model(model_file)
    compiled = core.compile_model(model, "CPU")
    answers = [compiled(inputs)[0][0] for inputs in rows_of(rows_file, input_names(model))]
    np.save(out, np.stack(answers).astype(np.float32))


class Session:
    """An opened model, compiled for each shape, because OpenVINO is fastest with fixed shapes."""

    def __init__(self, engine: dict[str, Any], precision: dict[str, str]) -> None:
        import openvino

        self.engine = engine
        self.core = openvino.Core()
        self.model = self.core.read_model(engine["path"])
        self.settings = precision | {"PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
        self.settings["INFERENCE_NUM_THREADS"] = engine["threads"] or len(os.sched_getaffinity(0))
        self.requests: dict[tuple[int, int], Any] = {}
        self.provider = f"OpenVINO {openvino.__version__}"

    def time(self, shape: tuple[int, int], real: list[int], seconds: float) -> dict[str, float]:
        """Time batches of one shape for some seconds."""
        names = input_names(self.model)
        if shape not in self.requests:
            fixed = self.model.clone()
            fixed.reshape({name: list(shape) for name in names})
            self.requests[shape] = self.core.compile_model(fixed, "CPU", self.settings).create_infer_request()
        ids, mask, types = batch(shape, real, self.engine["vocabulary"], self.engine["pad"])
        inputs = feed({"input_ids": ids, "attention_mask": mask, "token_type_ids": types}, names)
        return time_call(lambda: self.requests[shape].infer(inputs), seconds)


def serve(precision: dict[str, str]) -> None:
    """Answer one request a line, until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print must not break a line
    session: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "open" in request:
                session = Session(request["open"], precision)
                answer: dict[str, Any] = {
                    "provider": session.provider,
                    "nodes": None,
                    "resident": process_memory("VmRSS"),
                }
            elif "close" in request:
                answer = {"peak": process_memory("VmHWM")}
            else:
                answer = session.time((request["batch"], request["length"]), request["real"], request["turn"])
        except Exception as error:  # the parent shows whatever OpenVINO raises
            answer = {"error": f"{type(error).__name__}: {error}", "hint": "see benchmarks/openvino_worker.py"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    jobs: dict[str, Callable[..., None]] = {"quantize": quantize, "logits": logits, "serve-rounded": lambda: serve({})}
    if len(sys.argv) > 1:
        jobs[sys.argv[1]](*sys.argv[2:])
    else:
        serve(EXACT)
