"""`spdtool bench`: the exported student against the exported dense teacher, side by side.

Reads: `export`, and `teacher` for the row in eager torch. Writes: `bench/bench.json` (every round of every engine, and
the machine) and `bench/bench.md` (what they say). The runtime is onnxruntime on CUDA where that really runs, otherwise
on the CPU; what ran is part of the result.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spdtool import console
from spdtool.bench import latency, report
from spdtool.bench.latency import Engine, Shape, Timing
from spdtool.export import runtime
from spdtool.recipe import Recipe
from spdtool.run import Run, machine, write_json


def bench(run: Run) -> dict[str, Any]:
    """Time the exported files of `run`; return the table that a run ends with, its verdict, and every figure.

    Raises:
        StageMissing, Corrupt: the run does not hold what is needed.
        DeviceError: onnxruntime, or a device that the recipe demands, is not there.
        SpdError: an engine died, or did not answer in time.
    """
    recipe, section = run.recipe, run.recipe.bench
    provider = runtime.working(recipe.device)[-1]
    folder, exported = run.read("export"), run.record("export")["metrics"]
    shapes = fitting_shapes(recipe, exported["teacher"]["positions"])
    engines = [_exported(role, folder / role, exported[role]["files"][0], provider, recipe) for role in ROLES]
    if section.torch:
        engines.append(_in_torch(run.read("teacher"), engines[0]))
    with run.stage("bench") as work:
        with console.busy(f"timing {len(engines)} engines at {len(shapes)} shapes over {section.rounds} rounds"):
            timings = latency.race(engines, shapes, rounds=section.rounds, warmup=section.warmup)
        environment = _environment(timings, section.threads or runtime.cores())
        speed = report.ratio(timings[0], timings[1], shapes)
        lines = report.verdict(speed, section.rounds, timings[0].provider, exported["teacher"], exported["student"])
        columns, rows = report.overview(timings, exported)
        title = recipe.titled(f"{recipe.task} at {recipe.sparsity:.0%} zeros")
        (work.folder / "bench.md").write_text(report.markdown(title, timings, lines, environment), "utf-8")
        write_json(work.folder / "bench.json", {"environment": environment, "engines": _raw(timings)})
        work.metrics |= {
            "columns": columns,
            "rows": rows,
            "verdict": lines,
            "speed": asdict(speed),
            "size": exported["teacher"]["bytes"] / exported["student"]["bytes"],
            "provider": timings[0].provider,
            "latency": report.details(timings),
            "environment": environment,
        }
    return work.metrics


ROLES = ("teacher", "student")  # the dense teacher first: ratios are to it


def fitting_shapes(recipe: Recipe, positions: int) -> list[Shape]:
    """The grid of the recipe; lengths that the model has no positions for are measured at its longest, and said so."""
    lengths = list(dict.fromkeys(min(length, positions) for length in recipe.bench.lengths))
    cut = [str(length) for length in recipe.bench.lengths if length > positions]
    if cut:
        console.warn(f"the model has {positions} positions: length {', '.join(cut)} is timed at {positions}")
    return [(batch, length) for batch in recipe.bench.batches for length in lengths]


def _exported(role: str, folder: Path, file: str, provider: str, recipe: Recipe) -> Engine:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return Engine(
        name=role,
        kind="onnxruntime",
        path=str(folder / file),
        vocabulary=config["vocab_size"],
        pad=config.get("pad_token_id") or 0,
        provider=provider,
        threads=recipe.bench.threads,
    )


def _in_torch(checkpoint: Path, like: Engine) -> Engine:
    return Engine(**asdict(like) | {"name": "torch", "kind": "torch", "path": str(checkpoint)})


def _environment(timings: list[Timing], threads: int) -> dict[str, Any]:
    return {**machine(), "threads": threads, "provider": timings[0].provider}


def _raw(timings: list[Timing]) -> list[dict[str, Any]]:
    return [
        {
            "engine": {name: value for name, value in asdict(timing.engine).items() if name != "path"},
            "provider": timing.provider,
            "nodes": timing.nodes,
            "resident_bytes": timing.resident,
            "peak_bytes": timing.peak,
            "rounds_ms": [
                {"batch": batch, "length": length, "ms": values} for (batch, length), values in timing.rounds.items()
            ],
        }
        for timing in timings
    ]
