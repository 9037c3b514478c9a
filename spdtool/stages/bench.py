"""`spdtool bench`: the exported student against the exported dense teacher, side by side.

Reads: `export`, and `teacher` for the rows in torch. Writes: `bench/bench.json` (every round of every engine, the
ledger, and the machine) and `bench/bench.md` (what they say). The runtime is onnxruntime on CUDA where that really
runs, otherwise on the CPU; what ran is part of the result.

Rows: `teacher` and `student` as plain ONNX files; each further target's files; the teacher again without
fused operators, in dynamic int8 (made here, thrown away), in eager torch, and compiled by torch.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from spdtool import console
from spdtool.bench import int8, latency, ledger, report
from spdtool.bench.latency import Engine, Shape, Timing
from spdtool.data import tokens as data
from spdtool.errors import ModelError, RecipeError, SpdError
from spdtool.export import runtime
from spdtool.export.target import Target, get_target, optional_targets
from spdtool.models.load import load_tokenizer
from spdtool.recipe.fields import Recipe
from spdtool.run.fingerprint import describe_machine
from spdtool.run.folder import Run, write_json
from spdtool.run.records import (
    BenchEnvironment,
    BenchFile,
    BenchResult,
    EngineRecord,
    ExportedModel,
    ExportResult,
    LatencyRecord,
    LedgerEntry,
    MachinePeak,
    Ratio,
    ShapeRounds,
    Table,
)
from spdtool.tasks import find_task

INT8 = "onnx-int8"  # the target whose teacher is the int8 rival, with its score
SEEN = 512  # rows of the dev set whose lengths are looked at


def bench(run: Run) -> BenchResult:
    """Time the exported files of `run`; return the table that a run ends with, its verdict, and every figure.

    Raises:
        StageMissing, Corrupt: the run does not hold what is needed.
        DeviceError: onnxruntime, or a device that the recipe demands, is not there.
        SpdError: an engine died, or did not answer in time.
    """
    recipe, section = run.recipe, run.recipe.bench
    provider = runtime.working_providers(recipe.device)[-1]
    folder, exported = run.read("export"), run.export_result()
    teacher = run.read("teacher")
    counts = tuple(dict.fromkeys(count or runtime.usable_cores() for count in section.threads))
    if provider == "cuda":
        counts = counts[-1:]  # threads of the CPU make no difference there
    entered = enter(folder, exported, provider, recipe)
    positions = min(exported.teacher.positions, exported.student.positions)
    shapes = fitting_shapes(recipe, positions, folder / "teacher", entered.notes)
    with run.stage("bench") as work, tempfile.TemporaryDirectory() as scratch:
        add_teachers(entered, teacher, Path(scratch), provider, recipe)
        machines, entries = _ledger(entered, counts) if section.ledger and provider == "cpu" else ({}, [])
        with console.busy(
            f"timing {len(entered.engines)} engines at {len(shapes)} shapes with {_listed(counts)} threads"
        ):
            race = latency.race(
                entered.engines,
                shapes,
                threads=counts,
                rounds=section.rounds,
                warmup=section.warmup,
                seconds=section.seconds,
            )
        entered.notes += [f"{reason}." for reason in race.missing.values()]
        found = report.Bench(
            timings=race.timings,
            facts=entered.facts,
            sparse=entered.sparse,
            ledger=entries,
            notes=entered.notes,
            treated=entered.treated,
            environment=dict(_environment(race.timings, machines, counts).lines()),
        )
        environment = _environment(race.timings, machines, counts)
        listed = [LedgerEntry.model_validate(entry) for entry in entries]
        title = recipe.mark_smoke(f"{recipe.task} at {recipe.sparsity:.0%} zeros")
        (work.folder / "bench.md").write_text(report.markdown(title, found), "utf-8")
        raw = BenchFile(environment=environment, engines=_raw(race.timings), ledger=listed)
        write_json(work.folder / "bench.json", raw)
        work.result = result = _result(found, listed, environment)
    return result


@dataclass
class Entered:
    """Keeps what is going to be timed, what is known of the files, and what has to be said.

    Attributes:
        sparse: engines that run a further target's form of the student alone.
        treated: engines whose file is the student's with a treatment that the teacher had too, and the teacher's.
    """

    engines: list[Engine]
    facts: dict[str, dict[str, Any]]
    sparse: list[str]
    notes: list[str]
    treated: dict[str, str] = field(default_factory=dict)


def enter(folder: Path, exported: ExportResult, provider: str, recipe: Recipe) -> Entered:
    """The exported files of both roles, and those of each further target that runs here on `provider`."""
    found = Entered([], {}, [], [])
    for role, model in (("teacher", exported.teacher), ("student", exported.student)):
        found.facts[role] = model.model_dump(exclude_none=True)
        found.engines.append(_exported(role, folder / role, model, provider))
    found.engines[0] = replace(found.engines[0], baseline=True)
    for target, reason in exported.refused.items():
        found.notes.append(f"Not shipped, so not timed: {target}: {reason}.")
    for target, files in exported.further().items():
        try:
            part = get_target(target)
        except RecipeError as error:
            found.notes.append(f"Not timed: {target}: {error.message}.")
            continue
        both = files.teacher is not None
        if both and (why := _untimed(part, provider, recipe)):
            found.notes.append(f"Not timed: {target}: {why}.")
            continue
        if provider not in part.providers:
            found.notes.append(f"Not timed: {target}: it does not run on {provider}; compare it with --set device=cpu.")
            continue
        for role, model in files.models().items():
            name = target if role == "student" else f"{target} {role}"
            place = folder / target / role
            engine = _exported(name, place, model, provider)
            found.engines.append(replace(engine, libraries=tuple(map(str, part.libraries(place)))))
            found.facts[name] = model.model_dump(exclude_none=True)
            found.sparse += [name] if role == "student" and not both else []
        if both:
            found.treated[target] = f"{target} teacher"
    offered, missing = optional_targets(recipe.export)
    gone = {*exported.targets, *exported.refused}
    left = [name for name in (*missing, *(choice.name for choice in offered)) if name not in gone]
    found.notes += [f"Not exported, so not timed: {name}" + _reason(missing.get(name)) for name in left]
    return found


def _untimed(target: Target, provider: str, recipe: Recipe) -> str | None:
    """Why a treatment of both roles is not timed here; None: it is."""
    if not recipe.bench.variants:
        return "bench.variants is off"
    if provider == "cpu" and "fp16" in target.storage_formats(recipe):
        return "a CPU computes it in float32, with conversions between; it is for a GPU, and onnxruntime has none here"
    return None if provider in target.providers else f"it does not run on {provider}"


def add_teachers(found: Entered, checkpoint: Path, scratch: Path, provider: str, recipe: Recipe) -> None:
    """The teacher's further rows, as far as the recipe wants them; what exists on the CPU only is left out on CUDA."""
    section, plain = recipe.bench, found.engines[0]
    if section.unfused and provider == "cpu":
        found.engines.append(replace(plain, name="unfused", fused=False))
        found.notes.append("1x is the dense teacher, fused or unfused, whichever is the faster at that shape.")
    if section.int8 and provider == "cpu" and INT8 not in found.treated:
        file = scratch / "int8.onnx"
        try:
            with console.busy("quantising the teacher to int8, to compare with"):
                int8.quantise(Path(plain.path), file)
        except ModelError as error:
            found.notes.append(f"Not timed: int8: {error.message}.")
        else:
            int8_engine = replace(plain, name="int8", path=str(file), baseline=False, optional=True)
            found.engines.append(int8_engine)
            found.facts[int8_engine.name] = {"bytes": file.stat().st_size}
    if section.torch:
        eager = replace(plain, name="torch", kind="torch", path=str(checkpoint), baseline=False)
        found.engines.append(eager)
        if section.compiled:
            found.engines.append(replace(eager, name="compiled", compiled=True, optional=True))


def fitting_shapes(recipe: Recipe, positions: int, tokenizer: Path, notes: list[str]) -> list[Shape]:
    """The grid of the recipe, then its padded shapes; what the model has no positions for is cut, and said so."""
    section = recipe.bench
    wanted = dict.fromkeys((*section.lengths, *(length for _, length in section.padded)))
    cut = [str(length) for length in wanted if length > positions]
    if cut:
        console.warn(f"the model has {positions} positions: length {', '.join(cut)} is timed at {positions}")
    lengths = list(dict.fromkeys(min(length, positions) for length in section.lengths))
    grid = [Shape(batch, length) for batch in section.batches for length in lengths]
    if not section.padded:
        return grid
    seen = _dev_lengths(recipe, tokenizer)
    drawn = "evenly from 1 to the longest" if seen is None else "as in the dev set, scaled to the longest"
    notes.append(f"Padded shapes: real lengths are spread {drawn}.")
    padded = dict.fromkeys((batch, min(length, positions)) for batch, length in section.padded)
    return [*grid, *(Shape(batch, length, real_lengths(batch, length, seen)) for batch, length in padded)]


def real_lengths(batch: int, length: int, seen: np.ndarray | None) -> tuple[int, ...]:
    """Real lengths of a batch that is padded to its longest row, which has `length` tokens.

    Args:
        seen: lengths whose quantiles are taken, and scaled; None: spread evenly from 1 to `length`.
    """
    spread = np.linspace(1, length, batch) if seen is None else np.quantile(seen, (np.arange(batch) + 0.5) / batch)
    scaled = np.maximum(1, np.rint(spread / spread.max() * length).astype(int))
    return tuple(np.random.default_rng(batch).permutation(scaled).tolist())


def _dev_lengths(recipe: Recipe, folder: Path) -> np.ndarray | None:
    """Tokens of the first rows of the dev set; None where it cannot be read any more."""
    try:
        rows = find_task(recipe).read_rows(recipe)["dev"]
        few = replace(
            rows, first=rows.first[:SEEN], second=rows.second and rows.second[:SEEN], labels=rows.labels[:SEEN]
        )
        return data.tokenize(load_tokenizer(folder), few, recipe.max_length).lengths
    except SpdError:
        return None


def _exported(name: str, folder: Path, model: ExportedModel, provider: str) -> Engine:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return Engine(
        name=name,
        kind="onnxruntime",
        path=str(folder / model.files[0]),
        vocabulary=config["vocab_size"],
        pad=config.get("pad_token_id") or 0,
        provider=provider,
    )


def _ledger(found: Entered, counts: tuple[int, ...]) -> tuple[dict[int, ledger.Machine], list[dict[str, Any]]]:
    """Measure the machine and each pruned matrix; its sparse form is the first further target that has one."""
    by_name = {engine.name: engine for engine in found.engines}
    packed = [by_name[name] for name in found.sparse if ledger.has_packed(Path(by_name[name].path))]
    with console.busy("measuring the machine, and each pruned matrix alone"):
        return ledger.write(
            Path(by_name["student"].path),
            Path(packed[0].path) if packed else None,
            packed[0].libraries if packed else (),
            counts,
        )


def _result(found: report.Bench, ledger: list[LedgerEntry], environment: BenchEnvironment) -> BenchResult:
    """Summarise the bench for stage.json."""
    columns, rows = report.overview(found)
    best = [*found.sparse, "student"][0]
    speeds = {count: found.zeros(found.of(best, count), found.grid) for count in found.threads}
    rounds = len(found.timings[0].rounds[found.grid[0]])
    doubts = {count: report.caveat(speed, rounds) for count, speed in speeds.items()}
    tables = []
    if found.ledger:
        head, lines = report.ledger_table(found.ledger)
        tables.append(
            Table(
                title="sparsity ledger, one thread (matrices of one shape and density share a timing)",
                columns=head,
                rows=lines,
            )
        )
    return BenchResult(
        columns=columns,
        rows=rows,
        tables=tables,
        verdict=report.verdict(found),
        speeds={count: Ratio.model_validate(asdict(speed)) for count, speed in speeds.items()},
        caveats={count: doubt for count, doubt in doubts.items() if doubt is not None},
        size=found.facts["teacher"]["bytes"] / found.facts[best]["bytes"],
        best=best,
        provider=found.timings[0].provider,
        latency=[LatencyRecord.model_validate(entry) for entry in report.details(found)],
        ledger=ledger,
        environment=environment,
    )


def _environment(
    timings: list[Timing], machines: dict[int, ledger.Machine], counts: tuple[int, ...]
) -> BenchEnvironment:
    peaks = {count: MachinePeak(flops=peak.flops, bandwidth=peak.bandwidth) for count, peak in machines.items()}
    machine = describe_machine().model_dump()
    return BenchEnvironment(**machine, threads=list(counts), provider=timings[0].provider, peaks=peaks)


def _listed(counts: tuple[int, ...]) -> str:
    return " and ".join(map(str, counts))


def _reason(error: SpdError | None) -> str:
    return "." if error is None else f": {error.message}" + (f"; {error.hint}." if error.hint else ".")


def _raw(timings: list[Timing]) -> list[EngineRecord]:
    engines = []
    for timing in timings:
        rounds = [
            ShapeRounds(batch=shape.batch, length=shape.length, real=shape.real, ms=values, least=timing.least[shape])
            for shape, values in timing.rounds.items()
        ]
        engine = asdict(timing.engine)
        engine |= {"provider": timing.provider, "nodes": timing.nodes, "rounds": rounds}
        engine |= {"resident_bytes": timing.resident, "peak_bytes": timing.peak}
        engines.append(EngineRecord.model_validate(engine))
    return engines
