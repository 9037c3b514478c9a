"""The commands `export` and `unpack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spdtool import console
from spdtool.cli.options import NO_RUN, Again, Sets, command, split_words
from spdtool.cli.stages import run_phase
from spdtool.errors import RecipeError


@command
def export(
    run: Annotated[Path | None, typer.Option("--run", help="Run folder; or give --from.")] = None,
    again: Again = False,
    layout: Annotated[
        str | None,
        typer.Option(help="Write the bundle of --run to --to for a server or a hub: triton or hub."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--from", help="Any fine-tuned classifier, whoever pruned it.", **NO_RUN),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Export target; `spdtool plugins` lists them.", show_default="onnx", **NO_RUN),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(help="Folder to write.", show_default="./<checkpoint's name>-<target>", **NO_RUN),
    ] = None,
    task: Annotated[str | None, typer.Option(help="Compare on the dev set of this task too.", **NO_RUN)] = None,
    data: Annotated[str | None, typer.Option(help="Read its rows from this file or folder.", **NO_RUN)] = None,
    text: Annotated[str | None, typer.Option(help="Text columns of --data, one or two: a,b.", **NO_RUN)] = None,
    label: Annotated[str | None, typer.Option(help="Label column of --data.", **NO_RUN)] = None,
    sets: Sets = None,
) -> object:
    """Write teacher and student of a run (or any checkpoint) for a runtime, each checked against its checkpoint."""
    from spdtool.export import onnx_session
    from spdtool.stages.api import export_model

    # Options that a run has in its recipe: given with --run they would be ignored.
    of_checkpoint = {
        "--target": target,
        "--to": to,
        "--task": task,
        "--data": data,
        "--text": text,
        "--label": label,
    }
    foreign = [name for name, value in of_checkpoint.items() if value is not None]
    # --to goes with --layout too, which belongs to a run.
    if layout is not None and "--to" in foreign:
        foreign.remove("--to")
    _refuse_mixture(run, checkpoint, again, foreign)
    if layout is not None:
        return _write_layout(run, layout, to, again, sets)
    if run is not None:
        onnx_session.require_onnxruntime()
        return run_phase("export", run, again, sets)
    assert checkpoint is not None
    # Without rows, the logits on random tokens are compared, and nothing reads a column.
    if task is None and data is None and (text or label):
        raise RecipeError("--text and --label name columns of --data, which was not given", "add --data FILE")
    result = export_model(
        checkpoint,
        target,
        to,
        task=task,
        data=data,
        text=split_words(text),
        label=label,
        sets=sets or (),
    )
    figures = result.model.model_dump(mode="json", exclude_none=True)
    return {"folder": str(result.folder), "target": result.target} | figures


def _write_layout(run: Path | None, layout: str, to: Path | None, again: bool, sets: list[str] | None) -> object:
    """Write the bundle of a finished export in the layout of a server or a hub."""
    if run is None or to is None or again:
        example = "spdtool export --layout triton --run RUN --to FOLDER"
        raise RecipeError("--layout writes the bundle of a finished export", example)
    from spdtool.export.bundle.layouts import write_layout
    from spdtool.recipe.reading import override
    from spdtool.run.folder import Run

    # The recipe of the run, changed for this layout alone: the export itself stays done.
    opened = Run.open(run)
    written = write_layout(Run(opened.path, override(opened.recipe, sets or ())), layout, to)
    console.say(f"{console.escape(to)}: {len(written.files)} files in the layout {layout}")
    return written._asdict()


def _refuse_mixture(run: Path | None, checkpoint: Path | None, again: bool, foreign: list[str]) -> None:
    """Raise RecipeError unless exactly one of --run and --from is given, and nothing that belongs to the other."""
    either = "--run FOLDER exports a run; --from CHECKPOINT exports any other model"
    if run is not None and checkpoint is not None:
        raise RecipeError("--run and --from exclude each other", either)
    if run is None and checkpoint is None:
        raise RecipeError("neither --run nor --from was given", either)
    if run is not None and foreign:
        raise RecipeError(
            f"{', '.join(foreign)} belongs to --from",
            "a run has its own: use --set, or leave it out",
        )
    if checkpoint is not None and again:
        raise RecipeError("--again belongs to --run", "give another folder: --to FOLDER")


@command
def unpack(
    folder: Annotated[Path, typer.Argument(help="Exported folder, such as RUN/export/student.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must be empty or new.")],
) -> object:
    """Turn an exported folder back into a plain Hugging Face checkpoint."""
    from spdtool.export.bundle.unpack import unpack_checkpoint

    source = unpack_checkpoint(folder, out)
    console.say(f"{console.escape(source)} is unpacked to {console.escape(out)}")
    return {"folder": str(source), "checkpoint": str(out)}
