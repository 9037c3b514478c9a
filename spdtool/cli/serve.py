"""The commands of the serving side: predict, serve, serve-check. None of them needs torch."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from spdtool import console
from spdtool.cli.options import command
from spdtool.errors import DataError, RecipeError, UnknownName

BundleFolder = Annotated[Path, typer.Argument(help="Servable folder, such as RUN/export/bundle, or any exported one.")]
Variant = Annotated[
    str | None, typer.Option(help="Variant of the model, such as onnx or onnx-int8.", show_default="best here")
]
Provider = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int, typer.Option(help="Threads of one operator; 0: as many as there are cores.")]


@command
def predict(
    bundle: BundleFolder,
    text: Annotated[str | None, typer.Argument(help="Text to classify; or give --input.")] = None,
    pair: Annotated[str | None, typer.Option(help="Its second text, for a task of pairs.")] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--input",
            help="A csv, tsv, jsonl or parquet file with named columns, or lines of a text, a pair (tab) or a JSON "
            "object; - is stdin.",
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option("--text", help="Text columns of --input, one or two: a,b.", show_default="those of the training"),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format", help="Of lines without a header: text, tsv or jsonl.", show_default="as the file ends or looks"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows that are computed at once.")] = 32,
    variant: Variant = None,
    provider: Provider = "cpu",
    threads: Threads = 0,
) -> Any:
    """Label texts with an exported model: label and probability, a line for each; JSON lines with --json."""
    from spdtool.serving import inputs
    from spdtool.serving import predict as lines
    from spdtool.serving.classifier import load

    if (text is None) == (source is None):
        problem = "neither a text nor --input was given" if text is None else "a text and --input exclude each other"
        raise RecipeError(problem, "give one of them; `--input -` reads standard input")
    if pair is not None and text is None:
        raise RecipeError("--pair belongs to a text", "lines have their pair after a tab, or as JSON")
    if form is not None and form not in lines.FORMS:
        raise UnknownName("format", form, lines.FORMS)
    if columns is not None and source is None:
        raise RecipeError("--text names columns of --input", "leave it out")
    named = tuple(name.strip() for name in (columns or "").split(",") if name.strip())
    classify = load(bundle, variant=variant, provider=provider, threads=threads)
    wrong = []
    given: AbstractContextManager[Iterable[lines.Line]] = nullcontext([lines.Line(1, text or "", pair)])
    if source is not None:
        given = inputs.opened(source, classify, form, named)
    with given as read:
        for found in lines.predict(classify, read, batch_size):
            if "error" in found:
                wrong.append(found["line"])
                console.warn(f"line {found['line']} {found['error']}")
            console.row(found, _shown(found))
    if wrong:
        console.warn(f"{len(wrong)} lines were not labelled: {', '.join(map(str, wrong[:20]))}")
        raise typer.Exit(DataError.exit_code)
    return None


def _shown(found: dict[str, Any]) -> str:
    """Label and probability, separated by a tab; a line that was not labelled keeps its place."""
    if "error" in found:
        return "-\t-"
    label, likely = found["label"], found["probability"]
    if isinstance(label, list):
        return f"{','.join(label)}\t{','.join(f'{likely[name]:.4f}' for name in label)}"
    return f"{label:.6g}" if likely is None else f"{label}\t{likely:.4f}"


@command
def serve(
    bundle: BundleFolder,
    port: Annotated[int, typer.Option(help="Port to listen to; 0: any free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen to; the default is this machine alone.")] = "127.0.0.1",
    name: Annotated[str | None, typer.Option(help="Name of the model in paths.", show_default="its run's")] = None,
    batch: Annotated[int, typer.Option("--max-batch", help="Most rows of a batch.", min=1)] = 16,
    wait: Annotated[float, typer.Option("--max-wait-ms", help="Longest wait of a row for others.", min=0)] = 2.0,
    queue: Annotated[int, typer.Option("--max-queue", help="Most rows that wait; more get a 503.", min=1)] = 4096,
    texts: Annotated[int, typer.Option("--max-texts", help="Most texts of one request.", min=1)] = 512,
    body: Annotated[int, typer.Option("--max-body", help="Most bytes of one request.", min=1)] = 2**20,
    workers: Annotated[
        int, typer.Option(help="Batches that are computed at once.", min=0, show_default="one a thread, at most 4")
    ] = 0,
    variant: Variant = None,
    provider: Provider = "cpu",
    threads: Annotated[
        int, typer.Option(help="Threads of all workers together; 0: as many as there are cores.", min=0)
    ] = 0,
) -> Any:
    """Serve a bundle over HTTP: KServe v2, a plain /predict, and /metrics; ends cleanly on SIGTERM."""
    from spdtool.serving.server import serve as run

    limits = {"batch": batch, "wait": wait / 1000, "queue": queue, "texts": texts, "body": body}
    return run(bundle, host, port, name, limits, workers=workers, threads=threads, provider=provider, variant=variant)


@command
def serve_check(bundle: Annotated[Path, typer.Argument(help="Servable folder, such as RUN/export/bundle.")]) -> Any:
    """Check every file of a bundle by its sha256, and replay its golden examples; exit code 3 names what is wrong."""
    from spdtool.serving.verify import check

    report = check(bundle)
    rows = [
        (name, found["file"], found["state"], found.get("difference"), found.get("tolerance"), found.get("why", ""))
        for name, found in report["variants"].items()
    ]
    console.table(str(bundle), ("variant", "file", "state", "difference", "allowed", "why"), rows)
    console.say(f"{report['files']} files are as they were exported")
    return report
