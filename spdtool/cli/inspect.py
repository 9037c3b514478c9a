"""What a run folder says of itself: stages, lineage, sparsity of every layer, and the final table."""

from __future__ import annotations

from typing import Any

from spdtool.recipe import STAGES
from spdtool.run.fingerprint import sha256
from spdtool.run.folder import RECORD, Run
from spdtool.run.records import TrainingResult


def inspect_run(run: Run) -> dict[str, Any]:
    """Everything that the stage records hold, checked against the files.

    Raises:
        Corrupt: a file of a finished stage was altered or cut short.
    """
    stages, layers, sparsest = [], [], None
    for stage in STAGES:
        if not run.done(stage):
            partial = (run.path / f".{stage}.partial").exists()
            stages.append(_row(stage, "in progress" if partial else "missing"))
            continue
        run.read(stage)
        record = run.record(stage)
        inputs = record.inputs or {"rows": "" if record.data is None else record.data.digest}
        made_from = ", ".join(f"{name} {digest[:8]}" for name, digest in inputs.items() if digest)
        label = f"done {sha256(run.path / stage / RECORD)[:8]}"
        row = _row(stage, label, made_from, record.seconds)
        if isinstance(record.result, TrainingResult):
            result = record.result
            row |= {"steps": result.steps, "dev_score": result.score, "sparsity": result.sparsity}
            if result.zeros:
                sparsest = stage
                layers = [(name, *count, count.zeros / count.size) for name, count in result.zeros.items()]
        stages.append(row)
    return {
        "run": str(run.path),
        "smoke": run.recipe.smoke,
        "recipe": run.recipe.name,
        "stages": stages,
        "sparsest": sparsest,
        "layers": layers,
    }


def _row(stage: str, state: str, *rest: Any) -> dict[str, Any]:
    names = ("made_from", "seconds", "steps", "dev_score", "sparsity")
    return {"stage": stage, "state": state} | dict.fromkeys(names) | dict(zip(names, rest, strict=False))
