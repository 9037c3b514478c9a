"""Engines that are timed, each in a process of its own.

A process holds nothing but its engine (numpy and onnxruntime; torch only if torch is what is timed), so its peak memory
is the engine's. It reads requests and writes answers as lines of JSON. Any program that does so can take its place
(`Engine.command`):

    {"open": {...engine...}}                                ->  {"provider": ..., "nodes": {...}, "resident": bytes}
    {"batch": 8, "length": 128, "real": [], "turn": 0.01}   ->  {"ms": 12.3, "least": 12.1, "batches": 1}
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
from spdtool.errors import SpdError, first_line
from spdtool.export import onnx_session

TIMEOUT = 300.0  # seconds for one answer, the loading of the model among them
SMALLER_HINT = "use smaller bench.batches or bench.lengths"
# -P: nothing is imported from the current folder.
ENGINE_COMMAND = (sys.executable, "-P", "-m", "spdtool.bench.engines")

Request: TypeAlias = dict[str, Any]
Answer: TypeAlias = dict[str, Any]
Batch: TypeAlias = dict[str, np.ndarray]
RunBatch: TypeAlias = Callable[[Batch], object]
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
    """A model file in onnxruntime or OpenVINO, a checkpoint in torch, or a folder that only its target can open.

    Attributes:
        path: the model file, or the folder.
        vocabulary: tokens are drawn from [0, vocabulary), without `pad`.
        provider: `cpu` or `cuda`; a process that cannot have it fails.
        threads: threads of one operator; 0: all cores.
        libraries: custom operators that the file needs.
        fused: onnxruntime rewrites the graph into fused operators; off: it only folds constants and the like.
        compiled: torch.compile; off: eager.
        baseline: the dense model that ratios refer to; of several, the fastest at each shape.
        optional: it may be missing on this machine; the report says so.
        target: export target whose `session` opens the folder, of the kind `session`.
        command: program that runs the engine; empty: this module.
    """

    name: str
    kind: Literal["onnxruntime", "openvino", "torch", "session"]
    path: str
    vocabulary: int
    pad: int = 0
    provider: str = "cpu"
    threads: int = 0
    libraries: tuple[str, ...] = ()
    fused: bool = True
    compiled: bool = False
    baseline: bool = False
    optional: bool = False
    target: str = ""
    command: tuple[str, ...] = ()


class OpenEngine(NamedTuple):
    """An engine that is ready to run, the provider that really runs it, and its graph nodes if the runtime tells."""

    run: RunBatch
    provider: str
    nodes: Nodes | None


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
    for line in requests:
        request: Request = json.loads(line)
        try:
            if "open" in request:
                opened = None  # free what the last number of threads held
                engine = Engine(**request["open"])
                opened = OPENERS[engine.kind](engine)
                resident = memory_bytes("VmRSS")
                answer({"provider": opened.provider, "nodes": opened.nodes, "resident": resident})
            elif "close" in request:
                answer({"peak": memory_bytes("VmHWM")})
            else:
                assert opened is not None
                shape = Shape(request["batch"], request["length"], tuple(request["real"]))
                if shape not in batches:  # made outside the timed turn
                    batches[shape] = make_batch(shape, engine)
                run, batch = opened.run, batches[shape]
                answer(time_turn(lambda: run(batch), request["turn"]))  # noqa: B023 (called at once)
        except SpdError as error:
            answer({"error": error.message, "hint": error.hint})


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
    session = onnx_session.open_session(
        Path(engine.path), engine.provider, engine.threads, engine.libraries, fused=engine.fused
    )
    names = [value.name for value in session.get_inputs()]

    def run(batch: Batch) -> object:
        return session.run(None, {name: batch[name] for name in names})

    return OpenEngine(run, session.get_providers()[0], onnx_session.node_placement(session))


def open_torch(engine: Engine) -> OpenEngine:
    """Open a checkpoint in torch, eager or compiled."""
    import torch

    from spdtool.models.load import load_model
    from spdtool.models.predict import torch_forward

    torch.set_num_threads(engine.threads or onnx_session.usable_cores())
    model: Any = load_model(engine.path)
    model = model.to(engine.provider)
    if engine.compiled:
        model = torch.compile(model, dynamic=True)
    forward = torch_forward(model, engine.provider)

    def run(batch: Batch) -> object:
        # Without token types the model takes zeros, which is what the batch holds.
        return forward({name: batch[name] for name in ("input_ids", "attention_mask")})

    if engine.compiled:
        try:  # compiling starts with the first batch, and may be impossible here
            run(make_batch(Shape(2, 9), engine))
        except Exception as error:  # the compiler's front and back ends raise many kinds
            raise SpdError(
                f"torch.compile does not work here: {first_line(error)}", "it needs a C++ compiler"
            ) from None
    return OpenEngine(run, f"torch {engine.provider}", None)


def open_openvino(engine: Engine) -> OpenEngine:
    """Open a model file in OpenVINO on the processor."""
    import openvino

    threads = engine.threads or onnx_session.usable_cores()
    options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
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
