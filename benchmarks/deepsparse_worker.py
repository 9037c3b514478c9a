"""Run DeepSparse 1.8 as an engine of `spdtool.bench.engines`; needs an interpreter with deepsparse, not with spdtool.

It speaks the line protocol of that module. DeepSparse compiles a model for one shape, so each shape is compiled at its
first request, before anything is timed. The model must be an ONNX file of IR version 9 or older. The older exporter of
torch with opset 14 suits best: a tenth of the newer exporter's graph runs in DeepSparse's fallback.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def process_memory(field: str) -> int:
    """Return the resident bytes of this process (VmRSS) or their peak (VmHWM)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def batch(shape: tuple[int, int], real: list[int], vocabulary: int, pad: int) -> list[np.ndarray]:
    """Make the same batch as `spdtool.bench.engines.make_batch`: ids, mask and token types, [rows, tokens] each."""
    token_ids = np.random.default_rng(shape).integers(0, vocabulary - 1, shape)
    mask = np.arange(shape[1]) < np.array(real or shape[0] * [shape[1]])[:, None]
    ids = np.where(mask, token_ids + (token_ids >= pad), pad)
    return [ids, mask.astype(np.int64), np.zeros(shape, dtype=np.int64)]


def time_call(call: Callable[[], object], seconds: float) -> dict[str, float]:
    """Repeat a call for `seconds`; return the median and the least milliseconds."""
    times: list[float] = []
    while not times or sum(times) < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return {"ms": 1000 * statistics.median(times), "least": 1000 * min(times), "batches": len(times)}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # its banner goes there
    from deepsparse import compile_model

    engine: dict[str, Any] = {}
    compiled: dict[tuple[int, int], Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "open" in request:
                engine, compiled = request["open"], {}
                threads = engine["threads"] or len(os.sched_getaffinity(0))
                answer: dict[str, Any] = {"provider": "DeepSparse", "nodes": None, "resident": process_memory("VmRSS")}
            elif "close" in request:
                answer = {"peak": process_memory("VmHWM")}
            else:
                shape = (request["batch"], request["length"])
                if shape not in compiled:
                    shapes = [list(shape)] * 3
                    compiled[shape] = compile_model(engine["path"], shape[0], threads, input_shapes=shapes)
                inputs = batch(shape, request["real"], engine["vocabulary"], engine["pad"])
                answer = time_call(lambda: compiled[shape].run(inputs), request["turn"])  # noqa: B023 (called at once)
        except Exception as error:  # whatever it raises is the answer
            answer = {"error": f"{type(error).__name__}: {error}", "hint": "see benchmarks/deepsparse_worker.py"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
