"""How long a batch takes: every engine in a process of its own, timed in interleaved rounds.

The parent asks each process for one turn at a time, so that all of them meet the same state of the machine: a round
times every engine once at every shape, and ratios are taken inside a round. A turn is one batch, or as many as fit into
`TURN`, and its figure is their median: a batch of half a millisecond alone is at the mercy of the scheduler, and one
batch that was interrupted does not move a median as it would a mean. A process holds nothing but its engine (numpy and
onnxruntime; torch only where torch is what is timed), so its peak memory is the engine's.

The processes speak in lines of JSON; one may be any program that speaks them (`Engine.command`):

    {"open": {...engine...}}                          ->  {"provider": ..., "nodes": {...}, "resident": bytes}
    {"batch": 8, "length": 128, "real": [], "turn": 0.01}  ->  {"ms": 12.3, "least": 12.1, "batches": 1}
    {"close": true}                                   ->  {"peak": bytes}
    anything that goes wrong                          ->  {"error": ..., "hint": ...}

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
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from spdtool.errors import SpdError, first_line
from spdtool.export import runtime

TIMEOUT = 300.0  # seconds for one answer, the loading of the model among them
PAUSE = 0.003  # seconds between two engines, for the threads of the last one to go to sleep
TURN = 0.01  # seconds that an engine is timed for at a stretch, if a batch does not take longer
SMALLER = "use smaller bench.batches or bench.lengths"
FEWEST_ROUNDS = 6  # that give a 95 % interval of the median; they are made whatever they cost

Batch = dict[str, np.ndarray]
Forward = Callable[[Batch], Any]
Nodes = dict[str, dict[str, int]]


class Shape(NamedTuple):
    """What is timed at a time: `batch` rows of `length` tokens, of which `real` are no padding (empty: all)."""

    batch: int
    length: int
    real: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}" + (" padded" if self.real else "")


@dataclass(frozen=True)
class Engine:
    """What is timed: a model file in onnxruntime, or a checkpoint in torch.

    Attributes:
        vocabulary: tokens are drawn from [0, vocabulary), without `pad`.
        provider: `cpu` or `cuda`; a process that cannot have it fails.
        threads: of one operator; 0: all cores.
        libraries: custom operators that the file needs.
        fused: onnxruntime rewrites the graph into fused operators; off: it only folds constants and the like.
        compiled: torch.compile; off: eager.
        baseline: the dense model, which ratios are to; of several, the faster one at each shape.
        optional: may be missing on this machine, which is said.
        command: the program that answers; empty: this module.
    """

    name: str
    kind: Literal["onnxruntime", "torch"]
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
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Timing:
    """What was measured of one engine with one number of threads.

    Attributes:
        provider: the one that really ran, in the runtime's own words.
        nodes: provider to operator to nodes of the graph, where the runtime tells.
        resident: bytes in memory before the first batch. peak: the most at any time, with any number of threads.
        rounds: shape to milliseconds of a batch, one for each counted round.
        least: shape to milliseconds of the fastest single batch.
    """

    engine: Engine
    provider: str
    nodes: Nodes | None
    resident: int
    peak: int
    rounds: dict[Shape, list[float]]
    least: dict[Shape, float]


@dataclass(frozen=True)
class Race:
    """What came of a race: timings, by number of threads and then engine; and why an optional engine is missing."""

    timings: list[Timing] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


def race(
    engines: Sequence[Engine],
    shapes: Sequence[Shape],
    *,
    threads: Sequence[int] = (0,),
    rounds: int,
    warmup: int,
    seconds: float = float("inf"),
    timeout: float = TIMEOUT,
) -> Race:
    """Time every engine at every shape with every number of threads, in interleaved rounds.

    The order of the engines turns with each round, so that none always follows the same one.

    Args:
        threads: in place of the engines' own; engines are compared at one number of threads at a time.
        rounds: the most; fewer are made if they would take longer than `seconds`, but never fewer than six of them.

    Raises:
        SpdError: a process died, did not answer in time, or could not run its engine; none is left behind.
    """
    missing: dict[str, str] = {}
    heats = []
    left = seconds
    with ExitStack() as stack:
        running = [(engine, stack.enter_context(worker(engine.name, timeout, engine.command))) for engine in engines]
        for place, count in enumerate(threads):
            running, opened = _open([(replace(engine, threads=count), process) for engine, process in running], missing)
            start = time.monotonic()
            heats.append((running, opened, _heat(running, shapes, rounds, warmup, left / (len(threads) - place))))
            left -= time.monotonic() - start
        peaks = {engine.name: process.ask({"close": True})["peak"] for engine, process in running}
    timings = [
        Timing(engine, first["provider"], first["nodes"], first["resident"], peaks[engine.name], times, least)
        for running, opened, measured in heats
        for (engine, _), first, (times, least) in zip(running, opened, measured, strict=True)
        if engine.name in peaks
    ]
    return Race(timings, missing)


Running = list[tuple[Engine, "Worker"]]
Measured = tuple[dict[Shape, list[float]], dict[Shape, float]]


def _open(running: Running, missing: dict[str, str]) -> tuple[Running, list[dict[str, Any]]]:
    """Open every engine; those that are optional and cannot be go to `missing`, with the reason."""
    left, opened = [], []
    for engine, process in running:
        try:
            opened.append(process.ask({"open": asdict(engine)}))
        except SpdError as error:
            if not engine.optional:
                raise
            missing[engine.name] = error.message
            continue
        left.append((engine, process))
    return left, opened


def _heat(running: Running, shapes: Sequence[Shape], rounds: int, warmup: int, seconds: float) -> list[Measured]:
    """The rounds with one number of threads: for each engine, milliseconds of each round, and of its fastest batch."""
    times: list[dict[Shape, list[float]]] = [{shape: [] for shape in shapes} for _ in running]
    least = [dict.fromkeys(shapes, float("inf")) for _ in running]
    start = time.monotonic()
    for turn in range(-warmup, rounds):
        if turn == 0:
            start = time.monotonic()
        if turn >= FEWEST_ROUNDS and (time.monotonic() - start) * (turn + 1) / turn > seconds:
            break
        for shape in shapes:
            for place in range(len(running)):
                number = (place + turn) % len(running)
                answer = running[number][1].ask(shape._asdict() | {"turn": TURN})
                if turn >= 0:
                    times[number][shape].append(answer["ms"])
                    least[number][shape] = min(least[number][shape], answer["least"])
                time.sleep(PAUSE)
    return list(zip(times, least, strict=True))


class Worker:
    """Keeps one process, and the lines that it has written."""

    def __init__(self, name: str, timeout: float, command: Sequence[str], hint: str) -> None:
        self.name, self.timeout, self.hint = name, timeout, hint
        self.complaints = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self.process = subprocess.Popen(
            command
            or [sys.executable, "-P", "-m", "spdtool.bench.latency"],  # -P: nothing is imported from the current folder
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
                self.hint,
            ) from None
        if line is None:
            raise SpdError(self._obituary(), f"if memory ran out, {self.hint}")
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
def worker(name: str, timeout: float = TIMEOUT, command: Sequence[str] = (), hint: str = SMALLER) -> Iterator[Worker]:
    """A process that answers; it is ended with the context, whatever happens in it."""
    process = Worker(name, timeout, command, hint)
    try:
        yield process
    finally:
        process.end()


def work(requests: Iterable[str], answer: Callable[[dict[str, Any]], None]) -> None:
    """The other side: open an engine, then time it for one turn at each request."""
    forward: Forward | None = None
    batches: dict[Shape, Batch] = {}
    for line in requests:
        request = json.loads(line)
        try:
            if "open" in request:
                forward = None  # what the last number of threads held is freed first
                engine = Engine(**request["open"])
                forward, provider, nodes = (_in_torch if engine.kind == "torch" else _in_onnxruntime)(engine)
                answer({"provider": provider, "nodes": nodes, "resident": memory("VmRSS")})
            elif "close" in request:
                answer({"peak": memory("VmHWM")})
            else:
                assert forward is not None
                shape = Shape(request["batch"], request["length"], tuple(request["real"]))
                if shape not in batches:
                    batches[shape] = _batch(shape, engine)
                batch = batches[shape]
                answer(turn(lambda: forward(batch), request["turn"]))  # noqa: B023 (called at once)
        except SpdError as error:
            answer({"error": error.message, "hint": error.hint})


def turn(call: Callable[[], Any], seconds: float) -> dict[str, Any]:
    """Call until `seconds` are over, at least once: median and least milliseconds of a call, and number of calls."""
    times: list[int] = []
    while not times or sum(times) < seconds * 1e9:
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return {"ms": float(np.median(times)) / 1e6, "least": min(times) / 1e6, "batches": len(times)}


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
    """Random tokens other than padding, then padding on the right; the same for every engine; int64 [batch, length]."""
    size = (shape.batch, shape.length)
    drawn = np.random.default_rng(size).integers(0, engine.vocabulary - 1, size)
    real = np.arange(shape.length) < np.array(shape.real or shape.batch * [shape.length])[:, None]
    return {
        "input_ids": np.where(real, drawn + (drawn >= engine.pad), engine.pad),
        "attention_mask": real.astype(np.int64),
        "token_type_ids": np.zeros(size, dtype=np.int64),
    }


def _in_onnxruntime(engine: Engine) -> tuple[Forward, str, Nodes | None]:
    session = runtime.open_session(
        Path(engine.path), engine.provider, engine.threads, engine.libraries, fused=engine.fused
    )
    names = [value.name for value in session.get_inputs()]
    return (
        lambda batch: session.run(None, {name: batch[name] for name in names}),
        session.get_providers()[0],
        runtime.node_placement(session),
    )


def _in_torch(engine: Engine) -> tuple[Forward, str, Nodes | None]:
    import torch

    from spdtool.models.load import load_model
    from spdtool.models.predict import torch_forward

    torch.set_num_threads(engine.threads or runtime.usable_cores())
    model: Any = load_model(engine.path)
    model = model.to(engine.provider)
    given = ("input_ids", "attention_mask")  # token types are zeros where they are not given
    if engine.compiled:
        model = torch.compile(model, dynamic=True)
    forward = torch_forward(model, engine.provider)
    if engine.compiled:
        try:  # compiling is what may be impossible here, and starts with the first batch
            forward({name: _batch(Shape(2, 9), engine)[name] for name in given})
        except Exception as error:  # whatever the compiler's front or back end raises
            raise SpdError(
                f"torch.compile does not work here: {first_line(error)}", "it needs a C++ compiler"
            ) from None
    return lambda batch: forward({name: batch[name] for name in given}), f"torch {engine.provider}", None


def speak(work: Callable[[Iterable[str], Callable[[dict[str, Any]], None]], None]) -> None:
    """Let `work` answer standard input; what libraries print goes to standard error: it cannot break a line."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)

        def answer(value: dict[str, Any]) -> None:
            answers.write(json.dumps(value) + "\n")
            answers.flush()

        work(sys.stdin, answer)


if __name__ == "__main__":
    speak(work)
