"""What a page shows of one run, as plain values for the template; everything is read from the run's own records."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from spdtool import console
from spdtool.recipe import PHASES, STAGES
from spdtool.report import curves, replay
from spdtool.run.folder import RECORD, Run, sha256
from spdtool.sweep import rows as report_rows
from spdtool.sweep import summary
from spdtool.sweep.rows import Row

LAYER = re.compile(r"^(?P<layer>.*?\.\d+)\.(?P<matrix>.+?)(\.weight)?$")
OF_MATRIX = (
    "name",
    "size",
    "nonzeros",
    "density",
    "tokens",
    "dense us",
    "sparse us",
    "speed",
    "bound us",
    "of the bound",
)


def of_run(run: Run) -> dict[str, Any]:
    """All sections of one run; what is not there yet is empty, and named under `missing`.

    Raises:
        Corrupt: a stage's record cannot be read.
    """
    row = report_rows.of_run(run)
    records = {stage: run.record(stage) for stage in STAGES if run.done(stage)}
    return {
        "title": f"{row.task} at {row.sparsity:.4g} sparsity",
        "path": str(run.path),
        "recipe": run.recipe,
        "row": row,
        "smoke": run.recipe.smoke,
        "missing": [stage for stage in STAGES if stage not in records],
        "tiles": tiles(row, records),
        "stages": [_stage(run, stage, records) for stage in STAGES],
        "gaps": gaps(run, records),
        "bench": bench(records),
        "commands": replay.of_run(run),
        "environment": environment(records),
        "student": curves.of_student(run),
        "teacher": curves.of_teacher(run) if "teacher" in records or _begun(run) else curves.Course(()),
        "zeros": zeros(records),
    }


def tiles(row: Row, records: Mapping[str, Any]) -> list[dict[str, str]]:
    """The headline: a name, a figure, and what has to be said with it."""
    phase = next((stage for stage in reversed(PHASES) if stage in records), None)
    found = [_tile("teacher, dev", _score(row.teacher), _others(records.get("teacher")))]
    if phase:
        after = "" if phase == PHASES[-1] else f"after {phase}; "
        found.append(_tile("student, dev", _score(row.student), after + _others(records[phase])))
        found.append(_tile("kept", "-" if row.kept is None else f"{row.kept:.1%}", "student over teacher"))
        if row.nonzeros is not None and row.weights:
            left = f"{row.nonzeros:,} of {row.weights:,} weights are left in the encoder's matrices"
            found.append(_tile("zeros", f"{1 - row.nonzeros / row.weights:.2%}", left))
    return found + (_bench_tiles(row, records["bench"]["metrics"], records["export"]["metrics"]) if row.speed else [])


def _bench_tiles(row: Row, measured: Mapping[str, Any], exported: Mapping[str, Any]) -> list[dict[str, str]]:
    threads, speed = report_rows.headline(measured)
    best = measured["best"]
    facts = exported["student"] if best == "student" else exported[best]["student"]
    rounded = f", matrices in {facts['values']}, embeddings in {facts['embeddings']}" if "values" in facts else ""
    doubt = measured.get("caveats", {}).get(threads)
    said = f"; {doubt}" if doubt else ""
    reach = f"{speed['low']:.2f}x to {speed['high']:.2f}x; {best}, {_threads(threads)}{rounded}{said}"
    size = f"{row.bytes:,} of {row.teacher_bytes:,} bytes, {best}{rounded}"
    return [
        _tile(
            "speed", f"{speed['median']:.2f}x", f"that of the dense teacher, {reach}; what it is owed to is said below"
        ),
        _tile("file, times smaller", f"{measured['size']:.2f}x", size),
    ]


def gaps(run: Run, records: Mapping[str, Any]) -> dict[str, Any]:
    """Train score, dev score and the gap between them, of what each stage handed over."""
    found = []
    for stage in ("teacher", *PHASES):
        if stage in records:
            dev = report_rows.dev(records[stage])
            train = report_rows.train(report_rows.teacher_record(run) if stage == "teacher" else records[stage])
            found.append([stage, _score(train), _score(dev), _score(report_rows.difference(train, dev))])
    return table("scores x 100", ("stage", "train", "dev", "gap"), found)


def bench(records: Mapping[str, Any]) -> dict[str, Any] | None:
    """The bench's table and words, the latencies by shape, and the ledger by layer and by matrix."""
    if "bench" not in records:
        return None
    metrics = records["bench"]["metrics"]
    ledger = metrics.get("ledger") or []
    return {
        "verdict": metrics["verdict"],
        "overview": table("engines", metrics["columns"], metrics["rows"]),
        "latency": latency(metrics["latency"], ledger),
        "layers": [table(each["title"], each["columns"], each["rows"]) for each in metrics.get("tables", ())],
        "matrices": table("every matrix, one thread", OF_MATRIX, [line for entry in ledger for line in _matrix(entry)]),
    }


def latency(entries: Sequence[Mapping[str, Any]], ledger: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A table for each number of threads: shapes by engines, median milliseconds and speed.

    The last column, where the ledger knows that many tokens, is the least that the pruned products can take with one
    thread: the sum of their bounds.
    """
    found = []
    for threads in dict.fromkeys(entry["threads"] for entry in entries):
        mine = [entry for entry in entries if entry["threads"] == threads]
        engines = list(dict.fromkeys(entry["engine"] for entry in mine))
        cells = {(entry["shape"], entry["engine"]): _timed(entry) for entry in mine}
        tokens = {entry["shape"]: str(entry["batch"] * entry["length"]) for entry in mine if not entry["real"]}
        shapes = list(dict.fromkeys(entry["shape"] for entry in mine))
        lines = [[shape, *(cells.get((shape, engine), "-") for engine in engines)] for shape in shapes]
        columns = ["batch x length", *engines]
        if threads == 1 and ledger:
            columns.append("bound")
            lines = [[*line, _bound(ledger, tokens.get(line[0]))] for line in lines]
        title = f"median milliseconds (speed against the dense teacher), {_threads(threads)}"
        title += "; bound: the least that the pruned products can take" if "bound" in columns else ""
        found.append(table(title, columns, lines))
    return found


def zeros(records: Mapping[str, Any]) -> dict[str, Any]:
    """Sparsity by layer and matrix of the last phase that is done."""
    phase = next((stage for stage in reversed(PHASES) if stage in records), None)
    counted = records[phase]["metrics"].get("zeros", {}) if phase else {}
    values: dict[tuple[str, str], float] = {}
    for name, (dead, size) in counted.items():
        found = LAYER.match(name)
        values[(found["layer"], found["matrix"]) if found else ("", name)] = dead / size
    layers, matrices = ([*dict.fromkeys(key[part] for key in values)] for part in (0, 1))
    return {"phase": phase, "layers": layers, "matrices": matrices, "values": values}


def environment(records: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The machine of the last finished stage; stages that another one made are said."""
    if not records:
        return []
    last = list(records)[-1]
    machine = records[last].get("machine", {})
    lines = [("spdtool", str(records[last].get("spdtool", "-")))]
    lines += [(name, _flat(value)) for name, value in machine.items()]
    other = [stage for stage, record in records.items() if record.get("machine") != machine]
    measured = records["bench"]["metrics"].get("environment", {}) if "bench" in records else {}
    lines += [(name, _flat(value)) for name, value in measured.items() if name not in machine]
    return lines + ([("made on another machine", ", ".join(other))] if other else [])


def table(title: str, columns: Sequence[Any], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """A table for the template, its cells as text."""
    texts = [[console.format_cell(cell) for cell in row] for row in rows]
    words = [not console.is_numeric(column) for column in zip(*texts, strict=True)]
    return {"title": title, "columns": list(columns), "rows": texts, "words": words}


def comparison(rows: Sequence[Row]) -> dict[str, Any]:
    """What several runs are compared by."""
    summaries = summary.summarise(rows)
    return {
        "tables": [
            table("score and gap over seeds", *summary.table(summaries)),
            table("average over tasks", *summary.averages_table(summaries)),
        ],
        "legend": summary.LEGEND,
        "failed": summary.failures(rows),
        "open": [summary.name(row) for row in rows if row.status == report_rows.UNFINISHED],
        "summaries": summaries,
    }


def _stage(run: Run, stage: str, records: Mapping[str, Any]) -> dict[str, Any]:
    if stage not in records:
        return {"name": stage, "state": "in progress" if _begun(run, stage) else "missing", "cells": ["-"] * 8}
    record = records[stage]
    metrics = record["metrics"]
    made_from = ", ".join(f"{name} {digest[:8]}" for name, digest in record["inputs"].items())
    if stage == "teacher" and metrics.get("given"):
        made_from = f"given: {metrics['given']}"
    dev, train = report_rows.dev(record), report_rows.train(record)
    sparsity = metrics.get("sparsity")
    cells = [sha256(run.path / stage / RECORD)[:8], made_from or "-", f"{record['seconds']:,.0f}"]
    cells += [console.format_cell(metrics.get("steps")), _score(dev), _score(train)]
    cells += ["-" if sparsity is None else f"{sparsity:.2%}", record.get("finished", "-")[:16].replace("T", " ")]
    return {"name": stage, "state": "done", "cells": cells}


def _begun(run: Run, stage: str = "teacher") -> bool:
    return (run.path / f".{stage}.partial").is_dir()


def _threads(count: int | str) -> str:
    return f"{count} thread" + ("" if str(count) == "1" else "s")


def _tile(name: str, figure: str, note: str) -> dict[str, str]:
    return {"name": name, "figure": figure, "note": note}


def _others(record: Mapping[str, Any] | None) -> str:
    """The metrics beside the headline score."""
    metrics = (record or {"metrics": {}})["metrics"].get("dev") or {}
    return ", ".join(f"{name} {100 * value:.2f}" for name, value in metrics.items() if name != "score")


def _score(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _timed(entry: Mapping[str, Any]) -> str:
    ratio = "1x" if entry["engine"] == entry["dense"] else f"{entry['ratio']['median']:.2f}x"
    return f"{console.format_cell(entry['p50'])} ({ratio})"


def _bound(ledger: Sequence[Mapping[str, Any]], tokens: str | None) -> str:
    bounds = [entry["products"][tokens]["bound_us"] for entry in ledger if tokens in entry["products"]]
    return console.format_cell(sum(bounds) / 1e3) if len(bounds) == len(ledger) else "-"


def _matrix(entry: Mapping[str, Any]) -> list[list[Any]]:
    facts = [entry["name"], f"{entry['rows']}x{entry['columns']}", entry["nonzeros"], f"{entry['density']:.2%}"]
    lines = []
    for tokens, product in entry["products"].items():
        sparse, bound = product["sparse_us"], product["bound_us"]
        ratio = "-" if sparse is None else f"{product['ratio']:.2f}x"
        reached = "-" if sparse is None else f"{bound / sparse:.0%}"
        lines.append([*facts, tokens, product["dense_us"], sparse, ratio, bound, reached])
    return lines


def _flat(value: Any) -> str:
    return ", ".join(f"{name} {item}" for name, item in value.items()) if isinstance(value, Mapping) else str(value)
