"""Targets that an export in progress has finished: the command that was stopped takes them over when it is given again.

    .export.partial/
      teacher/  student/  onnx-int8/   what the targets have written
      state/onnx.json  ...             one for each target that passed its gates or was refused, written last

A target is taken over only if this command would make the same again: of the same recipe,
checkpoints and rows, with the same versions, code and processor. Each of its files has to be the one
that passed. Otherwise it is made again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from pydantic import ValidationError

from spdtool import console, plugins
from spdtool.errors import Corrupt, SpdError, Stopped
from spdtool.export.bundle.manifest import read_json_object, seal
from spdtool.export.target import ChosenTarget, Target
from spdtool.run.fingerprint import describe_machine, describe_processor, hash_json, list_files, sha256
from spdtool.run.folder import Run, Stage
from spdtool.run.records import FileRecord, FinishedTarget, TargetExport
from spdtool.run.storage import create_folder, remove_path, settle_folder, sync_folder, write_json

# Fields of the recipe that decide which targets are exported, and nothing in the files of one.
SELECTION_FIELDS = ("targets", "optional", "skip")
INTERRUPTED = 130  # exit code, as a shell reports SIGINT


class FinishedTargets:
    """The targets of an export stage that are finished, of this session and of earlier ones.

    Args:
        run: it has read the inputs and the rows of the stage.
        chosen: all targets of the stage.
        providers: the ones that work here.
    """

    def __init__(self, run: Run, chosen: Sequence[ChosenTarget], providers: Sequence[str]) -> None:
        self.chosen = chosen
        self._stage: Stage | None = None
        self._outcomes: dict[str, TargetExport | str] = {}
        self._fingerprints = {}
        shared = [run.fingerprint("export", SELECTION_FIELDS), *_describe_installation(), *providers]
        for choice in chosen:
            code = _hash_code(choice.target)
            self._fingerprints[choice.name] = hash_json([choice.name, choice.prefix, *code, *shared])

    def restore(self, stage: Stage) -> list[str]:
        """Look for the targets that an earlier session has finished, and forget those that have to be made again.

        Returns:
            The names in the stage's folder that these targets have written.
        """
        self._stage = stage
        names = []
        for choice in self.chosen:
            outcome = self._restore_outcome(choice)
            if outcome is not None:
                self._outcomes[choice.name] = outcome
                names += [folder.name for folder in target_folders(stage.folder, choice)]
        if stage.state.is_dir():
            for file in stage.state.iterdir():
                if file.stem not in self._outcomes:
                    remove_path(file)
            sync_folder(stage.state)
        return names

    def find(self, name: str) -> TargetExport | str | None:
        """Return what a finished target exported or why it was refused; None: it is not finished."""
        return self._outcomes.get(name)

    def save(self, choice: ChosenTarget, outcome: TargetExport | str) -> None:
        """Commit a target: all of it reaches the disk before its record does."""
        stage = self._open_stage
        for folder in target_folders(stage.folder, choice):
            if folder.is_dir():
                settle_folder(folder)
        sync_folder(stage.folder)
        create_folder(stage.state)
        record = FinishedTarget(
            fingerprint=self._fingerprints[choice.name],
            outcome=outcome,
            files=self._list_files(choice),
        )
        # Sealed: a figure that lost a bit must not be reported.
        write_json(self._record_file(choice), seal(record.model_dump(mode="json")))
        self._outcomes[choice.name] = outcome

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Let Ctrl-C inside the block say what is finished; raises Stopped."""
        try:
            yield
        except KeyboardInterrupt:
            if not self._outcomes:
                raise
            count = f"{len(self._outcomes)} of {len(self.chosen)} targets"
            message = f"export was stopped; {count} are finished and saved: the same command goes on from there"
            raise Stopped(message, INTERRUPTED) from None

    @property
    def _open_stage(self) -> Stage:
        assert self._stage is not None, "the stage calls `restore` when it begins"
        return self._stage

    def _restore_outcome(self, choice: ChosenTarget) -> TargetExport | str | None:
        if not self._record_file(choice).exists():
            return None
        try:
            return self._read_record(choice).outcome
        except SpdError as error:
            line = f"{choice.name}: exported before this command was stopped, and made again: {error.message}"
            console.say(console.escape(line))
            return None

    def _read_record(self, choice: ChosenTarget) -> FinishedTarget:
        """Read the record of a finished target; raises ModelError or Corrupt where the target has to be made again."""
        file = self._record_file(choice)
        fields = read_json_object(file)
        if fields != seal(fields):
            raise Corrupt(f"{file} is damaged")
        try:
            record = FinishedTarget.model_validate(fields)
        except ValidationError:
            raise Corrupt(f"{file} is of another version") from None
        if record.fingerprint != self._fingerprints[choice.name]:
            raise Corrupt("settings, checkpoints, rows, versions, code or processor are others now")
        if record.files != self._list_files(choice):
            raise Corrupt("its files have changed since")
        return record

    def _record_file(self, choice: ChosenTarget) -> Path:
        return self._open_stage.state / f"{choice.name}.json"

    def _list_files(self, choice: ChosenTarget) -> list[FileRecord]:
        files = []
        for folder in target_folders(self._open_stage.folder, choice):
            files += list_files(folder, self._open_stage.folder)
        return files


def target_folders(stage_folder: Path, choice: ChosenTarget) -> list[Path]:
    """List the folders of a target in that of the stage; the first target has one for each role."""
    if choice.prefix:
        return [stage_folder / choice.prefix]
    return [stage_folder / role for role in choice.target.roles]


def _describe_installation() -> list[object]:
    """List what the files of every target depend on besides the recipe and its inputs."""
    machine = describe_machine()
    # By the processor int8 weights have 7 or 8 bits, and libraries differ.
    return [metadata.version("spdtool"), machine.python, machine.system, machine.versions, describe_processor()]


def _hash_code(target: Target) -> list[str]:
    """Hash the packages of a target's classes, spdtool among them, and its library.

    Whoever writes a target runs new code under the old version.
    """
    packages = dict.fromkeys(base.__module__.partition(".")[0] for base in type(target).__mro__)
    digests = [_hash_package(package) for package in packages]
    if target.name in plugins.library_targets():
        try:
            library = plugins.find_library(target.name)
            digests += [library.distribution, library.version, sha256(library.module.path())]
        except SpdError as error:  # the export says so
            digests.append(error.message)
    return digests


@lru_cache  # every target needs spdtool's
def _hash_package(name: str) -> str:
    """Hash the Python files of a package that is imported, or the file of a single module."""
    module = sys.modules.get(name)
    file: str | None = getattr(module, "__file__", None)  # a builtin has none, nor has a namespace package
    files = [] if file is None else [Path(file)]
    for folder in getattr(module, "__path__", ()):
        files += sorted(Path(folder).rglob("*.py"))
    return hash_json([sha256(path) for path in files if path.is_file()])
