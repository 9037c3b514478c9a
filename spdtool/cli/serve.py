"""The commands predict, serve and serve-check. None of them needs torch."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spdtool import console
from spdtool.cli.options import command, split_words
from spdtool.errors import DataError, RecipeError, UnknownName

if TYPE_CHECKING:
    from spdtool.serving.predict import InputLine

GLUE_FORMAT = "glue"
LISTED_LINES = 20  # numbers of unlabelled lines in the closing warning

BundleFolder = Annotated[Path, typer.Argument(help="A run, its bundle, or any exported folder.")]
Threads = Annotated[int, typer.Option(help="Threads of one operator; 0: as many as there are cores.")]


@dataclass(frozen=True)
class OpenOptions:
    """How a model is opened."""

    variant: Annotated[
        str | None, typer.Option(help="Variant of the model, such as onnx or onnx-int8.", show_default="best here")
    ] = None
    provider: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu"
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Open a folder without manifest.json too, such as one of others.")
    ] = False
    raw: Annotated[
        bool, typer.Option("--raw", help="Probabilities without the temperature that the export fitted.")
    ] = False


@dataclass(frozen=True)
class InputOptions:
    """Where texts are read from, and how."""

    source: Annotated[
        str | None,
        typer.Option(
            "--input",
            help="A csv, tsv, jsonl or parquet file with named columns, or lines of a text, a pair (tab) or a JSON "
            "object; - is stdin.",
        ),
    ] = None
    columns: Annotated[
        str | None,
        typer.Option("--text", help="Text columns of --input, one or two: a,b.", show_default="those of the training"),
    ] = None
    line_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="Format of lines without a header: text, tsv, jsonl; or glue: submit answers to a test.tsv.",
            show_default="as the file ends or looks",
        ),
    ] = None
    batch_size: Annotated[int, typer.Option(help="Rows that are computed at once.")] = 32


@dataclass(frozen=True)
class ListenOptions:
    """Where a server listens, to whom, and what it says of it."""

    port: Annotated[int, typer.Option(help="Port to listen to; 0: any free one.")] = 8000
    host: Annotated[str, typer.Option(help="Address to listen to; the default is this machine alone.")] = "127.0.0.1"
    name: Annotated[str | None, typer.Option(help="Name of the model in paths.", show_default="its run's")] = None
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name in the header Host to answer; may be given again, and * is any.",
            show_default="this machine's own names, or any if other machines can reach --host",
        ),
    ] = None
    access_log: Annotated[bool, typer.Option("--access-log", help="Print a line for every request.")] = False


@dataclass(frozen=True)
class LimitOptions:
    """What clients of a server may cost."""

    batch: Annotated[int, typer.Option("--max-batch", help="Most rows of a batch.", min=1)] = 16
    wait: Annotated[float, typer.Option("--max-wait-ms", help="Longest wait of a row for others.", min=0)] = 2.0
    queue: Annotated[int, typer.Option("--max-queue", help="Most rows that wait; more get a 503.", min=1)] = 4096
    texts: Annotated[int, typer.Option("--max-texts", help="Most texts of one request.", min=1)] = 512
    body: Annotated[int, typer.Option("--max-body", help="Most bytes of one request.", min=1)] = 2**20
    connections: Annotated[
        int,
        typer.Option("--max-connections", help="Most connections at once; then the longest idle one gives way.", min=1),
    ] = 512


@command
def predict(
    bundle: BundleFolder,
    reading: InputOptions,
    opening: OpenOptions,
    text: Annotated[str | None, typer.Argument(help="Text to classify; or give --input.")] = None,
    pair: Annotated[str | None, typer.Option(help="Its second text, for a task of pairs.")] = None,
    question: Annotated[str | None, typer.Option(help="Question to answer from --context; the same as a text.")] = None,
    context: Annotated[str | None, typer.Option(help="Text with the answer; the same as --pair.")] = None,
    threads: Threads = 0,
) -> Any:
    """Label texts with an exported model: label and probability, a line for each; JSON lines with --json."""
    from spdtool.export.load import load
    from spdtool.serving.inputs import open_input
    from spdtool.serving.predict import InputLine, predict_lines

    if question is not None or context is not None:
        _check_question(question, context, text, pair)
        text, pair = question, context
    # Every refusal before the model is opened, which takes longer than all of them.
    _check_input(text, pair, reading)
    source = reading.source
    classify = load(bundle, threads=threads, **asdict(opening))
    if reading.line_format == GLUE_FORMAT:
        from spdtool.serving.glue import submission_lines

        for line in submission_lines(classify, Path(source or ""), reading.batch_size):
            console.print_row({"line": line}, line)
        return None
    # One text is an input of one line, so that both are printed alike.
    opened: AbstractContextManager[Iterable[InputLine]] = nullcontext([InputLine(1, text or "", pair)])
    if source is not None:
        opened = open_input(source, classify, reading.line_format, split_words(reading.columns))
    unlabelled = []
    with opened as lines:
        for prediction in predict_lines(classify, lines, reading.batch_size):
            if "error" in prediction:
                unlabelled.append(prediction["line"])
                console.warn(f"line {prediction['line']} {prediction['error']}")
            text_line = classify.decision.unanswered if "error" in prediction else classify.decision.line(prediction)
            console.print_row(prediction, text_line)
    if unlabelled:
        numbers = ", ".join(map(str, unlabelled[:LISTED_LINES]))
        count = "1 line has" if len(unlabelled) == 1 else f"{len(unlabelled):,} lines have"
        console.warn(f"{count} no answer: {numbers}")
        raise typer.Exit(DataError.exit_code)
    return None


def _check_question(question: str | None, context: str | None, text: str | None, pair: str | None) -> None:
    """Raise RecipeError unless a question has its context, and nothing else was given."""
    if question is None or context is None:
        raise RecipeError("--question and --context belong together", "give both, or a text and --pair")
    if text is not None or pair is not None:
        raise RecipeError("--question and --context take the place of a text and --pair", "leave one of them out")


def _check_input(text: str | None, pair: str | None, reading: InputOptions) -> None:
    """Raise RecipeError unless there is a text or an --input, and the options belong to it."""
    from spdtool.serving.predict import FORMATS

    source, line_format = reading.source, reading.line_format
    if text is None and source is None:
        raise RecipeError("neither a text nor --input was given", "give one of them; `--input -` reads standard input")
    if text is not None and source is not None:
        raise RecipeError("a text and --input exclude each other", "give one of them; `--input -` reads standard input")
    if pair is not None and text is None:
        raise RecipeError("--pair belongs to a text", "lines have their pair after a tab, or as JSON")
    if line_format is not None and line_format not in (*FORMATS, GLUE_FORMAT):
        raise UnknownName("format", line_format, (*FORMATS, GLUE_FORMAT))
    if line_format == GLUE_FORMAT and source is None:
        raise RecipeError("--format glue answers a test.tsv", "give it: --input GLUE/RTE/test.tsv")
    if reading.columns is not None and source is None:
        raise RecipeError("--text names columns of --input", "leave it out")


@command
def serve(
    bundle: BundleFolder,
    listening: ListenOptions,
    limits: LimitOptions,
    opening: OpenOptions,
    workers: Annotated[
        int, typer.Option(help="Batches that are computed at once.", min=0, show_default="one a thread, at most 4")
    ] = 0,
    threads: Annotated[
        int, typer.Option(help="Threads of all workers together; 0: as many as there are cores.", min=0)
    ] = 0,
) -> Any:
    """Serve a bundle over HTTP: KServe v2, a plain /predict, and /metrics; ends cleanly on SIGTERM."""
    from spdtool.serving import server

    options = server.ServerOptions(
        listening.host,
        listening.port,
        listening.name,
        # The option is in milliseconds, the server counts in seconds.
        limits={"batch": limits.batch, "wait": limits.wait / 1000, "queue": limits.queue, "texts": limits.texts},
        connection_limits={"body": limits.body, "connections": limits.connections},
        workers=workers,
        threads=threads,
        allowed_hosts=tuple(listening.allow_host or ()),
        access_log=listening.access_log,
        **asdict(opening),
    )
    return asdict(server.serve_bundle(bundle, options))


@command
def serve_check(bundle: Annotated[Path, typer.Argument(help="Servable folder, such as RUN/export/bundle.")]) -> Any:
    """Check every file of a bundle by its sha256, and replay its golden examples; exit code 3 names what is wrong."""
    from spdtool.serving.verify import verify_bundle

    report = verify_bundle(bundle)
    rows = []
    for name, variant in report["variants"].items():
        figures = (variant.get("difference"), variant.get("tolerance"), variant.get("why", ""))
        rows.append((name, variant["file"], variant["state"], *figures))
    console.print_table(str(bundle), ("variant", "file", "state", "difference", "allowed", "why"), rows)
    console.say(f"{report['files']} files are as they were exported")
    return report
