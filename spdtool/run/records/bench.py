"""What the bench stage records, and the contents of bench.json."""

from __future__ import annotations

from pydantic import Field

from spdtool.run.records.base import Cell, MachineRecord, Record


class Ratio(Record):
    """How many times faster: the median over paired rounds, and its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}x to {self.high:.2f}x)"


class Table(Record):
    """A table of the report or the terminal."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]


class LatencyRecord(Record):
    """One engine at one shape with one number of threads: percentiles in milliseconds, throughput, ratio.

    Attributes:
        shape: as text. real: lengths without padding, empty where there is none.
        p50 and further percentiles: as a client sees it, copies to a device and back among it.
        min: fastest single batch. ratio: against the dense teacher, in the form `dense`.
        device_p50: median on the GPU alone, by its own clock; None where it was not measured.
    """

    engine: str
    provider: str
    threads: int
    shape: str
    batch: int
    length: int
    real: list[int]
    p50: float
    p90: float
    p95: float
    p99: float
    rows_per_second: float
    min: float
    rounds: int
    ratio: Ratio
    dense: str
    device_p50: float | None = None


class ProductTimes(Record):
    """One matrix times a number of tokens: microseconds and operations a second, dense and sparse, and the bound.

    `ratio`: how many times faster the sparse product is; None without a sparse form.
    `bound_by`: flops or bandwidth.
    """

    dense_us: float
    dense_flops: float
    sparse_us: float | None
    sparse_flops: float | None
    ratio: float | None
    bound_us: float
    bound_by: str


class LedgerEntry(Record):
    """One pruned matrix in the bench's ledger; `products` by number of tokens."""

    name: str
    layer: str
    rows: int
    columns: int
    nonzeros: int
    density: float
    dense_bytes: int
    sparse_bytes: int | None
    products: dict[int, ProductTimes]


class MachinePeak(Record):
    """Highest measured operations a second and bytes a second."""

    flops: float
    bandwidth: float

    def __str__(self) -> str:
        return f"{self.flops / 1e9:.1f} GFLOP/s, {self.bandwidth / 1e9:.1f} GB/s"


class GpuRecord(Record):
    """A GPU, as far as its driver tells: MHz of its clock when the bench began and at most, watts, and MIG.

    Attributes:
        cuda: version that torch was built with. memory_bytes: of the card, or of its MIG slice.
        mig: `enabled` or `disabled`.
    """

    name: str
    driver: str
    cuda: str | None = None
    memory_bytes: int | None = None
    clock_mhz: float | None = None
    max_clock_mhz: float | None = None
    power_limit_w: float | None = None
    mig: str | None = None

    def lines(self) -> list[tuple[str, str]]:
        """Describe it as names and texts; what is unknown is left out."""
        texts = {
            "GPU": self.name,
            "driver": self.driver,
            "CUDA of torch": self.cuda,
            "GPU memory": self.memory_bytes and f"{self.memory_bytes / 2**30:.1f} GiB",
            "GPU clock": self.clock_mhz and f"{self.clock_mhz:.0f} MHz of {self.max_clock_mhz or 0:.0f}",
            "power limit": self.power_limit_w and f"{self.power_limit_w:.0f} W",
            "MIG": self.mig,
        }
        return [(name, text) for name, text in texts.items() if text]


class BenchEnvironment(MachineRecord):
    """Where a bench ran; `peaks` by number of threads, where the machine was measured; `processor`: the CPU's model."""

    threads: list[int]
    provider: str
    processor: str = ""
    gpu: GpuRecord | None = None  # None on a CPU, and where no driver answers
    peaks: dict[int, MachinePeak] = Field(default_factory=dict)  # empty on a GPU, and without a ledger

    def lines(self) -> list[tuple[str, str]]:
        """Describe the environment as names and texts."""
        lines = super().lines()
        if self.processor:
            lines.append(("processor", self.processor))
        if self.gpu is not None:
            lines += self.gpu.lines()
        lines += [("threads", " and ".join(map(str, self.threads))), ("provider", self.provider)]
        lines += [(f"peak with {count} threads", str(peak)) for count, peak in self.peaks.items()]
        return lines


class ShapeRounds(Record):
    """Milliseconds of every counted round at one shape; `least`: of the fastest single batch; `device_ms`: on a GPU."""

    batch: int
    length: int
    real: list[int] | tuple[int, ...]
    ms: list[float]
    least: float
    device_ms: list[float] | None = None


class EngineRecord(Record):
    """One timed engine in bench.json; see `bench.latency.Engine` and `Timing`."""

    name: str
    kind: str
    threads: int
    vocabulary: int
    pad: int
    fused: bool
    compiled: bool
    precision: str = "fp32"
    graph: bool = False
    bound: bool = False
    shrinks: bool = False
    semi_structured: bool = False
    baseline: bool
    optional: bool
    provider: str
    nodes: dict[str, dict[str, int]] | None
    resident_bytes: int
    peak_bytes: int
    rounds: list[ShapeRounds]


class BenchFile(Record):
    """Contents of bench.json: every round of every engine, the ledger and the machine."""

    environment: BenchEnvironment
    engines: list[EngineRecord]
    ledger: list[LedgerEntry]


class SpeedFactors(Record):
    """Where the speed of a sparse form comes from; the product of the factors is the whole ratio.

    Attributes:
        fusion: what the form's operators give to dense float32 weights.
        padding: what leaving padding out adds; 1 over a grid without padding.
        rounding: what the stored form of the weights adds.
        shape: what the heads and neurons add that the student lacks; 1 where it has zeros alone.
        zeros: what the zeros add. zeros_ratio: the same as a median of paired rounds, with its interval.
        cause: in words, what adds it: zeros, or what else the student has less of than its teacher.
    """

    fusion: float
    padding: float
    rounding: float
    shape: float = 1.0
    zeros: float
    zeros_ratio: Ratio
    cause: str = "zeros"

    @property
    def whole(self) -> float:
        """The product of the factors."""
        return self.fusion * self.padding * self.rounding * self.shape * self.zeros


class Promise(Record):
    """What a goal asked for, and what was measured.

    Attributes:
        lines: one for each wish, in words.
        broken: those that were missed by more than the noise.
        speedup: as measured at the goal's batch, length and threads.
    """

    lines: list[str] = Field(default_factory=list)
    broken: list[str] = Field(default_factory=list)
    speedup: Ratio | None = None
    megabytes: float | None = None
    drop: float | None = None


class BenchResult(Record):
    """Result of the bench stage.

    Attributes:
        columns, rows: the table that a run ends with. tables: further ones.
        verdict: what was measured, in sentences.
        best: engine of the best form of the student. size: how many times smaller than the teacher
            its files are.
        speeds: number of threads to how many times faster than the teacher it is.
        rivals: number of threads to how many times faster it is than the fastest dense row whose score passes.
        caveats: number of threads to why that ratio says little.
        factors: number of threads to where that speed comes from; empty for a plain file, which has only zeros.
        latency: every engine at every shape. ledger: every pruned matrix alone.
        promise: of a goal; None where nothing was asked for.
    """

    columns: list[str]
    rows: list[list[Cell]]
    tables: list[Table]
    verdict: list[str]
    speeds: dict[int, Ratio]
    caveats: dict[int, str]
    factors: dict[int, SpeedFactors] = Field(default_factory=dict)
    rivals: dict[int, Ratio] = Field(default_factory=dict)
    size: float
    best: str
    provider: str
    latency: list[LatencyRecord]
    ledger: list[LedgerEntry]
    environment: BenchEnvironment
    promise: Promise | None = None

    @property
    def threads(self) -> int:
        """Fewest threads that were timed: the headline is theirs."""
        return min(self.speeds)

    @property
    def speed(self) -> Ratio:
        """How many times faster the best form of the student is, with the fewest threads."""
        return self.speeds[self.threads]
