"""The commands that compare runs: `sweep` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from spdtool import console
from spdtool.cli.options import Model, Sets, command, split_words
from spdtool.errors import RecipeError

if TYPE_CHECKING:
    from spdtool.sweep.run_sweep import TrialRunner

Number = TypeVar("Number", int, float)


@command
def sweep(
    tasks: Annotated[str, typer.Option(help="Tasks: cola,sst2.")],
    recipes: Annotated[str, typer.Option(help="Recipe names or TOML files: default,reference.")] = "default",
    sparsities: Annotated[str, typer.Option(help="Shares of zeros: 0.8,0.9.")] = "0.9",
    seeds: Annotated[str, typer.Option(help="Seeds; each has a teacher of its own: 0,1,2.")] = "0,1,2",
    data: Annotated[
        str | None,
        typer.Option(help="Folder with a folder for each task, or task=folder,...", show_default="the hub"),
    ] = None,
    model: Model = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="Sum of the student's epochs that every recipe is scaled to."),
    ] = None,
    sets: Sets = None,
    out: Annotated[Path, typer.Option(help="Folder of the sweep; the same command goes on with it.")] = Path(
        "runs/sweep"
    ),
    bench: Annotated[bool, typer.Option("--bench", help="Also export and time every student.")] = False,
    ray: Annotated[
        str | None,
        typer.Option(help="Run trials at once on Ray: `local`, or the address of a cluster."),
    ] = None,
    cpus: Annotated[float, typer.Option("--cpus-per-trial", min=0, help="Processors of a trial on Ray.")] = 1,
    gpus: Annotated[
        float,
        typer.Option("--gpus-per-trial", min=0, help="GPUs of a trial on Ray; 0.5: two share one."),
    ] = 0,
    behind: Annotated[
        float | None,
        typer.Option(
            "--stop-behind",
            min=0,
            help="On Ray: stop a trial this many points behind the median of its task.",
        ),
    ] = None,
) -> object:
    """Compare recipes x sparsities x seeds x tasks, all with the same teachers; tables and Pareto plots."""
    from spdtool.report.figures import save_pareto_figures
    from spdtool.sweep import summary
    from spdtool.sweep.run_sweep import run_sweep
    from spdtool.sweep.trials import Sweep, plan_trials

    # Fail before hours are spent, not after.
    if bench:
        from spdtool.export import onnx_session

        onnx_session.require_onnxruntime()
    # Also early: options that do not fit are refused before a teacher is trained.
    runner = _choose_runner(ray, cpus, gpus, behind)
    request = Sweep(
        recipes=_require_words("--recipes", recipes),
        sparsities=_parse_numbers("--sparsities", sparsities, float),
        seeds=_parse_numbers("--seeds", seeds, int),
        tasks=_require_words("--tasks", tasks),
        out=out,
        data=data,
        model=model,
        sets=sets or (),
        epochs=epochs,
        bench=bench,
    )
    rows = run_sweep(plan_trials(request), out, lambda line: console.say(console.escape(line)), runner)
    save_pareto_figures(rows, out)
    summaries = summary.summarise(rows)
    if summaries:
        is_smoke = any(row.smoke for row in rows)
        console.print_table(f"SMOKE SWEEP, NO RESULT: {out}" if is_smoke else str(out), *summary.table(summaries))
        console.print_table("average over tasks", *summary.averages_table(summaries))
    for failure in summary.failures(rows):
        console.warn(failure)
    # Failed trials are rows too: the others count.
    records = [row.model_dump(mode="json") for row in rows]
    if any(row.status == "failed" for row in rows):
        console.print_result(records)
        raise typer.Exit(3)
    return records


def _choose_runner(ray: str | None, cpus: float, gpus: float, behind: float | None) -> TrialRunner:
    """Choose what runs the trials of a sweep: this process, one after the other, or Ray."""
    from spdtool.sweep.run_sweep import run_in_turn

    if ray is None:
        if behind is not None:
            raise RecipeError("--stop-behind compares trials that run at once", "add --ray local")
        return run_in_turn
    from spdtool.sweep.on_ray import Cluster

    return Cluster(None if ray == "local" else ray, cpus, gpus, behind)


def _require_words(option: str, text: str) -> tuple[str, ...]:
    words = split_words(text)
    if not words:
        raise RecipeError(f"{option} is empty", f"{option} a,b")
    return words


def _parse_numbers(option: str, text: str, kind: type[Number]) -> list[Number]:
    try:
        return [kind(word) for word in _require_words(option, text)]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise RecipeError(f"{option} {text!r} is no list of {what}", "separate them by commas") from None


@command
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or the folder of a sweep.")],
    to: Annotated[Path | None, typer.Option(help="Page to write.", show_default="RUN/report/report.html")] = None,
) -> object:
    """Write one HTML page of a run, of several, or of a sweep, with its figures as PNG files beside it."""
    from spdtool.report.page import write_page

    written = write_page(runs, to)
    console.say(f"{console.escape(written.file)} and {len(written.images)} figures")
    return {"page": str(written.file), "images": [str(image) for image in written.images]}
