"""`spdtool bench`: time the exported student against the exported dense teacher, side by side.

Reads: `export`, and `teacher` for the rows in torch. Writes: `bench/bench.json` (every round of every engine, the
ledger, and the machine) and `bench/bench.md` (what they mean). The runtime is onnxruntime on CUDA if that really runs,
otherwise on the CPU; the result says which.

Rows: `teacher` and `student` as plain ONNX files; the files of every further target, and beside a sparse form the dense
teacher in that form (exported here and thrown away); the teacher again without fused operators, in dynamic int8 (made
here and thrown away), in eager torch, and compiled by torch.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from spdtool import console
from spdtool.bench import ledger, report
from spdtool.bench.dense_int8 import quantize_dynamic_int8
from spdtool.bench.engines import Engine, Shape
from spdtool.bench.factors import split_speed
from spdtool.bench.latency import Timing, time_engines
from spdtool.bench.ledger_tables import ledger_table
from spdtool.bench.ratios import BenchData, ModelFile, latency_records, ratio_caveat
from spdtool.data.tokens import tokenize
from spdtool.errors import ModelError, RecipeError, SpdError
from spdtool.export import onnx_session
from spdtool.export.target import MODEL_FILE, Target, get_target, optional_targets
from spdtool.goals.promise import measure_promise, refuse_broken, timed_shape
from spdtool.models.load import load_tokenizer
from spdtool.recipe.fields import Recipe
from spdtool.run.fingerprint import describe_machine
from spdtool.run.folder import Run
from spdtool.run.records import (
    BenchEnvironment,
    BenchFile,
    BenchResult,
    EngineRecord,
    ExportedModel,
    ExportResult,
    LedgerEntry,
    MachinePeak,
    ShapeRounds,
    Table,
)
from spdtool.run.storage import write_json
from spdtool.tasks.prepare import find_task

DYNAMIC_INT8 = "int8"  # engine of the teacher, unless the target below was exported: its score was measured
INT8_TARGET = "onnx-int8"
FLOAT32 = "fp32"
DENSE = "dense"  # in the name of an engine: the teacher in the form of a sparse one
SAMPLED_ROWS = 512  # rows of the dev set whose lengths padded batches imitate


@dataclass
class Lineup:
    """The engines to time, and what is known of them.

    Attributes:
        files: by name of the engine.
        dense_forms: see `BenchData`.
        sparse: engines of targets that export the student only: sparse forms.
        pairs: engine of the student to engine of the teacher, of targets that export both.
        timing_operators: of sparse forms whose single products can be timed.
        notes: what has to be said beside the figures.
    """

    engines: list[Engine] = field(default_factory=list)
    files: dict[str, ModelFile] = field(default_factory=dict)
    sparse: list[str] = field(default_factory=list)
    pairs: dict[str, str] = field(default_factory=dict)
    dense_forms: dict[str, list[str]] = field(default_factory=dict)
    timing_operators: dict[str, tuple[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add_export(self, name: str, folder: Path, model: ExportedModel, target: Target, provider: str) -> None:
        """Add the files that a target exported to `folder` as an engine."""
        config = json.loads((folder / "config.json").read_text("utf-8"))
        is_onnx = target.opened_by == "onnxruntime"
        engine = Engine(
            name=name,
            kind=target.opened_by,
            path=str(folder / model.files[0] if is_onnx else folder),
            vocabulary=config["vocab_size"],
            pad=config.get("pad_token_id") or 0,
            provider=provider,
            libraries=tuple(map(str, target.libraries(folder))) if is_onnx else (),
            target=target.name,
        )
        self.engines.append(engine)
        self.files[name] = ModelFile.of_export(model)

    def engine(self, name: str) -> Engine:
        """The engine of that name."""
        return next(engine for engine in self.engines if engine.name == name)


def bench(run: Run) -> BenchResult:
    """Time the exported files of `run`; return the table that a run ends with, its verdict, and every figure.

    Raises:
        StageMissing, Corrupt: the run does not hold what is needed.
        DeviceError: onnxruntime, or a device that the recipe demands, is not there.
        SpdError: an engine died, or did not answer in time.
        GateError: the stage is done, and the goal of the recipe was missed.
    """
    recipe, section = run.recipe, run.recipe.bench
    provider = onnx_session.working_providers(recipe.device)[-1]
    wanted = [*section.threads, *([recipe.goal.threads] if recipe.goal.speedup else [])]
    threads = list(dict.fromkeys(count or onnx_session.usable_cores() for count in wanted))
    if provider == "cuda":
        threads = threads[-1:]  # threads of the CPU make no difference there
    export_folder, exported, teacher_folder = run.use_input("export"), run.export_result(), run.use_input("teacher")

    lineup = line_up_exports(export_folder, exported, provider, recipe)
    # Both are timed at the same shapes, so the shorter model decides.
    positions = min(exported.teacher.positions, exported.student.positions)
    shapes = choose_shapes(recipe, positions, export_folder / "teacher", lineup.notes)
    promised = timed_shape(recipe.goal, recipe.max_length, positions)
    if recipe.goal.speedup and promised not in shapes:
        shapes.append(promised)
    with run.stage("bench") as work, tempfile.TemporaryDirectory() as scratch:
        for name in lineup.sparse:
            add_dense_forms(lineup, name, exported.targets[name].student, teacher_folder, Path(scratch), recipe)
        add_teacher_engines(lineup, teacher_folder, Path(scratch), provider, recipe)
        peaks: dict[int, MachinePeak] = {}
        entries: list[LedgerEntry] = []
        # the matrices are read from the student's ONNX file
        if section.ledger and provider == "cpu" and lineup.engine("student").kind == "onnxruntime":
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
            )
        environment = describe_environment(result.timings, threads, peaks)
        data = BenchData(
            timings=result.timings,
            files=lineup.files,
            environment=environment,
            sparse=lineup.sparse,
            pairs=lineup.pairs,
            dense_forms=lineup.dense_forms,
            ledger=entries,
            notes=[*lineup.notes, *(f"{reason}." for reason in result.missing.values())],
            leaves_out=recipe.prune.is_structured,
        )
        # A smoke run's figures mean nothing, and its title says so.
        preposition = "with" if recipe.prune.is_structured else "at"
        title = recipe.mark_smoke(f"{recipe.task} {preposition} {recipe.size_label}")
        (work.folder / "bench.md").write_text(report.render_markdown(title, data), "utf-8")
        engines = [engine_record(timing) for timing in data.timings]
        write_json(work.folder / "bench.json", BenchFile(environment=environment, engines=engines, ledger=entries))
        work.result = summary = summarize(data, environment)
        if recipe.goal.is_set:
            teacher, student = (run.training_result(stage).dev for stage in ("teacher", "finetune"))
            summary.promise = measure_promise(recipe, data, promised, teacher, student)
            summary.verdict = [*(f"Goal: {line}." for line in summary.promise.lines), *summary.verdict]
    refuse_broken(summary.promise, recipe)
    return summary


def line_up_exports(folder: Path, exported: ExportResult, provider: str, recipe: Recipe) -> Lineup:
    """Collect the plain files of both roles, and the files of each further target that runs on `provider`."""
    lineup = Lineup()
    first = get_target(exported.first)
    lineup.add_export("teacher", folder / "teacher", exported.teacher, first, provider)
    lineup.engines[0] = replace(lineup.engines[0], baseline=True)  # the 1x
    lineup.add_export("student", folder / "student", exported.student, first, provider)
    for name, refusal in exported.refused.items():
        lineup.notes.append(f"Not shipped, so not timed: {name}: {refusal}.")
    for name, files in exported.further().items():
        try:
            target = get_target(name)
        except RecipeError as error:  # its plugin is not installed any more
            lineup.notes.append(f"Not timed: {name}: {error.message}.")
            continue
        reason = reason_not_to_time(target, provider, recipe, both_roles=files.teacher is not None)
        if reason is not None:
            lineup.notes.append(f"Not timed: {name}: {reason}.")
            if name == INT8_TARGET and files.teacher is not None:  # its bytes are compared all the same
                lineup.files[f"{name} teacher"] = ModelFile.of_export(files.teacher)
            continue
        for role, model in files.models().items():
            engine_name = name if role == "student" else f"{name} {role}"
            lineup.add_export(engine_name, folder / name / role, model, target, provider)
        if files.teacher is None:
            lineup.sparse.append(name)
            if target.timing_operator is not None:
                lineup.timing_operators[name] = target.timing_operator
        else:
            lineup.pairs[name] = f"{name} teacher"
    lineup.notes += not_exported_notes(exported, recipe)
    return lineup


def add_dense_forms(
    lineup: Lineup, name: str, model: ExportedModel, checkpoint: Path, scratch: Path, recipe: Recipe
) -> None:
    """Export the dense teacher in the form of a sparse engine, and add it as engines behind that one.

    Its weights are stored as the student's are; where that rounds them, also once more in float32.

    Args:
        model: the student in that form.
        checkpoint: the teacher's.
    """
    target = get_target(name)
    if not target.times_dense:
        return
    stored = (model.values or FLOAT32, model.embeddings or FLOAT32)
    forms = {f"{name} {DENSE}": stored}
    if stored != (FLOAT32, FLOAT32):
        forms[f"{name} {DENSE} {FLOAT32}"] = (FLOAT32, FLOAT32)
    lineup.dense_forms[name] = []
    for engine_name, (values, embeddings) in forms.items():
        folder = scratch / engine_name
        export = recipe.export.model_copy(update={"values": values, "embeddings": embeddings})
        try:
            with console.busy(f"exporting the dense teacher for the row {engine_name}"):
                files = target.export(checkpoint, folder, recipe.model_copy(update={"export": export}))
        except SpdError as error:
            lineup.notes.append(f"Not timed: {engine_name}: {error.message}.")
            continue
        size = sum(file.stat().st_size for file in files)
        teacher = lineup.files["teacher"]
        sparse = lineup.engine(name)
        path = folder / MODEL_FILE if sparse.kind == "onnxruntime" else folder
        engine = replace(sparse, name=engine_name, path=str(path), optional=True)
        place = lineup.engines.index(sparse) + 1 + len(lineup.dense_forms[name])
        lineup.engines.insert(place, engine)
        lineup.files[engine_name] = ModelFile(size, size=teacher.size, sparsity=teacher.sparsity)
        lineup.dense_forms[name].append(engine_name)


def reason_not_to_time(target: Target, provider: str, recipe: Recipe, *, both_roles: bool) -> str | None:
    """Why a target's files are not timed here, or None."""
    runs_here = provider in target.providers
    if not both_roles:
        return None if runs_here else f"it does not run on {provider}; compare it with --set device=cpu"
    if not recipe.bench.variants:
        return "bench.variants is off"
    if provider == "cpu" and target.storage_formats(recipe).matrices == "fp16":
        return "a CPU computes it in float32, with conversions between; it is for a GPU, and onnxruntime has none here"
    return None if runs_here else f"it does not run on {provider}"


def not_exported_notes(exported: ExportResult, recipe: Recipe) -> list[str]:
    """Name the optional targets that the export stage left out, with the reason where it is known."""
    available, errors = optional_targets(recipe)
    notes = []
    for name in [*errors, *(choice.name for choice in available)]:
        if name in exported.targets or name in exported.refused:
            continue
        note, error = f"Not exported, so not timed: {name}", errors.get(name)
        if error is not None:
            note += f": {error.message}"
            if error.hint:
                note += f"; {error.hint}"
        notes.append(f"{note}.")
    return notes


def add_teacher_engines(lineup: Lineup, checkpoint: Path, scratch: Path, provider: str, recipe: Recipe) -> None:
    """Add the teacher's further rows that the recipe wants; on CUDA not those that exist on a CPU only."""
    section, plain = recipe.bench, lineup.engines[0]
    plain_on_cpu = provider == "cpu" and plain.kind == "onnxruntime"
    if section.unfused and plain_on_cpu:
        lineup.engines.append(replace(plain, name="unfused", fused=False))
        lineup.notes.append("1x is the dense teacher, fused or unfused, whichever is the faster at that shape.")
    if section.int8 and plain_on_cpu and INT8_TARGET not in lineup.pairs:
        file = scratch / "int8.onnx"
        try:
            with console.busy("quantising the teacher to int8, to compare with"):
                quantize_dynamic_int8(Path(plain.path), file)
        except ModelError as error:
            lineup.notes.append(f"Not timed: {DYNAMIC_INT8}: {error.message}.")
        else:
            # Optional: a runtime that quantizes a model need not be able to run it.
            engine = replace(plain, name=DYNAMIC_INT8, path=str(file), baseline=False, optional=True)
            lineup.engines.append(engine)
            lineup.files[DYNAMIC_INT8] = ModelFile(file.stat().st_size)
    if section.torch:
        eager = replace(plain, name="torch", kind="torch", path=str(checkpoint), baseline=False)
        lineup.engines.append(eager)
        if section.compiled:
            lineup.engines.append(replace(eager, name="compiled", compiled=True, optional=True))


def choose_shapes(recipe: Recipe, positions: int, tokenizer_folder: Path, notes: list[str]) -> list[Shape]:
    """The recipe's grid, then its padded shapes; lengths beyond the model's positions are cut, with a warning."""
    section = recipe.bench
    wanted = dict.fromkeys((*section.lengths, *(length for _, length in section.padded)))
    too_long = [str(length) for length in wanted if length > positions]
    if too_long:
        lengths = ", ".join(too_long)
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
        spread = np.quantile(observed, (np.arange(batch) + 0.5) / batch)
    lengths = np.maximum(1, np.rint(spread / spread.max() * longest).astype(int))
    return tuple(np.random.default_rng(batch).permutation(lengths).tolist())


def sample_dev_lengths(recipe: Recipe, tokenizer_folder: Path) -> np.ndarray | None:
    """Number of tokens of the first rows of the dev set; None if it cannot be read any more."""
    try:
        rows = find_task(recipe).read_rows(recipe.without_unlabeled())["dev"]
        sample = rows.select(range(min(SAMPLED_ROWS, len(rows))))
        return tokenize(load_tokenizer(tokenizer_folder), sample, recipe.max_length).lengths
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


def summarize(data: BenchData, environment: BenchEnvironment) -> BenchResult:
    """Make the record of stage.json; its speeds are those of the student's best form."""
    columns, rows = report.overview_table(data)
    rounds = len(data.timings[0].rounds[data.grid[0]])
    speeds, caveats, factors = {}, {}, {}
    for threads in data.threads:
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
        size=data.files["teacher"].bytes / data.files[data.best].bytes,
        best=data.best,
        provider=data.timings[0].provider,
        latency=latency_records(data),
        ledger=list(data.ledger),
        environment=environment,
    )


def describe_environment(
    timings: Sequence[Timing], threads: Sequence[int], peaks: Mapping[int, MachinePeak]
) -> BenchEnvironment:
    """Describe the machine, the provider that ran, and the measured peaks."""
    machine = describe_machine().model_dump()
    return BenchEnvironment(**machine, threads=list(threads), provider=timings[0].provider, peaks=dict(peaks))


def engine_record(timing: Timing) -> EngineRecord:
    """Make the record of bench.json: every round of one engine."""
    rounds = []
    for shape, milliseconds in timing.rounds.items():
        fields = shape._asdict()
        rounds.append(ShapeRounds(**fields, ms=milliseconds, least=timing.least[shape]))
    engine = asdict(timing.engine) | {"provider": timing.provider, "nodes": timing.nodes, "rounds": rounds}
    return EngineRecord.model_validate(engine | {"resident_bytes": timing.resident, "peak_bytes": timing.peak})
