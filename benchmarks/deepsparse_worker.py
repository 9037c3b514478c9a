"""DeepSparse 1.8 as an engine of `spdtool.bench.engines`, run by an interpreter that has it and need not have spdtool.

It speaks the line protocol of that module. DeepSparse compiles a model for one shape, so that each shape is compiled at
its first request, before anything is timed. The model must be an ONNX file of IR version 9 or older, best one that the
older exporter of torch wrote with opset 14: of the newer exporter's graph DeepSparse leaves a tenth to its fallback.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time

import numpy as np


def memory(field: str) -> int:
    """Bytes that this process holds (VmRSS), or the most that it has held (VmHWM)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def batch(shape: tuple[int, int], real: list[int], vocabulary: int, pad: int) -> list[np.ndarray]:
    """The batch that spdtool's own engines are given."""
    drawn = np.random.default_rng(shape).integers(0, vocabulary - 1, shape)
    mask = np.arange(shape[1]) < np.array(real or shape[0] * [shape[1]])[:, None]
    ids = np.where(mask, drawn + (drawn >= pad), pad)
    return [ids, mask.astype(np.int64), np.zeros(shape, dtype=np.int64)]


def turn(call, seconds: float) -> dict:
    """Median and least milliseconds of a call, over as many as fit into `seconds`."""
    times = []
    while not times or sum(times) < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return {"ms": 1000 * statistics.median(times), "least": 1000 * min(times), "batches": len(times)}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # its banner goes there
    from deepsparse import compile_model

    engine, compiled = {}, {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "open" in request:
                engine, compiled = request["open"], {}
                threads = engine["threads"] or len(os.sched_getaffinity(0))
                answer = {"provider": "DeepSparse", "nodes": None, "resident": memory("VmRSS")}
            elif "close" in request:
                answer = {"peak": memory("VmHWM")}
            else:
                shape = (request["batch"], request["length"])
                if shape not in compiled:
                    shapes = [list(shape)] * 3
                    compiled[shape] = compile_model(engine["path"], shape[0], threads, input_shapes=shapes)
                given = batch(shape, request["real"], engine["vocabulary"], engine["pad"])
                answer = turn(lambda: compiled[shape].run(given), request["turn"])  # noqa: B023 (called at once)
        except Exception as error:  # whatever it raises is the answer
            answer = {"error": f"{type(error).__name__}: {error}", "hint": "see benchmarks/deepsparse_worker.py"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
