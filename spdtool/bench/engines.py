"""Engines that are timed, each in a process of its own.

A process holds nothing but its engine (numpy and onnxruntime; torch only if torch is what is timed,
or a GPU), so its peak memory is the engine's: bytes of the GPU where it runs on one. It reads
requests and writes answers as lines of JSON. Any program that does so can take its place
(`Engine.command`):

    {"open": {...engine...}}                                ->  {"provider": ..., "nodes": {...}, "resident": bytes}
    {"batch": 8, "length": 128, "real": [], "turn": 0.01}   ->  {"ms": 12.3, "least": 12.1, "batches": 1,
                                                                 "device_ms": 11.8 or null}
    {"close": true}                                         ->  {"peak": bytes}
    any failure                                             ->  {"error": ..., "hint": ...}

An engine is opened anew, in the same process, for each number of threads.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from spdtool import plugins
from spdtool.bench.gpu.hardware import GpuMemory
from spdtool.bench.gpu.onnx_forms import open_bound
from spdtool.bench.gpu.torch_forms import open_torch
from spdtool.errors import SpdError
from spdtool.export import onnx_session

TIMEOUT = 300.0  # seconds for one answer, the loading of the model among them
SMALLER_HINT = "use smaller bench.batches or bench.lengths"
# -P: nothing is imported from the current folder.
ENGINE_COMMAND = (sys.executable, "-P", "-m", "spdtool.bench.engines")

Request: TypeAlias = dict[str, Any]
Answer: TypeAlias = dict[str, Any]
Batch: TypeAlias = dict[str, np.ndarray]
RunBatch: TypeAlias = Callable[[Batch], object]
Precision: TypeAlias = Literal["fp32", "tf32", "bf16", "fp16"]
Nodes: TypeAlias = dict[str, dict[str, int]]
"""Provider to operator to number of graph nodes."""


class Shape(NamedTuple):
    """A batch of `batch` rows of `length` tokens; `real`: tokens of each row that are no padding (empty: all)."""

    batch: int
    length: int
    real: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}" + (" padded" if self.real else "")


@dataclass(frozen=True)
class Engine:
    """A model file in onnxruntime (`web`: onnxruntime-web) or OpenVINO, a checkpoint in torch, or a target's folder.

    Attributes:
        path: the model file, or the folder.
        vocabulary: tokens are drawn from [0, vocabulary), without `pad`.
        provider: `cpu` or `cuda`; a process that cannot have it fails.
        threads: threads of one operator; 0: all cores.
        libraries: custom operators that the file needs.
        fused: onnxruntime rewrites the graph into fused operators; off: it only folds constants and the like.
        compiled: torch.compile; off: eager.
        precision: of torch: fp32, tf32, bf16 or fp16. Of OpenVINO: fp32, or bf16 where OpenVINO prefers it.
        graph: as a CUDA graph for each shape.
        bound: inputs and outputs of onnxruntime have buffers on the device.
        shrinks: torch leaves out heads and neurons that are zero as a whole.
        semi_structured: torch with two of four weights, in the format of sparse tensor cores.
        baseline: the dense model that ratios refer to; of several, the fastest at each shape.
        optional: it may be missing on this machine; the report says so.
        target: export target whose `session` opens the folder, of the kind `session`.
        command: program that runs the engine; empty: this module.
    """

    name: str
    kind: Literal["onnxruntime", "openvino", "web", "torch", "session"]
    path: str
    vocabulary: int
    pad: int = 0
    provider: str = "cpu"
    threads: int = 0
    libraries: tuple[str, ...] = ()
    fused: bool = True
    compiled: bool = False
    precision: Precision = "fp32"
    graph: bool = False
    bound: bool = False
    shrinks: bool = False
    semi_structured: bool = False
    baseline: bool = False
    optional: bool = False
    target: str = ""
    command: tuple[str, ...] = ()


class OpenEngine(NamedTuple):
    """An engine that is ready to run.

    Attributes:
        run: computes a batch as a client sees it, with the copies to the device and back.
        provider: the one that really runs it.
        nodes: graph nodes, if the runtime tells.
        measure_device: milliseconds of a batch on the device alone; None on a CPU, and where it has no clock.
    """

    run: RunBatch
    provider: str
    nodes: Nodes | None
    measure_device: Callable[[Batch], float] | None = None


class EngineProcess:
    """The parent's side of one process: send a request, wait for its answer."""

    def __init__(self, name: str, timeout: float, command: Sequence[str], hint: str) -> None:
        self.name, self.timeout, self.hint = name, timeout, hint
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self.process = subprocess.Popen(
            command or ENGINE_COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
            env=_child_environment(),
        )
        # A thread reads the answers, because a blocking read of a pipe knows no timeout.
        self.answers: queue.Queue[str | None] = queue.Queue()
        self.reader = threading.Thread(target=self._read_answers, daemon=True)
        self.reader.start()

    def ask(self, request: Request) -> Answer:
        """Send a request and return the answer.

        Raises:
            SpdError: the process died, did not answer in time, or answered with an error.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()  # a buffered request would never be answered
            line = self.answers.get(timeout=self.timeout)
        except BrokenPipeError:
            line = None
        except queue.Empty:
            raise SpdError(
                f"the process that times {self.name} did not answer within {self.timeout:g} seconds",
                self.hint,
            ) from None
        if line is None:
            raise SpdError(self._cause_of_death(), f"if memory ran out, {self.hint}")
        answer: Answer = json.loads(line)
        if "error" in answer:
            raise SpdError(f"{self.name} cannot be timed: {answer['error']}", answer["hint"])
        return answer

    def kill(self) -> None:
        """End the process and close its streams."""
        self.process.kill()  # it may hang: asking it to end would not help
        self.process.wait()
        self.reader.join()
        for stream in (self.process.stdin, self.process.stdout, self.stderr):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:  # a request that the process did not live to read
                continue

    def _read_answers(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put(None)  # the process has ended

    def _cause_of_death(self) -> str:
        code = self.process.wait()
        self.stderr.seek(0)
        lines = self.stderr.read().decode("utf-8", "replace").strip().splitlines()
        last_line = f": {lines[-1]}" if lines else ""
        ending = f"signal {-code}" if code < 0 else f"exit {code}"
        return f"the process that times {self.name} died with {ending}{last_line}"


@contextmanager
def start_process(
    name: str, timeout: float = TIMEOUT, command: Sequence[str] = (), hint: str = SMALLER_HINT
) -> Iterator[EngineProcess]:
    """Start a process that ends with the context, whatever happens inside."""
    process = EngineProcess(name, timeout, command, hint)
    try:
        yield process
    finally:
        process.kill()


def run_engine(requests: Iterable[str], answer: Callable[[Answer], None]) -> None:
    """Answer requests in the process of an engine: open it, then run it for one turn at each request."""
    opened: OpenEngine | None = None
    batches: dict[Shape, Batch] = {}
    memory: GpuMemory | None = None
    for line in requests:
        request: Request = json.loads(line)
        try:
            if "open" in request:
                opened = None  # free what the last number of threads held
                engine = Engine(**request["open"])
                memory = GpuMemory() if engine.provider == "cuda" else None
                opened = OPENERS[engine.kind](engine)
                resident = memory.add() if memory is not None and memory.is_known else memory_bytes("VmRSS")
                answer({"provider": opened.provider, "nodes": opened.nodes, "resident": resident})
            elif "close" in request:
                is_on_gpu = memory is not None and memory.is_known
                answer({"peak": memory.grown if memory is not None and is_on_gpu else memory_bytes("VmHWM")})
            else:
                assert opened is not None
                shape = Shape(request["batch"], request["length"], tuple(request["real"]))
                if shape not in batches:  # made outside the timed turn
                    batches[shape] = make_batch(shape, engine)
                    if memory is not None:
                        memory.mark()
                        opened.run(batches[shape])  # allocates what this shape needs
                        memory.add()
                answer(time_batch(opened, batches[shape], request["turn"]))
        except SpdError as error:
            answer({"error": error.message, "hint": error.hint})


def time_batch(opened: OpenEngine, batch: Batch, seconds: float) -> Answer:
    """Time a batch for one turn as a client sees it, then on the device where that can be told."""
    answer: Answer = {**time_turn(lambda: opened.run(batch), seconds)}
    answer["device_ms"] = None if opened.measure_device is None else opened.measure_device(batch)
    return answer


def time_turn(call: Callable[[], object], seconds: float) -> dict[str, float]:
    """Call until `seconds` are over, at least once; return median and least milliseconds and the number of calls."""
    nanoseconds: list[int] = []
    while not nanoseconds or sum(nanoseconds) < seconds * 1e9:
        start = time.perf_counter_ns()
        call()
        nanoseconds.append(time.perf_counter_ns() - start)
    return {"ms": float(np.median(nanoseconds)) / 1e6, "least": min(nanoseconds) / 1e6, "batches": len(nanoseconds)}


def memory_bytes(field: Literal["VmRSS", "VmHWM"]) -> int:
    """Bytes of memory that this process holds (VmRSS), or the most that it has held (VmHWM)."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    # Elsewhere there is only getrusage, whose peak is inherited from a parent that may have trained a model.
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def make_batch(shape: Shape, engine: Engine) -> Batch:
    """Draw tokens other than padding, then pad on the right; the same for every engine; int64 [batch, length]."""
    size = (shape.batch, shape.length)
    tokens = np.random.default_rng(size).integers(0, engine.vocabulary - 1, size)
    tokens += tokens >= engine.pad  # skip the padding token
    lengths = np.array(shape.real or shape.batch * [shape.length])
    is_real = np.arange(shape.length) < lengths[:, None]
    return {
        "input_ids": np.where(is_real, tokens, engine.pad),
        "attention_mask": is_real.astype(np.int64),
        "token_type_ids": np.zeros(size, dtype=np.int64),
    }


def open_onnxruntime(engine: Engine) -> OpenEngine:
    """Open a model file in onnxruntime."""
    if engine.bound or engine.graph:
        return open_bound(engine)
    session = onnx_session.open_session(
        Path(engine.path), engine.provider, engine.threads, engine.libraries, fused=engine.fused
    )
    names = [value.name for value in session.get_inputs()]

    def run(batch: Batch) -> object:
        return session.run(None, {name: batch[name] for name in names})

    return OpenEngine(run, session.get_providers()[0], onnx_session.node_placement(session))


def open_openvino(engine: Engine) -> OpenEngine:
    """Open a model file in OpenVINO on the processor."""
    import openvino

    threads = engine.threads or onnx_session.usable_cores()
    options: dict[str, int | str] = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    if engine.precision == "fp32":
        options["INFERENCE_PRECISION_HINT"] = "f32"
    request = openvino.Core().compile_model(engine.path, "CPU", options).create_infer_request()
    names = [value.any_name for value in request.model_inputs]

    def run(batch: Batch) -> object:
        return request.infer({name: batch[name] for name in names}, share_inputs=True)

    return OpenEngine(run, "openvino cpu", None)


def open_target(engine: Engine) -> OpenEngine:
    """Open an exported folder with its target's own method."""
    from spdtool.export.target import get_target

    forward = get_target(engine.target).session(Path(engine.path), engine.provider, engine.threads)
    return OpenEngine(forward, f"{engine.target} {engine.provider}", None)


OPENERS: dict[str, Callable[[Engine], OpenEngine]] = {
    "onnxruntime": open_onnxruntime,
    "openvino": open_openvino,
    "torch": open_torch,
    "session": open_target,
}


def _child_environment() -> dict[str, str]:
    """The environment of an engine's process, which loads the same plugins as this one."""
    folder = plugins.plugin_folder()
    if folder is None:
        return dict(os.environ)
    return {**os.environ, "SPDTOOL_PLUGINS": str(folder)}


def answer_stdin(work: Callable[[Iterable[str], Callable[[Answer], None]], None]) -> None:
    """Let `work` answer the lines of standard input.

    What libraries print goes to standard error, so that it cannot end up between two answers.
    """
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)

        def answer(value: Answer) -> None:
            answers.write(json.dumps(value) + "\n")
            answers.flush()

        work(sys.stdin, answer)


if __name__ == "__main__":
    plugins.use_folder(None)  # that of the environment
    answer_stdin(run_engine)
