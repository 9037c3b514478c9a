"""Time a batch in every engine, in interleaved rounds.

Each engine has a process of its own (see `engines.py`). One engine runs at a time, for one turn, so
that all of them meet the same state of the machine: a round times every engine once at every shape,
and ratios are taken within a round. A turn is one batch, or as many as fit into `TURN`; its figure
is their median, because a single batch of half a millisecond is at the mercy of the scheduler, and
a mean would move with one interrupted batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace

from spdtool.bench.engines import TIMEOUT, Answer, Engine, EngineProcess, Nodes, Shape, start_process
from spdtool.errors import SpdError

PAUSE = 0.003  # seconds between two engines, in which the threads of the last one go to sleep
TURN = 0.01  # seconds of one turn, if a batch does not take longer
MIN_ROUNDS = 6  # the fewest that give a 95 % interval of the median; made whatever they cost


@dataclass(frozen=True)
class Timing:
    """Figures of one engine with one number of threads.

    Attributes:
        provider: the one that really ran, in the runtime's own words.
        nodes: number of graph nodes by provider and operator, if the runtime tells.
        resident: bytes in memory before the first batch.
        peak: most bytes at any time, with any number of threads.
        rounds: milliseconds of a batch for each counted round, by shape.
        least: milliseconds of the fastest single batch, by shape.
        device: as `rounds`, on the device alone; without the shapes where it has no clock.
    """

    engine: Engine
    provider: str
    nodes: Nodes | None
    resident: int
    peak: int
    rounds: dict[Shape, list[float]]
    least: dict[Shape, float]
    device: dict[Shape, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class TimingResult:
    """Timings, by number of threads and then engine; and why an optional engine is missing."""

    timings: list[Timing] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


@dataclass
class RunningEngine:
    """An engine that is open in its process, with the milliseconds measured with one number of threads.

    Attributes:
        failure: why an optional engine could not run a batch; it is not asked again.
    """

    engine: Engine
    process: EngineProcess
    opened: Answer
    rounds: dict[Shape, list[float]]
    least: dict[Shape, float]
    device: dict[Shape, list[float]] = field(default_factory=dict)
    failure: str = ""

    def take_turn(self, shape: Shape, *, counted: bool) -> None:
        """Run the engine at `shape` for one turn; raises SpdError where it cannot, and must."""
        if self.failure:
            return
        try:
            answer = self.process.ask(shape._asdict() | {"turn": TURN})
        except SpdError as error:  # such as a shape that cannot be captured, or too little memory
            if not self.engine.optional:
                raise
            self.failure = error.message
            return
        if counted:
            self.rounds[shape].append(answer["ms"])
            # The fastest single batch is the one that was disturbed least.
            self.least[shape] = min(self.least[shape], answer["least"])
            if answer.get("device_ms") is not None:
                self.device.setdefault(shape, []).append(answer["device_ms"])


def time_engines(
    engines: Sequence[Engine],
    shapes: Sequence[Shape],
    *,
    threads: Sequence[int] = (0,),
    rounds: int,
    warmup: int,
    seconds: float = float("inf"),
    timeout: float = TIMEOUT,
    together: int | None = None,
) -> TimingResult:
    """Time every engine at every shape with every number of threads, in interleaved rounds.

    The order of the engines rotates with each round, so that none always follows the same one.

    Args:
        threads: used instead of the engines' own; engines are compared at one number of threads at a time.
        rounds: the most; fewer are made if they would take longer than `seconds`, but at least
            MIN_ROUNDS of them.
        together: the most engines that are open at once; the first one is open with every group, so
            that each group has it in its rounds, and counts for the first group. None: all.

    Raises:
        SpdError: a process died, did not answer in time, or could not run its engine; no process is left behind.
    """
    groups = group_engines(engines, together)
    if len(groups) == 1:
        return _time_together(engines, shapes, threads, rounds, warmup, seconds, timeout)
    timings: list[Timing] = []
    missing: dict[str, str] = {}
    for index, group in enumerate(groups):
        # Equal shares: the rounds of all groups are cut to those of the slowest one.
        share = seconds / len(groups)
        result = _time_together(group, shapes, threads, rounds, warmup, share, timeout)
        timings += [timing for timing in result.timings if index == 0 or timing.engine.name != engines[0].name]
        missing |= result.missing
    return TimingResult(equal_rounds(timings), missing)


def group_engines(engines: Sequence[Engine], together: int | None) -> list[Sequence[Engine]]:
    """Split the engines into groups that are open at once; the first engine is in every group."""
    if together is None or len(engines) <= max(together, 2):
        return [engines]
    first, others = engines[0], list(engines[1:])
    size = max(together, 2) - 1
    return [[first, *others[start : start + size]] for start in range(0, len(others), size)]


def equal_rounds(timings: Sequence[Timing]) -> list[Timing]:
    """Cut all timings to the rounds that the slowest group made, so that they can be paired."""
    # Ratios are taken round by round, and need as many rounds on both sides.
    count = min(len(milliseconds) for timing in timings for milliseconds in timing.rounds.values())
    cut = []
    for timing in timings:
        rounds = {shape: milliseconds[:count] for shape, milliseconds in timing.rounds.items()}
        device = {shape: milliseconds[:count] for shape, milliseconds in timing.device.items()}
        cut.append(replace(timing, rounds=rounds, device=device))
    return cut


def _time_together(
    engines: Sequence[Engine],
    shapes: Sequence[Shape],
    threads: Sequence[int],
    rounds: int,
    warmup: int,
    seconds: float,
    timeout: float,
) -> TimingResult:
    """Time engines that are all open at once."""
    missing: dict[str, str] = {}
    finished: list[RunningEngine] = []
    peaks: dict[str, int] = {}
    seconds_left = seconds
    with ExitStack() as stack:
        processes = {}
        for engine in engines:
            processes[engine.name] = stack.enter_context(start_process(engine.name, timeout, engine.command))
        for index, count in enumerate(threads):
            available = [replace(engine, threads=count) for engine in engines if engine.name not in missing]
            running = open_engines(available, processes, shapes, missing)
            start = time.monotonic()
            run_rounds(running, shapes, rounds, warmup, seconds_left / (len(threads) - index))
            seconds_left -= time.monotonic() - start  # what is saved here goes to the next number of threads
            missing |= {run.engine.name: run.failure for run in running if run.failure}
            finished += [run for run in running if not run.failure]
        for engine in engines:
            if engine.name not in missing:
                peaks[engine.name] = processes[engine.name].ask({"close": True})["peak"]
    timings = []
    for run in finished:
        name, opened = run.engine.name, run.opened
        if name in peaks:  # an engine that opens with one number of threads only is no row of the table
            memory = (opened["resident"], peaks[name])
            provider, nodes = opened["provider"], opened["nodes"]
            timings.append(Timing(run.engine, provider, nodes, *memory, run.rounds, run.least, run.device))
    return TimingResult(timings, missing)


def open_engines(
    engines: Sequence[Engine],
    processes: dict[str, EngineProcess],
    shapes: Sequence[Shape],
    missing: dict[str, str],
) -> list[RunningEngine]:
    """Open the engines; add to `missing` why an optional one cannot be opened."""
    running = []
    for engine in engines:
        process = processes[engine.name]
        try:
            opened = process.ask({"open": asdict(engine)})
        except SpdError as error:
            if not engine.optional:
                raise
            missing[engine.name] = error.message
            continue
        rounds: dict[Shape, list[float]] = {shape: [] for shape in shapes}
        running.append(RunningEngine(engine, process, opened, rounds, dict.fromkeys(shapes, float("inf"))))
    return running


def run_rounds(
    running: Sequence[RunningEngine], shapes: Sequence[Shape], rounds: int, warmup: int, seconds: float
) -> None:
    """Run the rounds with one number of threads; the first `warmup` are not counted."""
    start = time.monotonic()
    for number in range(-warmup, rounds):
        if number == 0:
            start = time.monotonic()  # the warm-up does not count
        predicted_seconds = (time.monotonic() - start) * (number + 1) / max(number, 1)
        if number >= MIN_ROUNDS and predicted_seconds > seconds:
            break
        for shape in shapes:
            for index in range(len(running)):
                # Rotated, so that no engine always follows the same one and inherits its warm caches.
                running[(index + number) % len(running)].take_turn(shape, counted=number >= 0)
                time.sleep(PAUSE)
