"""Run one stage, or every stage that is missing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable

from spdtool import console, ranks
from spdtool.errors import GateError
from spdtool.recipe import PHASES, STAGES
from spdtool.recipe.training import Distilled
from spdtool.run.folder import Run
from spdtool.run.records import Result, TrainingResult


def run_missing(run: Run, wanted: Iterable[str] = STAGES) -> GateError | None:
    """Run every stage of `wanted` that is not done, as far as this process works on it.

    Returns:
        The error of a finished export stage in which a demanded target was refused, which nothing
        later needs, or of a finished bench that missed the goal; also where the stage was finished
        by an earlier call.
    """
    refusal = None
    for stage in wanted:
        # A rank other than the main one has no work after training.
        if not ranks.works_on(stage):
            break
        if run.done(stage):
            console.say(f"[dim]{stage}: done, skipped[/]")
            refusal = recorded_refusal(run, stage) or refusal
            continue
        try:
            run_stage(run, stage)
        except GateError as error:
            if not run.done(stage):
                raise
            refusal = error
    return refusal


def recorded_refusal(run: Run, stage: str) -> GateError | None:
    """Return the error with which a finished export or bench ended, or None: it holds for this call too."""
    try:
        if stage == "export":
            from spdtool.export.refusals import raise_if_refused

            raise_if_refused(run.export_result(), run)
        if stage == "bench" and run.recipe.goal.is_set:
            from spdtool.goals.promise import refuse_broken

            refuse_broken(run.bench_result().promise, run.recipe)
    except GateError as error:
        return error
    return None


def run_stage(run: Run, stage: str) -> Result:
    """Run one stage, announce it, and return its result; raises as the stage does."""
    if stage == PHASES[0] and run.recipe.goal.is_set:
        from spdtool.goals.settle import settle_goal

        settle_goal(run)
    title = console.phase_title(stage)
    section = run.recipe.section(stage)
    if isinstance(section, Distilled) and not section.grafting.enabled:
        title += "; grafting: off in this recipe"
    console.begin_stage(stage, title)
    # By name: importing every stage would import torch for a run whose stages are all done.
    function: Callable[[Run], Result] = getattr(importlib.import_module(f"spdtool.stages.{stage}"), stage)
    result = function(run)
    line = f"{stage}: done in {run.record(stage).seconds:,.0f} s"
    if isinstance(result, TrainingResult):
        line += f"; dev {console.format_scores(result.dev)}"
        if result.sparsity is not None:
            line += f"; sparsity {result.sparsity:.4f}"
        if result.shape is not None:
            heads, neurons = (sum(column) for column in zip(*result.shape, strict=True))
            line += f"; {heads} heads and {neurons:,} neurons are left in {len(result.shape)} layers"
    console.say(line)
    return result
