"""The command `clean`: free the disk of a run, or of the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spdtool import console
from spdtool.cli.options import DryRun, command, split_words
from spdtool.errors import RecipeError

Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
LISTED_FILES = 5  # that are not spdtool's


@command
def clean(
    run: Annotated[Path | None, typer.Argument(help="Run folder.")] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help="What stays, such as bundle, or student,bundle,report: stages, student, bundle, report, logs."
        ),
    ] = None,
    cache: Annotated[bool, typer.Option("--cache", help="Empty the cache of tokens and of teachers' outputs.")] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> object:
    """Free disk space: all of a run but what --keep names, or the cache. Says what goes, and asks.

    Files that spdtool has not written are never removed.
    """
    if (run is None) == (not cache):
        raise RecipeError(
            "give a run folder or --cache, one of them",
            "spdtool clean RUN --keep bundle, or spdtool clean --cache; both with --dry-run to only look",
        )
    if cache:
        if keep is not None:
            raise RecipeError("--keep belongs to a run", "leave it out: the whole cache goes")
        return _clean_cache(dry_run, yes)
    assert run is not None
    return _clean_run(run, split_words(keep), dry_run, yes)


def _clean_run(path: Path, keep: tuple[str, ...], dry_run: bool, yes: bool) -> object:
    from spdtool.run.clean import KEEPABLE, clean_run, plan_cleaning
    from spdtool.run.folder import Run

    if not keep:
        raise RecipeError(
            "--keep is missing: what of the run is to stay?", f"for example --keep bundle; also {', '.join(KEEPABLE)}"
        )
    # Looked at as a run first: a mistyped folder is refused before anything is listed.
    run = Run.open(path)
    cleaning = plan_cleaning(run, keep)
    sizes = [(name, console.format_bytes(size)) for name, size in cleaning.bytes_by_name.items()]
    result = {
        "run": str(path),
        "removed": list(cleaning.bytes_by_name),
        "bytes": cleaning.bytes,
        "unknown": [str(file) for file in cleaning.unknown],
        "done": False,
    }
    if not sizes:
        console.say(f"{console.escape(path)} holds nothing else: nothing to remove")
        return result
    console.print_table(f"to remove from {path}", ("name", "size"), sizes)
    for file in cleaning.unknown[:LISTED_FILES]:
        console.say(f"stays, not written by spdtool: {console.escape(file)}")
    if len(cleaning.unknown) > LISTED_FILES:
        console.say(f"and {len(cleaning.unknown) - LISTED_FILES} more")
    if cleaning.stages:
        # A stage that is removed is trained again by the next `compress` on this run.
        console.say("[dim]call `spdtool report` first to have its figures; a run that goes on trains these again[/]")
    if dry_run or not _agree(f"remove {console.format_bytes(cleaning.bytes)}?", yes):
        return result
    clean_run(run, cleaning)
    console.say(f"removed {console.format_bytes(cleaning.bytes)}; {console.escape(path)} keeps {', '.join(keep)}")
    return result | {"done": True}


def _clean_cache(dry_run: bool, yes: bool) -> object:
    from spdtool.data.cache import cache_folder, cache_size, remove_entries

    count, size = cache_size()
    result = {"cache": str(cache_folder()), "entries": count, "bytes": size, "done": False}
    console.say(f"{console.escape(cache_folder())}: {count} entries, {console.format_bytes(size)}")
    if not count or dry_run or not _agree("remove all of them? they are computed again when needed", yes):
        return result
    remove_entries()
    console.say(f"removed {console.format_bytes(size)}")
    return result | {"done": True}


def _agree(question: str, yes: bool) -> bool:
    """Ask the user; without a terminal nobody can be asked."""
    if yes:
        return True
    if not console.can_ask():
        raise RecipeError(f"{question} There is no terminal to ask on", "add --yes, or --dry-run to only look")
    return typer.confirm(question, err=True)
