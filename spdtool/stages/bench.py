"""`spdtool bench`: time the exported student against the exported dense teacher, side by side.

Reads: `export`, and `teacher` for the rows in torch. Writes: `bench/bench.json` (every round of
every engine, the ledger, and the machine) and `bench/bench.md` (what they mean). It runs on CUDA if
onnxruntime or torch really does, otherwise on the CPU; the result says which.

Rows: `teacher` and `student` as plain ONNX files; the files of every further target, and beside a
sparse form the dense teacher in that form (exported here and thrown away); on a CPU the teacher
again without fused operators, in dynamic int8 (made here and thrown away), in eager torch, and
compiled by torch; both plain files in the runtime of the goal; on a GPU those of `bench.gpu.rows`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from spdtool import console
from spdtool.bench import ledger, report
from spdtool.bench.engines import Shape
from spdtool.bench.factors import split_speed
from spdtool.bench.gpu.hardware import describe_gpu
from spdtool.bench.gpu.rows import add_gpu_rows, engines_at_once, use_torch_only
from spdtool.bench.latency import Timing, time_engines
from spdtool.bench.ledger_tables import ledger_table
from spdtool.bench.lineup import (
    Lineup,
    add_dense_forms,
    add_goal_runtime,
    add_shape_form,
    add_teacher_engines,
    line_up_exports,
)
from spdtool.bench.ratios import BenchData, latency_records, ratio_caveat
from spdtool.data.tokens import tokenize
from spdtool.errors import DeviceError, SpdError
from spdtool.export import onnx_session
from spdtool.goals.promise import measure_promise, refuse_broken, timed_shape
from spdtool.goals.shape import read_choice
from spdtool.models.load import load_tokenizer
from spdtool.recipe.fields import Recipe
from spdtool.run.fingerprint import describe_machine, describe_processor
from spdtool.run.folder import Run
from spdtool.run.records import (
    BenchEnvironment,
    BenchFile,
    BenchResult,
    EngineRecord,
    ExportResult,
    LedgerEntry,
    MachinePeak,
    ShapeRounds,
    Table,
)
from spdtool.run.storage import write_json
from spdtool.tasks.prepare import find_task

SAMPLED_ROWS = 512  # rows of the dev set whose lengths padded batches imitate


def bench(run: Run) -> BenchResult:
    """Time the exported files of `run`; return the table that a run ends with, its verdict, and every figure.

    Raises:
        StageMissing, Corrupt: the run does not hold what is needed.
        DeviceError: onnxruntime, or a device that the recipe demands, is not there.
        SpdError: an engine died, or did not answer in time.
        GateError: the stage is done, and the goal of the recipe was missed.
    """
    recipe = run.recipe
    provider, onnx_problem = choose_device(recipe.device)
    on_gpu = provider == "cuda"
    export_folder, exported = run.use_input("export"), run.export_result()
    checkpoints = {"teacher": run.use_input("teacher")}
    if on_gpu or recipe.prune.zeros:
        checkpoints["student"] = run.use_input("finetune")
    lineup = line_up_exports(export_folder, exported, provider, recipe)
    if onnx_problem is not None:
        use_torch_only(lineup, checkpoints, onnx_problem)
    # Both are timed at the same shapes, so the shorter model decides.
    positions = min(exported.teacher.positions, exported.student.positions)
    shapes = choose_shapes(recipe, positions, export_folder / "teacher", lineup.notes)
    promised = timed_shape(recipe.goal, recipe.max_length, positions)
    if recipe.goal.speedup and promised not in shapes:
        shapes.append(promised)
    with run.stage("bench") as work, tempfile.TemporaryDirectory() as scratch:
        add_rivals(lineup, exported, checkpoints, Path(scratch), recipe, on_gpu=on_gpu)
        data = time_lineup(lineup, shapes, checkpoints["teacher"], recipe, on_gpu=on_gpu)
        write_figures(work.folder, data, recipe)
        work.result = summary = summarize(data)
        if recipe.goal.is_set:
            teacher, student = (run.training_result(stage).dev for stage in ("teacher", "finetune"))
            choice = read_choice(run.path)
            profile = None if choice is None else choice.profile
            summary.promise = measure_promise(recipe, data, promised, teacher, student, profile=profile)
            summary.verdict = [*(f"Goal: {line}." for line in summary.promise.lines), *summary.verdict]
    refuse_broken(summary.promise, recipe)
    return summary


def add_rivals(
    lineup: Lineup,
    exported: ExportResult,
    checkpoints: dict[str, Path],
    scratch: Path,
    recipe: Recipe,
    *,
    on_gpu: bool,
) -> None:
    """Add the rows that are made for the comparison alone: dense forms of sparse targets, rows of torch.

    Args:
        checkpoints: role to folder; that of the student on a GPU, and where it has zeros inside a smaller shape.
        scratch: folder for the files that are made and thrown away.
    """
    for name in lineup.sparse:
        model = exported.targets[name].student
        add_dense_forms(lineup, name, model, checkpoints["teacher"], scratch, recipe)
        if recipe.prune.zeros:
            add_shape_form(lineup, name, model, checkpoints["student"], scratch, recipe)
    if on_gpu:
        with console.busy("scoring teacher and student in the precisions of a GPU"):
            add_gpu_rows(lineup, checkpoints, scratch, recipe)
    else:
        add_teacher_engines(lineup, checkpoints["teacher"], scratch, recipe)
        if recipe.goal.speedup:
            # After the rivals, of which these rows are none: they are there for the promise.
            add_goal_runtime(lineup, recipe.goal.runtime)


def time_lineup(lineup: Lineup, shapes: Sequence[Shape], teacher: Path, recipe: Recipe, *, on_gpu: bool) -> BenchData:
    """Time every engine at every shape, and on a CPU each pruned matrix alone.

    Args:
        teacher: folder of its checkpoint.
    """
    section, threads = recipe.bench, choose_thread_counts(recipe, on_gpu=on_gpu)
    peaks: dict[int, MachinePeak] = {}
    entries: list[LedgerEntry] = []
    # the matrices are read from the student's ONNX file
    if section.ledger and not on_gpu and lineup.engine("student").kind == "onnxruntime":
        peaks, entries = measure_matrices(lineup, threads)
    counts = " and ".join(map(str, threads))
    with console.busy(f"timing {len(lineup.engines)} engines at {len(shapes)} shapes with {counts} threads"):
        result = time_engines(
            lineup.engines,
            shapes,
            threads=threads,
            rounds=section.rounds,
            warmup=section.warmup,
            seconds=section.seconds,
            together=engines_at_once(teacher) if on_gpu else None,
        )
    return BenchData(
        timings=result.timings,
        files=lineup.files,
        environment=describe_environment(result.timings, threads, peaks, on_gpu=on_gpu),
        sparse=lineup.sparse,
        pairs=lineup.pairs,
        dense_forms=lineup.dense_forms,
        shape_forms=lineup.shape_forms,
        zeros_inside=recipe.prune.zeros,
        ledger=entries,
        notes=[*lineup.notes, *(f"{reason}." for reason in result.missing.values())],
        leaves_out=recipe.prune.is_structured,
        dense=lineup.dense,
        students=lineup.students,
        on_gpu=on_gpu,
    )


def choose_thread_counts(recipe: Recipe, *, on_gpu: bool) -> list[int]:
    """Return the numbers of threads to time with, the goal's among them; 0 in the recipe stands for all cores."""
    counts = [*recipe.bench.threads]
    if recipe.goal.speedup:
        # The promise is measured with the goal's own number of threads.
        counts.append(recipe.goal.threads)
    threads = list(dict.fromkeys(count or onnx_session.usable_cores() for count in counts))
    # Threads of the CPU make no difference on a GPU.
    return threads[-1:] if on_gpu else threads


def write_figures(folder: Path, data: BenchData, recipe: Recipe) -> None:
    """Write bench.json, every round of every engine, and bench.md, what they mean."""
    assert data.environment is not None
    # A smoke run's figures mean nothing, and its title says so.
    preposition = "with" if recipe.prune.is_structured else "at"
    title = recipe.mark_smoke(f"{recipe.task} {preposition} {recipe.size_label}")
    (folder / "bench.md").write_text(report.render_markdown(title, data), "utf-8")
    engines = [engine_record(timing) for timing in data.timings]
    content = BenchFile(environment=data.environment, engines=engines, ledger=list(data.ledger))
    write_json(folder / "bench.json", content)


def choose_device(device: str) -> tuple[str, str | None]:
    """Choose where to time, and why onnxruntime is not timed there: a GPU is used if torch alone runs on it.

    Raises:
        DeviceError: `cuda` is demanded, and neither runs on it.
    """
    try:
        provider = onnx_session.working_providers(device)[-1]
    except DeviceError:
        if not torch_runs_on_cuda():
            raise
        provider = "cpu"
    if provider == "cpu" and device != "cpu" and torch_runs_on_cuda():
        return "cuda", f"onnxruntime does not run on CUDA ({onnx_session.provider_problem('cuda')})"
    return provider, None


def torch_runs_on_cuda() -> bool:
    """Whether torch has a CUDA device that answers."""
    import torch

    return torch.cuda.is_available()


def choose_shapes(recipe: Recipe, positions: int, tokenizer_folder: Path, notes: list[str]) -> list[Shape]:
    """The recipe's grid, then its padded shapes; lengths beyond the model's positions are cut, with a warning."""
    section = recipe.bench
    wanted = dict.fromkeys((*section.lengths, *(length for _, length in section.padded)))
    too_long = [str(length) for length in wanted if length > positions]
    if too_long:
        lengths = ", ".join(too_long)
        # Beyond them no position has an embedding, and onnxruntime stops at its index.
        console.warn(f"the model has {positions} positions: length {lengths} is timed at {positions}")
    shapes = []
    for batch in section.batches:
        for length in dict.fromkeys(min(length, positions) for length in section.lengths):
            shapes.append(Shape(batch, length))
    if not section.padded:
        return shapes
    dev_lengths = sample_dev_lengths(recipe, tokenizer_folder)
    if dev_lengths is None:
        notes.append("Padded shapes: real lengths are spread evenly from 1 to the longest.")
    else:
        notes.append("Padded shapes: real lengths are spread as in the dev set, scaled to the longest.")
    for batch, length in dict.fromkeys((batch, min(length, positions)) for batch, length in section.padded):
        shapes.append(Shape(batch, length, spread_lengths(batch, length, dev_lengths)))
    return shapes


def spread_lengths(batch: int, longest: int, observed: np.ndarray | None) -> tuple[int, ...]:
    """Real lengths of a batch that is padded to its longest row.

    Args:
        observed: lengths whose quantiles are taken and scaled to `longest`; None: spread evenly from 1.
    """
    if observed is None:
        spread = np.linspace(1, longest, batch)
    else:
        # Middles of equal shares: the shortest and the longest row alone decide nothing.
        spread = np.quantile(observed, (np.arange(batch) + 0.5) / batch)
    lengths = np.maximum(1, np.rint(spread / spread.max() * longest).astype(int))
    return tuple(np.random.default_rng(batch).permutation(lengths).tolist())


def sample_dev_lengths(recipe: Recipe, tokenizer_folder: Path) -> np.ndarray | None:
    """Number of tokens of the first rows of the dev set; None if it cannot be read any more."""
    try:
        rows = find_task(recipe).read_rows(recipe.without_unlabeled())["dev"]
        sample = rows.select(range(min(SAMPLED_ROWS, len(rows))))
        return tokenize(load_tokenizer(tokenizer_folder), sample, recipe.max_length).lengths
    # The rows are gone, as on another machine: the bench itself needs none.
    except SpdError:
        return None


def measure_matrices(lineup: Lineup, threads: Sequence[int]) -> tuple[dict[int, MachinePeak], list[LedgerEntry]]:
    """Measure the machine and each pruned matrix; the sparse form is that of the first engine that has one."""
    sparse = None
    for name, operator in lineup.timing_operators.items():
        engine = lineup.engine(name)
        if ledger.has_packed_weights(Path(engine.path)):
            sparse = ledger.SparseFile(engine.path, engine.libraries, operator)
            break
    with console.busy("measuring the machine, and each pruned matrix alone"):
        return ledger.measure_ledger(Path(lineup.engine("student").path), sparse, threads)


def summarize(data: BenchData) -> BenchResult:
    """Make the record of stage.json; its speeds are those of the student's best form."""
    assert data.environment is not None
    columns, rows = report.overview_table(data)
    rounds = len(data.timings[0].rounds[data.grid[0]])
    speeds, caveats, factors, rivals = {}, {}, {}, {}
    for threads in data.threads:
        rival = data.speed_over_rivals(data.timing(data.best, threads))
        if rival is not None:
            rivals[threads] = rival
        speeds[threads] = data.speed_of_student(data.timing(data.best, threads), data.grid)
        caveat = ratio_caveat(speeds[threads], rounds)
        if caveat is not None:
            caveats[threads] = caveat
        split = split_speed(data, data.best, threads)
        if split is not None:
            factors[threads] = split
    tables = []
    if data.ledger:
        title = "sparsity ledger, one thread (matrices of one shape and density share a timing)"
        ledger_columns, ledger_rows = ledger_table(data.ledger)
        tables.append(Table(title=title, columns=ledger_columns, rows=ledger_rows))
    return BenchResult(
        columns=columns,
        rows=rows,
        tables=tables,
        verdict=report.describe_verdict(data),
        speeds=speeds,
        caveats=caveats,
        factors=factors,
        rivals=rivals,
        size=data.files["teacher"].bytes / data.files[data.best].bytes,
        best=data.best,
        provider=data.timings[0].provider,
        latency=latency_records(data),
        ledger=list(data.ledger),
        environment=data.environment,
    )


def describe_environment(
    timings: Sequence[Timing], threads: Sequence[int], peaks: Mapping[int, MachinePeak], *, on_gpu: bool
) -> BenchEnvironment:
    """Describe the machine, its processor and GPU, the provider that ran, and the measured peaks."""
    return BenchEnvironment(
        **describe_machine().model_dump(),
        threads=list(threads),
        provider=timings[0].provider,
        processor=describe_processor(),
        gpu=describe_gpu() if on_gpu else None,
        peaks=dict(peaks),
    )


def engine_record(timing: Timing) -> EngineRecord:
    """Make the record of bench.json: every round of one engine."""
    rounds = []
    for shape, milliseconds in timing.rounds.items():
        fields = shape._asdict()
        device = timing.device.get(shape)
        rounds.append(ShapeRounds(**fields, ms=milliseconds, least=timing.least[shape], device_ms=device))
    engine = asdict(timing.engine) | {"provider": timing.provider, "nodes": timing.nodes, "rounds": rounds}
    return EngineRecord.model_validate(engine | {"resident_bytes": timing.resident, "peak_bytes": timing.peak})
