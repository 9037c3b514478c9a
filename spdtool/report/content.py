"""Content of a page as plain values for the template; everything is read from the records of the runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from spdtool import console
from spdtool.bench.factors import factors_text
from spdtool.bench.sizes import thread_count
from spdtool.recipe import PHASES, STAGES
from spdtool.recipe.fields import Recipe
from spdtool.recipe.training import Distilled
from spdtool.report import curves
from spdtool.report.commands import commands_of
from spdtool.report.curves import Curves, PhaseCurves
from spdtool.report.quality import QualityContent, quality_content
from spdtool.report.records import RunRecords, TextTable, format_optional, format_score, read_records, text_table
from spdtool.report.subject import class_scores, describe_subject, serving_commands
from spdtool.run.fingerprint import sha256
from spdtool.run.folder import RECORD, Run
from spdtool.run.records import (
    BenchResult,
    Cell,
    ExportResult,
    LatencyRecord,
    LedgerEntry,
    MachineRecord,
    StudentRow,
    difference,
)
from spdtool.sweep import summary
from spdtool.sweep.rows import row_of_run, trained_teacher
from spdtool.sweep.summary import Summary

# encoder.layer.3.attention.self.query.weight: the layer, and the matrix in it.
LAYER = re.compile(r"^(?P<layer>.*?\.\d+)\.(?P<matrix>.+?)(\.weight)?$")
MATRIX_COLUMNS = (
    *("name", "size", "nonzeros", "density", "tokens"),
    *("dense us", "sparse us", "speed", "bound us", "of the bound"),
)
GAP_COLUMNS = ("stage", "train", "dev", "gap")


@dataclass(frozen=True)
class Tile:
    """One figure of the headline, and what has to be said with it."""

    name: str
    figure: str
    note: str


@dataclass(frozen=True)
class StageLine:
    """One stage in the table of lineage."""

    name: str
    state: str
    cells: list[str]


@dataclass(frozen=True)
class BenchContent:
    """The bench's sentences, its table, latencies by shape, and the ledger by layer and by matrix."""

    verdict: list[str]
    overview: TextTable
    latency: list[TextTable]
    layers: list[TextTable]
    matrices: TextTable


@dataclass(frozen=True)
class ZeroMap:
    """Sparsity by layer and matrix after the last finished phase; `phase` is None before the first."""

    phase: str | None
    layers: list[str]
    matrices: list[str]
    values: dict[tuple[str, str], float]


@dataclass(frozen=True)
class RunContent:
    """All sections of one run; what is not there yet is empty, and named under `missing`."""

    title: str
    path: str
    recipe: Recipe
    row: StudentRow
    smoke: bool
    missing: list[str]
    tiles: list[Tile]
    stages: list[StageLine]
    phases: list[str]
    subject: list[tuple[str, str]]
    classes: TextTable
    quality: QualityContent
    serving: list[str]
    gaps: TextTable
    bench: BenchContent | None
    commands: list[str]
    environment: list[tuple[str, str]]
    student: Curves
    teacher: Curves
    zeros: ZeroMap

    @property
    def has_gaps(self) -> bool:
        """Whether some stage scored training rows."""
        return any(gap != "-" for *_, gap in self.gaps.rows)


@dataclass(frozen=True)
class Comparison:
    """Several runs compared; `failed` and `unfinished` are lines."""

    tables: list[TextTable]
    legend: str
    failed: list[str]
    unfinished: list[str]
    summaries: list[Summary]


def content_of(run: Run) -> RunContent:
    """Gather all sections of one run.

    Raises:
        Corrupt: a stage's record cannot be read.
    """
    row, records = row_of_run(run), read_records(run)
    student, teacher = curves.student_curves(run), Curves([])
    if "teacher" in records.stages or run.begun("teacher"):
        teacher = curves.teacher_curves(run)
    return RunContent(
        title=f"{row.task} at {row.sparsity:.4g} sparsity",
        path=str(run.path),
        recipe=run.recipe,
        row=row,
        smoke=run.recipe.smoke,
        missing=[stage for stage in STAGES if stage not in records.stages],
        tiles=headline_tiles(row, records),
        stages=[_stage_line(run, stage, records) for stage in STAGES],
        phases=[describe_phase(phase, run.recipe) for phase in student.phases],
        subject=describe_subject(run, records),
        classes=class_scores(records),
        quality=quality_content(None if records.export is None else records.export.quality),
        serving=serving_commands(run),
        gaps=train_gaps(run, records),
        bench=bench_content(records.bench),
        commands=commands_of(run),
        environment=environment_lines(records),
        student=student,
        teacher=teacher,
        zeros=zero_map(records),
    )


def compare(rows: Sequence[StudentRow]) -> Comparison:
    """Gather the tables by which several runs are compared."""
    summaries = summary.summarise(rows)
    return Comparison(
        tables=[
            text_table("score and gap over seeds", *summary.table(summaries)),
            text_table("average over tasks", *summary.averages_table(summaries)),
        ],
        legend=summary.LEGEND,
        failed=summary.failures(rows),
        unfinished=[summary.row_name(row) for row in rows if row.status == "unfinished"],
        summaries=summaries,
    )


def headline_tiles(row: StudentRow, records: RunRecords) -> list[Tile]:
    """Return the headline of a run: speed and size where they were measured, then scores and zeros."""
    tiles: list[Tile] = []
    if records.bench is not None and records.export is not None:
        tiles += _bench_tiles(row, records.bench, records.export)
    teacher = Tile("teacher, dev", format_score(row.teacher), _further_metrics(records, "teacher"))
    phase = records.last_phase
    if phase is None:
        return [*tiles, teacher]
    note = _further_metrics(records, phase)
    if phase != PHASES[-1]:  # a score on the way must not pass for the final one
        note = f"after {phase}; {note}"
    kept_note = "dev score of the student over that of the teacher"
    if not row.has_learned_teacher:
        kept_note = "the teacher's dev score is no better than chance: there is nothing to keep"
    tiles.append(Tile("kept", format_optional(row.retention, ".1%"), kept_note))
    tiles += [Tile("student, dev", format_score(row.student), note), teacher]
    if row.nonzeros is not None and row.weights:
        remaining = f"{row.nonzeros:,} of {row.weights:,} weights are left in the encoder's matrices"
        tiles.append(Tile("zeros", f"{1 - row.nonzeros / row.weights:.2%}", remaining))
    return tiles


def describe_phase(phase: PhaseCurves, recipe: Recipe) -> str:
    """Say what a phase of the student did, as its log has it: steps, prune events, and whether anything was grafted."""
    section = recipe.section(phase.name)
    actions = [f"{phase.last_step:,} steps"]
    if phase.prune_events:
        actions.append(f"{len(phase.prune_events)} prune events")
    if phase.sparsity:
        actions.append(f"{phase.sparsity[-1][1]:.2%} zeros")
    if phase.grafted:
        first, last = phase.replacing_rate[0][1], phase.replacing_rate[-1][1]
        actions.append(f"grafting: replacing rate from {first:.2f} to {last:.2f}")
    elif isinstance(section, Distilled) and not section.grafting.enabled:
        actions.append("grafting: off in this recipe")
    else:  # a student of another shape, in which the teacher's layers cannot stand
        actions.append("grafting: none took place")
    return f"{console.phase_title(phase.name)}, {'; '.join(actions)}"


def train_gaps(run: Run, records: RunRecords) -> TextTable:
    """Return train score, dev score and the gap between them, of the weights that each training stage saved."""
    rows = []
    for stage, result in records.training.items():
        train = result.train_score
        if stage == "teacher":  # a given teacher was scored on its training rows by the run that trained it
            train = trained_teacher(run).train_score
        rows.append(
            [stage, format_score(train), format_score(result.score), format_score(difference(train, result.score))]
        )
    return text_table("scores x 100", GAP_COLUMNS, rows)


def bench_content(bench: BenchResult | None) -> BenchContent | None:
    """Return what the page shows of the bench, None without one."""
    if bench is None:
        return None
    matrices = []
    for entry in bench.ledger:
        matrices += _matrix_rows(entry)
    return BenchContent(
        verdict=bench.verdict,
        overview=text_table("engines", bench.columns, bench.rows),
        latency=latency_tables(bench.latency, bench.ledger),
        layers=[text_table(table.title, table.columns, table.rows) for table in bench.tables],
        matrices=text_table("every matrix, one thread", MATRIX_COLUMNS, matrices),
    )


def latency_tables(entries: Sequence[LatencyRecord], ledger: Sequence[LedgerEntry]) -> list[TextTable]:
    """Return a table for each number of threads: shapes by engines, median milliseconds and speed.

    The last column of the table of one thread is the least time that the pruned products can take:
    the sum of their bounds, where the ledger knows that many tokens.
    """
    by_threads: dict[int, list[LatencyRecord]] = {}
    for entry in entries:
        by_threads.setdefault(entry.threads, []).append(entry)
    tables = []
    for threads, timed in by_threads.items():
        engines = list(dict.fromkeys(entry.engine for entry in timed))
        with_bound = threads == 1 and bool(ledger)  # the ledger measures with one thread
        cells: dict[str, dict[str, str]] = {}
        for entry in timed:
            row = cells.setdefault(entry.shape, {})
            row[entry.engine] = _timing(entry)
            if with_bound:
                row["bound"] = _bound(ledger, entry)
        title = f"median milliseconds (speed against the dense teacher), {thread_count(threads)}"
        if with_bound:
            engines.append("bound")
            title += "; bound: the least that the pruned products can take"
        rows = []
        for shape, row in cells.items():
            rows.append([shape, *(row.get(engine, "-") for engine in engines)])
        tables.append(text_table(title, ["batch x length", *engines], rows))
    return tables


def zero_map(records: RunRecords) -> ZeroMap:
    """Return sparsity by layer and matrix of the last phase that is done."""
    phase = records.last_phase
    if phase is None:
        return ZeroMap(None, [], [], {})
    values: dict[tuple[str, str], float] = {}
    for name, count in records.training[phase].zeros.items():
        match = LAYER.match(name)
        key = ("", name)  # a matrix outside the layers has a row without a layer
        if match:
            key = (match["layer"], match["matrix"])
        values[key] = count.zeros / count.size
    layers, matrices = zip(*values, strict=True) if values else ((), ())
    return ZeroMap(phase, list(dict.fromkeys(layers)), list(dict.fromkeys(matrices)), values)


def environment_lines(records: RunRecords) -> list[tuple[str, str]]:
    """Describe the machine of the last finished stage, and name the stages that another one made."""
    if not records.stages:
        return []
    last = list(records.stages.values())[-1]
    lines = {"spdtool": last.spdtool or "-"}
    if last.machine is not None:
        lines |= last.machine.lines()
    if records.bench is not None:
        for name, text in records.bench.environment.lines():
            lines.setdefault(name, text)
    other = _made_elsewhere(records, last.machine)
    if other:
        lines["made on another machine"] = ", ".join(other)
    return list(lines.items())


def _made_elsewhere(records: RunRecords, last: MachineRecord | None) -> list[str]:
    """Return the stages that another machine than `last` made; training stages are compared with the last of them."""
    if last is None:
        return []
    machines = [record.machine for record in records.stages.values() if record.machine is not None]
    trained = next((machine for machine in reversed(machines) if machine.arithmetic is not None), last)
    stages = []
    for stage, record in records.stages.items():
        machine = record.machine
        if machine is None or machine.lines() != last.lines():
            stages.append(stage)
            continue
        # Export and bench record neither, because they train nothing.
        other_bits = machine.arithmetic not in (None, trained.arithmetic)
        if other_bits or machine.device not in (None, trained.device):
            stages.append(stage)
    return stages


def _bench_tiles(row: StudentRow, bench: BenchResult, exported: ExportResult) -> list[Tile]:
    model = exported.student
    if bench.best != "student":
        model = exported.targets[bench.best].student
    rounded = ""
    if model.rounds:
        rounded = f", matrices in {model.values}, embeddings in {model.embeddings}"
    speed = bench.speed
    note = (
        f"that of the dense teacher, {speed.low:.2f}x to {speed.high:.2f}x; {bench.best}, {thread_count(bench.threads)}"
    )
    note += rounded
    if bench.threads in bench.caveats:
        note += f"; {bench.caveats[bench.threads]}"
    if bench.threads in bench.factors:
        note += f"; {factors_text(bench.factors[bench.threads])}"
    # A speed alone would be credited to the zeros.
    note += "; see Speed and size for where it comes from"
    size = f"{row.bytes:,} of {row.teacher_bytes:,} bytes, {bench.best}{rounded}"
    return [
        Tile("speed", f"{speed.median:.2f}x", note),
        Tile("file, times smaller", f"{bench.size:.2f}x", size),
    ]


def _stage_line(run: Run, stage: str, records: RunRecords) -> StageLine:
    if stage not in records.stages:
        state = "in progress" if run.begun(stage) else "missing"
        return StageLine(stage, state, ["-"] * 8)
    record = records.stages[stage]
    inputs = ", ".join(f"{name} {digest[:8]}" for name, digest in record.inputs.items())
    steps = dev = train = sparsity = "-"
    if stage in records.training:
        result = records.training[stage]
        steps, dev, train = (
            console.format_cell(result.steps),
            format_score(result.score),
            format_score(result.train_score),
        )
        sparsity = format_optional(result.sparsity, ".2%")
        if result.given:
            inputs = f"given: {result.given}"
    digest = sha256(run.path / stage / RECORD)[:8]
    finished = record.finished[:16].replace("T", " ")  # to the minute
    cells = [digest, inputs or "-", f"{record.seconds:,.0f}", steps, dev, train, sparsity, finished or "-"]
    return StageLine(stage, "done", cells)


def _further_metrics(records: RunRecords, stage: str) -> str:
    """Return the metrics beside the headline score as text."""
    if stage not in records.training:
        return ""
    metrics = dict(records.training[stage].dev)
    metrics.pop("score", None)
    return ", ".join(f"{name} {100 * value:.2f}" for name, value in metrics.items())


def _matrix_rows(entry: LedgerEntry) -> list[list[Cell]]:
    """Return the rows of one matrix, one for each number of tokens."""
    rows: list[list[Cell]] = []
    for tokens, product in entry.products.items():
        ratio = bound_share = "-"
        if product.sparse_us is not None:
            ratio, bound_share = f"{product.ratio:.2f}x", f"{product.bound_us / product.sparse_us:.0%}"
        size, density = f"{entry.rows}x{entry.columns}", f"{entry.density:.2%}"
        matrix: list[Cell] = [entry.name, size, entry.nonzeros, density, str(tokens)]
        rows.append([*matrix, product.dense_us, product.sparse_us, ratio, product.bound_us, bound_share])
    return rows


def _timing(entry: LatencyRecord) -> str:
    ratio = f"{entry.ratio.median:.2f}x"
    if entry.engine == entry.dense:  # compared with itself
        ratio = "1x"
    return f"{console.format_cell(entry.p50)} ({ratio})"


def _bound(ledger: Sequence[LedgerEntry], timed: LatencyRecord) -> str:
    """Return the sum of the ledger's bounds in milliseconds, or a dash unless every matrix has this many tokens."""
    tokens = timed.batch * timed.length
    if timed.real or any(tokens not in entry.products for entry in ledger):
        return "-"
    return console.format_cell(sum(entry.products[tokens].bound_us for entry in ledger) / 1e3)
