"""What a run folder says of itself: stages, lineage, sparsity of every layer, and the final table."""

from __future__ import annotations

from typing import Any

from spdtool.recipe import STAGES
from spdtool.run.folder import RECORD, Run, sha256


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
        metrics = record["metrics"]
        inputs = record["inputs"] or {"rows": (record.get("data") or {}).get("digest", "")}
        made_from = ", ".join(f"{name} {digest[:8]}" for name, digest in inputs.items() if digest)
        label = f"done {sha256(run.path / stage / RECORD)[:8]}"
        dev = metrics["dev"]["score"] if isinstance(metrics.get("dev"), dict) else None
        sparsity = metrics.get("sparsity")
        stages.append(_row(stage, label, made_from, record["seconds"], metrics.get("steps"), dev, sparsity))
        if "zeros" in metrics:
            sparsest = stage
            layers = [(name, zeros, size, zeros / size) for name, (zeros, size) in metrics["zeros"].items()]
    return {
        "run": str(run.path),
        "smoke": run.recipe.smoke,
        "recipe": run.recipe.name,
        "stages": stages,
        "sparsest": sparsest,
        "layers": layers,
    }


def result_of(run: Run) -> dict[str, Any]:
    """The final table of a run: what its bench stage measured."""
    metrics: dict[str, Any] = run.record("bench")["metrics"]
    return metrics


def _row(stage: str, state: str, *rest: Any) -> dict[str, Any]:
    names = ("made_from", "seconds", "steps", "dev_score", "sparsity")
    return {"stage": stage, "state": state} | dict.fromkeys(names) | dict(zip(names, rest, strict=False))
