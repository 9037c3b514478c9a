"""How long a batch takes: every engine in a process of its own, timed in interleaved rounds.

The parent asks each process for one batch at a time, so that all of them meet the same state of the machine: a round
times every engine once at every shape, and ratios are taken inside a round. A process holds nothing but its engine
(numpy and onnxruntime; torch only where torch is what is timed), so its peak memory is the engine's.

The processes speak in lines of JSON:

    {"open": {...engine...}}             ->  {"provider": ..., "nodes": {...}, "resident": bytes}
    {"batch": 8, "length": 128}          ->  {"ms": 12.3}
    {"close": true}                      ->  {"peak": bytes}
    anything that goes wrong             ->  {"error": ..., "hint": ...}
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
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from spdtool.errors import SpdError
from spdtool.export import runtime

TIMEOUT = 300.0  # seconds for one answer, the loading of the model among them
PAUSE = 0.003  # seconds between two engines, for the threads of the last one to go to sleep

Shape = tuple[int, int]
Batch = dict[str, np.ndarray]
Run = Callable[[Batch], Any]
Nodes = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Engine:
    """What is timed: a model file in onnxruntime, or a checkpoint in eager torch.

    Attributes:
        vocabulary: tokens are drawn from [0, vocabulary), without `pad`.
        provider: `cpu` or `cuda`; a process that cannot have it fails.
        threads: of one operator; 0: all cores.
    """

    name: str
    kind: Literal["onnxruntime", "torch"]
    path: str
    vocabulary: int
    pad: int = 0
    provider: str = "cpu"
    threads: int = 0


@dataclass(frozen=True)
class Timing:
    """What was measured of one engine.

    Attributes:
        provider: the one that really ran, in the runtime's own words.
        nodes: provider to operator to nodes of the graph, where the runtime tells.
        resident: bytes in memory before the first batch. peak: the most at any time.
        rounds: shape to milliseconds, one for each counted round.
    """

    engine: Engine
    provider: str
    nodes: Nodes | None
    resident: int
    peak: int
    rounds: dict[Shape, list[float]]


def race(
    engines: Sequence[Engine],
    shapes: Sequence[Shape],
    *,
    rounds: int,
    warmup: int,
    timeout: float = TIMEOUT,
) -> list[Timing]:
    """Time every engine at every shape `(batch, length)`, in interleaved rounds.

    The order of the engines turns with each round, so that none always follows the same one.

    Raises:
        SpdError: a process died, did not answer in time, or could not run its engine; none is left behind.
    """
    measured: list[dict[Shape, list[float]]] = [{shape: [] for shape in shapes} for _ in engines]
    with ExitStack() as stack:
        workers = [stack.enter_context(_worker(engine.name, timeout)) for engine in engines]
        opened = [worker.ask({"open": asdict(engine)}) for worker, engine in zip(workers, engines, strict=True)]
        for turn in range(-warmup, rounds):
            for shape in shapes:
                for place in range(len(engines)):
                    number = (place + turn) % len(engines)
                    answer = workers[number].ask({"batch": shape[0], "length": shape[1]})
                    if turn >= 0:
                        measured[number][shape].append(answer["ms"])
                    time.sleep(PAUSE)
        closed = [worker.ask({"close": True}) for worker in workers]
    return [
        Timing(engine, first["provider"], first["nodes"], first["resident"], last["peak"], times)
        for engine, first, last, times in zip(engines, opened, closed, measured, strict=True)
    ]


class _Worker:
    """Keeps one process, and the lines that it has written."""

    def __init__(self, name: str, timeout: float) -> None:
        self.name, self.timeout = name, timeout
        self.complaints = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "spdtool.bench.latency"],  # -P: nothing is imported from the current folder
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            text=True,
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=self.timeout)
        except BrokenPipeError:
            line = None
        except queue.Empty:
            raise SpdError(
                f"the process that times {self.name} did not answer within {self.timeout:g} seconds",
                "use smaller bench.batches or bench.lengths",
            ) from None
        if line is None:
            raise SpdError(self._obituary(), "if memory ran out, use smaller bench.batches or bench.lengths")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SpdError(f"{self.name} cannot be timed: {answer['error']}", answer["hint"])
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.reader.join()
        for stream in (self.process.stdin, self.process.stdout, self.complaints):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:  # a request that the process did not live to read
                continue

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def _obituary(self) -> str:
        code = self.process.wait()
        self.complaints.seek(0)
        said = self.complaints.read().decode("utf-8", "replace").strip().splitlines()
        last = f": {said[-1]}" if said else ""
        return f"the process that times {self.name} died with {f'signal {-code}' if code < 0 else f'exit {code}'}{last}"


@contextmanager
def _worker(name: str, timeout: float) -> Iterator[_Worker]:
    worker = _Worker(name, timeout)
    try:
        yield worker
    finally:
        worker.end()


def work(requests: Iterable[str], answer: Callable[[dict[str, Any]], None]) -> None:
    """The other side: open one engine, then time one batch for each request."""
    forward: Run | None = None
    batches: dict[Shape, Batch] = {}
    for line in requests:
        request = json.loads(line)
        try:
            if "open" in request:
                engine = Engine(**request["open"])
                forward, provider, nodes = (_in_torch if engine.kind == "torch" else _in_onnxruntime)(engine)
                answer({"provider": provider, "nodes": nodes, "resident": memory("VmRSS")})
            elif "close" in request:
                answer({"peak": memory("VmHWM")})
            else:
                assert forward is not None
                shape = (request["batch"], request["length"])
                if shape not in batches:
                    batches[shape] = _batch(shape, engine)
                start = time.perf_counter_ns()
                forward(batches[shape])
                answer({"ms": (time.perf_counter_ns() - start) / 1e6})
        except SpdError as error:
            answer({"error": error.message, "hint": error.hint})


def memory(field: Literal["VmRSS", "VmHWM"]) -> int:
    """Bytes of memory that this process holds, or the most that it has held.

    Not `getrusage`: its peak is inherited from the parent, which may have trained a model.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(field))
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _batch(shape: Shape, engine: Engine) -> Batch:
    """Full rows: random tokens other than padding, the same for every engine; int64 [batch, length]."""
    drawn = np.random.default_rng(shape).integers(0, engine.vocabulary - 1, shape)
    return {
        "input_ids": drawn + (drawn >= engine.pad),
        "attention_mask": np.ones(shape, dtype=np.int64),
        "token_type_ids": np.zeros(shape, dtype=np.int64),
    }


def _in_onnxruntime(engine: Engine) -> tuple[Run, str, Nodes | None]:
    session = runtime.open_session(Path(engine.path), engine.provider, engine.threads)
    names = [value.name for value in session.get_inputs()]
    return (
        lambda batch: session.run(None, {name: batch[name] for name in names}),
        session.get_providers()[0],
        runtime.placement(session),
    )


def _in_torch(engine: Engine) -> tuple[Run, str, Nodes | None]:
    import torch

    from spdtool import encoders
    from spdtool.evaluation import torch_forward

    torch.set_num_threads(engine.threads or runtime.cores())
    model: Any = encoders.load(engine.path)
    forward = torch_forward(model.to(engine.provider), engine.provider)
    given = ("input_ids", "attention_mask")  # token types are zeros where they are not given
    return lambda batch: forward({name: batch[name] for name in given}), f"torch {engine.provider}", None


def main() -> None:
    """Speak the protocol; what libraries print goes to standard error, so that it cannot break a line."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)

        def answer(value: dict[str, Any]) -> None:
            answers.write(json.dumps(value) + "\n")
            answers.flush()

        work(sys.stdin, answer)


if __name__ == "__main__":
    main()
