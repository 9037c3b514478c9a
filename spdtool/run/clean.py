"""Free the disk of what a run no longer needs, and nothing that spdtool does not know.

Of a stage only the files go that its stage.json lists; of a stage in progress its hidden folder.
Whatever else lies in a run folder is named, and stays.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from spdtool.errors import RunError, UnknownName
from spdtool.recipe import PHASES, STAGES
from spdtool.run.folder import RECORD, Run
from spdtool.run.lock import lock_folder

BUNDLE = "bundle"
STUDENT = "student"
REPORT, LOGS = "report", "logs"  # folders beside the stages
KEEPABLE = (*STAGES, STUDENT, BUNDLE, REPORT, LOGS)


@dataclass
class Cleaning:
    """What is to be removed of a run.

    Attributes:
        stages: those that are no longer done afterwards. folders: hidden ones of stages in progress.
        files: all that goes, with `folders`. bytes: of it.
        unknown: files that spdtool has not written, which stay.
    """

    run: Path
    stages: list[str] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    bytes_by_name: dict[str, int] = field(default_factory=dict)
    unknown: list[Path] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Bytes of all that goes."""
        return sum(self.bytes_by_name.values())


def plan_cleaning(run: Run, keep: Iterable[str]) -> Cleaning:
    """List what goes if only `keep` stays: stages, `student` (the final one), `bundle`, `report`, `logs`.

    Raises:
        UnknownName: `keep` names something else.
        RunError: nothing is to be kept; or a bundle, which the run does not have.
        Corrupt: a record cannot be read, so that nobody knows which files are the stage's.
    """
    kept = set(keep)
    for name in sorted(kept - set(KEEPABLE)):
        raise UnknownName("part of a run", name, KEEPABLE)
    if not kept:
        raise RunError("nothing is to be kept", f"remove the folder itself, or name some of {', '.join(KEEPABLE)}")
    if STUDENT in kept:
        kept.add(PHASES[-1])
    if BUNDLE in kept and not (run.path / "export" / BUNDLE).is_dir():
        raise RunError(f"{run.path} has no bundle to keep", f"spdtool resume {run.path}")
    cleaning = Cleaning(run.path)
    for stage in STAGES:
        if run.done(stage) and stage not in kept:
            _add_stage(cleaning, run, stage, keep_bundle=BUNDLE in kept)
        elif not run.done(stage) and (run.path / stage).exists():
            cleaning.unknown += [path for path in _walk(run.path / stage) if BUNDLE not in path.parts]
        partial = run.partial_folder(stage)
        if partial.is_dir() and not partial.is_symlink() and stage not in kept:
            cleaning.folders.append(partial)
            cleaning.bytes_by_name[partial.name] = sum(_size(path) for path in _walk(partial))
    return cleaning


def clean_run(run: Run, cleaning: Cleaning) -> None:
    """Remove what `plan_cleaning` has listed.

    Raises:
        RunLocked: another process works in this run folder.
    """
    with lock_folder(run.path):
        for stage in reversed(cleaning.stages):  # a kill in between leaves no stage without its input
            (run.path / stage / RECORD).unlink()  # first: what is half removed must not look whole
        for file in cleaning.files:
            file.unlink(missing_ok=True)
        for folder in cleaning.folders:
            shutil.rmtree(folder)
        for stage in cleaning.stages:
            _remove_empty_folders(run.path / stage)


def _add_stage(cleaning: Cleaning, run: Run, stage: str, *, keep_bundle: bool) -> None:
    """Add the files of a finished stage; a bundle may stay in it."""
    folder = run.path / stage
    listed = {folder / file.path for file in run.record(stage).files}
    size = _size(folder / RECORD)
    for path in _walk(folder):
        if keep_bundle and stage == "export" and path.relative_to(folder).parts[0] == BUNDLE:
            continue
        if path in listed and not path.is_symlink():
            cleaning.files.append(path)
            size += _size(path)
        elif path != folder / RECORD:
            cleaning.unknown.append(path)
    cleaning.stages.append(stage)
    cleaning.bytes_by_name[stage] = size


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files and links below a folder, without following links."""
    if folder.is_symlink():
        yield folder
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        else:
            yield path


def _size(path: Path) -> int:
    return path.lstat().st_size


def _remove_empty_folders(folder: Path) -> None:
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in folder.iterdir():
        _remove_empty_folders(path)
    if not any(folder.iterdir()):
        folder.rmdir()
