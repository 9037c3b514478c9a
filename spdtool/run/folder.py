"""A run is a folder.

    runs/mrpc-0.9/
      run.json            the recipe, written before anything else
      teacher/ prune/ ... one folder per finished stage; its stage.json was written last
      .prune.partial/     a stage in progress, with the state from which it resumes

`stage.json` holds what the stage read (stages and rows, by hash), its section of the recipe, its
result, and every file it wrote with size and sha256: see `records.StageRecord`. It is written last,
inside the partial folder, which is then renamed: a folder called `prune` is whole.
"""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from spdtool import ranks
from spdtool.errors import Corrupt, RunError, RunMismatch, SpdError, StageMissing
from spdtool.recipe import STAGES, reading
from spdtool.recipe.fields import ACCEPTED_LATER, MAY_CHANGE, Recipe, first_stage_using
from spdtool.run.fingerprint import describe_machine, hash_json, list_files, sha256
from spdtool.run.lock import LOCK, lock_folder
from spdtool.run.refusals import (
    cannot_create_run,
    describe_data_change,
    explaining_machine_errors,
    recipe_hint,
    redo_hint,
    refuse_unusable_path,
)
from spdtool.run.storage import create_folder, publish_folder, remove_path, settle_folder, sync_folder, write_json

if TYPE_CHECKING:  # `spdtool --help` imports this module, and must not wait for pydantic
    from spdtool.run.records import (
        BenchResult,
        DataRecord,
        ExportResult,
        Result,
        StageRecord,
        TrainingResult,
    )

RECORD = "stage.json"
STATE = "state"  # in a folder of its own, so that a commit can leave all of it out
STUDENTS = "students"  # folder of the students at intermediate sparsities
LOG = "metrics.jsonl"
SMOKE_MARK = "SMOKE-RUN-NOT-A-RESULT.txt"
BEFORE_RUN_JSON = {LOCK, SMOKE_MARK, ".run.json.tmp"}  # files that a kill before run.json may leave behind


@dataclass
class Stage:
    """A stage in progress: the folder it writes to, and the result that its stage.json will hold.

    `fingerprint` is a hash of all that decides the result, see `Run.fingerprint`.
    `training_threads`, `arithmetic`, `precision` and `device` say how this process computes, see
    `MachineRecord`.
    """

    name: str
    folder: Path
    fingerprint: str
    result: Result | None = None
    training_threads: int | None = None
    arithmetic: str | None = None
    precision: str | None = None
    device: str | None = None

    @property
    def state(self) -> Path:
        """Folder of the resumable state; it is removed when the stage is done."""
        return self.folder / STATE


class Run:
    """Keeps one run folder: its recipe, which stages are done, and what the stage in progress has read."""

    def __init__(self, path: Path | str, recipe: Recipe) -> None:
        self.path = Path(path)
        self.recipe = recipe
        self.threads = _read_threads(self.path / "run.json")  # of training; None until it has begun
        self._inputs: dict[str, str] = {}
        self._data: DataRecord | None = None

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """Open the run at `path`.

        Raises:
            RunError: there is none, or its run.json cannot be read.
        """
        file = Path(path) / "run.json"
        if not file.is_file():
            raise RunError(f"{path} is not a run folder: it has no run.json", "start one with `spdtool compress`")
        try:
            return cls(path, reading.load_recipe(file))
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise RunError(f"{file} cannot be read: {error}") from None
        except SpdError as error:
            raise RunError(
                f"{file} was written by another version, or edited: {error.message}",
                f"use the version that wrote it, or start a new run; {path}/export/bundle can be served all the same",
            ) from None

    @classmethod
    def for_recipe(cls, path: Path | str, recipe: Recipe, *, redo: str | None = None, dry: bool = False) -> Run:
        """Return the run at `path` for `recipe`; nothing is written until its first stage starts.

        A recipe that differs only in what no finished stage has used takes the place of the old one.

        Args:
            redo: this stage and every later one count as unfinished: they are about to be discarded.
            dry: only look; the old recipe stays in run.json.

        Raises:
            RunMismatch: a finished stage was made by another recipe.
            RunLocked: the recipe would change under a process that works in this run folder.
            RunError: `path` holds something that is not a run.
        """
        path = Path(path)
        if not (path / "run.json").exists():
            refuse_unusable_path(path, BEFORE_RUN_JSON)
            return cls(path, recipe)
        old = cls.open(path)
        changed = [difference for difference in recipe.diff(old.recipe) if difference[0] not in MAY_CHANGE]
        remaining = STAGES[: STAGES.index(redo)] if redo else STAGES
        finished = [stage for stage in remaining if old.done(stage)]
        conflicts = []
        for difference in changed:
            field = difference[0]
            if field not in ACCEPTED_LATER and first_stage_using(field) in finished:
                conflicts.append(difference)
        if conflicts:
            lines = "; ".join(f"{name} is {before!r} there and {now!r} here" for name, now, before in conflicts[:5])
            raise RunMismatch(f"{path} belongs to another recipe: {lines}", recipe_hint(path, conflicts))
        run = cls(path, recipe)
        if changed and not dry and ranks.is_main():  # one writer: the other ranks read run.json
            with lock_folder(path):
                run._save_recipe()
        return run

    def done(self, stage: str) -> bool:
        """Return whether `stage` is finished."""
        return (self.path / stage / RECORD).is_file()  # the folder alone may be a stranger's

    def begun(self, stage: str) -> bool:
        """Return whether `stage` was started and is not finished."""
        return self.partial_folder(stage).is_dir()

    def partial_folder(self, stage: str) -> Path:
        """Return the folder that a stage in progress writes to."""
        return self.path / f".{stage}.partial"

    def record(self, stage: str) -> StageRecord:
        """Read the stage.json of `stage`.

        Raises:
            StageMissing: it is not finished.
            Corrupt: its stage.json cannot be read.
        """
        if not self.done(stage):
            raise StageMissing(
                f"{self.path} has no finished stage {stage!r}",
                f"run `spdtool {stage} --run {self.path}`, or `spdtool resume {self.path}` for all that is missing",
            )
        return read_stage_record(self.path / stage)

    def result(self, stage: str) -> Result:
        """Return the result of a finished stage, whatever its type. Raises as `record` does."""
        result = self.record(stage).result
        if result is None:
            file = self.path / stage / RECORD
            raise Corrupt(f"{file} holds no result", redo_hint(stage, self.path))
        return result

    def training_result(self, stage: str) -> TrainingResult:
        """Return the result of teacher, prune, distill or finetune. Raises as `record` does."""
        from spdtool.run.records import TrainingResult

        result = self.result(stage)
        assert isinstance(result, TrainingResult), stage
        return result

    def export_result(self) -> ExportResult:
        """Return the result of the export stage. Raises as `record` does."""
        from spdtool.run.records import ExportResult

        result = self.result("export")
        assert isinstance(result, ExportResult)
        return result

    def bench_result(self) -> BenchResult:
        """Return the result of the bench stage. Raises as `record` does."""
        from spdtool.run.records import BenchResult

        result = self.result("bench")
        assert isinstance(result, BenchResult)
        return result

    def use_input(self, stage: str) -> Path:
        """Check the files of a finished stage by sha256, record it as an input of the next one, and return its folder.

        Raises:
            StageMissing: it is not finished.
            Corrupt: a file was altered or cut short, or the stage was made from an input that has
                since been replaced.
        """
        record, folder = self.record(stage), self.path / stage
        hint = redo_hint(stage, self.path)
        for file in record.files:
            path = folder / file.path
            if not path.is_file():
                raise Corrupt(f"{path} is missing", hint)
            size = path.stat().st_size
            if size != file.size:  # cheaper than a hash, and says more
                raise Corrupt(f"{path} holds {size} bytes; the stage wrote {file.size}", hint)
            if sha256(path) != file.sha256:
                raise Corrupt(f"{path} was altered since the stage wrote it", hint)
        for source, digest in record.inputs.items():
            # a source that is gone is no contradiction: intermediate checkpoints may be deleted to save disk
            if self.done(source) and sha256(self.path / source / RECORD) != digest:
                raise Corrupt(f"{stage} was made from a {source} stage that has since been replaced", hint)
        self._inputs[stage] = sha256(folder / RECORD)
        return folder

    def record_data(self, data: DataRecord) -> None:
        """Record the rows of the stage in progress, which must be those of the stages that it has read.

        Raises:
            RunMismatch: they are others.
        """
        self.require_same_data(data, self._inputs)
        self._data = data

    def require_same_data(self, data: DataRecord, stages: Iterable[str]) -> None:
        """Raise RunMismatch unless the finished `stages` read the same rows; older records do not say."""
        for stage in stages:
            recorded = self.record(stage).data
            if recorded is not None and not recorded.agrees(data):  # a stage of an older version has none
                change = describe_data_change(recorded, data)
                raise RunMismatch(
                    f"the rows are not those of the stage {stage!r} in {self.path}: {change}",
                    "put the data back, give another --run, or begin anew: "
                    f"`spdtool teacher --run {shlex.quote(str(self.path))} --again`",
                )

    @contextmanager
    def stage(self, name: str, restore: Callable[[Stage], Collection[str]] | None = None) -> Iterator[Stage]:
        """Open a stage for writing; on success commit it atomically, on failure keep only a state to resume from.

        Of several processes that train together only the main one writes; the others may read the folder.

        Args:
            restore: is called with the folder as an earlier session has left it, and returns the names in it that
                stay beside the state. What else lies there is removed.

        Raises:
            RunLocked: another process works in this run folder.
            RunError: the stage is already done; or the disk is full, or may not be written to.
        """
        if not ranks.is_main():  # it may read what the main process writes, and holds no lock
            yield Stage(name, self.partial_folder(name), self.fingerprint(name))
            self._reset_inputs()
            return
        try:
            create_folder(self.path)
        except OSError as error:
            raise cannot_create_run(self.path, error.strerror or str(error)) from None
        with explaining_machine_errors(), lock_folder(self.path):
            if self.done(name):
                raise RunError(f"{name} is already done in {self.path}", redo_hint(name, self.path))
            file = self.path / "run.json"
            # The number of threads is known only now, and a resumed run takes the same.
            if not file.exists() or _read_threads(file) != self.threads:
                self._save_recipe()
            stage = Stage(name, self.partial_folder(name), self.fingerprint(name))
            self._prepare_folder(stage, restore)
            started = time.monotonic()  # of this session: what a resumed stage took before is in its log
            try:
                yield stage
                self._commit(stage, started)
            except BaseException:
                # without a snapshot there is nothing to resume from, and half-written files only mislead
                if not (stage.state.exists() and any(stage.state.iterdir())):
                    shutil.rmtree(stage.folder, ignore_errors=True)
                raise
            finally:
                self._reset_inputs()

    def change_recipe(self, recipe: Recipe) -> None:
        """Record another recipe, which differs only in what no finished stage has used.

        Raises:
            RunLocked: another process works in this run folder.
        """
        with lock_folder(self.path):
            self.recipe = recipe
            self._save_recipe()

    def discard(self, stage: str) -> list[str]:
        """Remove `stage` and every later one; return the names of those that were there.

        Raises:
            RunLocked: another process works in this run folder.
        """
        removed: list[str] = []
        if not ranks.is_main():
            return removed
        with lock_folder(self.path):
            for name in reversed(STAGES[STAGES.index(stage) :]):  # a kill in between leaves no stage without its input
                if self.done(name):
                    removed.insert(0, name)
                for folder in (self.path / name, self.partial_folder(name), self._used_state_folder(name)):
                    if folder.exists():
                        remove_path(folder / RECORD)  # first, so that a kill in between leaves nothing that looks whole
                        shutil.rmtree(folder)
                        sync_folder(self.path)  # nor does a power cut bring back a stage without its input
            if stage == STAGES[0] and (self.path / "run.json").exists():
                self.threads = None  # all begins anew
                self._save_recipe()
        return removed

    def fingerprint(self, stage: str, without: Iterable[str] = ()) -> str:
        """Return a hash of all that decides the result of `stage`: its recipe and what it has read so far.

        Args:
            without: fields of the stage's section to leave out.
        """
        section = self.recipe.section(stage).model_dump(mode="json", exclude=set(without))
        data = None if self._data is None else self._data.model_dump(mode="json")
        return hash_json([self.recipe.shared_fields(), section, self._inputs, data])

    def _reset_inputs(self) -> None:
        """Forget the inputs: the next stage has read nothing yet."""
        self._inputs, self._data = {}, None

    def _used_state_folder(self, stage: str) -> Path:
        """Return the place to which the state of a finished stage is moved, to be removed.

        Half removed in its old place, it would look damaged.
        """
        return self.path / f".{stage}.spent"

    def _remove_used_state(self, stage: str) -> None:
        """Remove the state of a finished stage."""
        state, used = self.path / stage / STATE, self._used_state_folder(stage)
        shutil.rmtree(used, ignore_errors=True)
        if self.done(stage) and state.exists():
            state.rename(used)
            shutil.rmtree(used, ignore_errors=True)

    def _prepare_folder(self, stage: Stage, restore: Callable[[Stage], Collection[str]] | None) -> None:
        """Create the folder of a stage in progress, or remove from it all that a resumed stage does not need."""
        create_folder(stage.folder)
        for name in STAGES:
            self._remove_used_state(name)
        needed = {STATE, LOG, STUDENTS}
        if restore is not None:
            needed.update(restore(stage))
        for file in stage.folder.iterdir():
            if file.name not in needed:
                remove_path(file)

    def _commit(self, stage: Stage, started: float) -> None:
        from spdtool.run.records import StageRecord

        section = self.recipe.section(stage.name).model_dump(mode="json")
        # Flushed before stage.json names their hashes: a power cut must not leave it alone.
        settle_folder(stage.folder)
        machine = describe_machine()
        machine.training_threads, machine.arithmetic = stage.training_threads, stage.arithmetic
        machine.precision, machine.device = stage.precision, stage.device
        record = StageRecord(
            stage=stage.name,
            smoke=self.recipe.smoke,
            spdtool=metadata.version("spdtool"),
            finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            seconds=round(time.monotonic() - started, 1),
            inputs=self._inputs,
            data=self._data,
            recipe=self.recipe.shared_fields() | {stage.name: section},
            machine=machine,
            files=list_files(stage.folder, stage.folder, skip=stage.state),
            result=stage.result,
        )
        write_json(stage.folder / RECORD, record)  # last: from here on the folder counts as whole
        final = self.path / stage.name
        if final.exists():  # a folder without stage.json: not ours to trust
            shutil.rmtree(final)
        # one rename commits, with the state still inside: a kill before it can resume, a kill after
        # it is done
        publish_folder(stage.folder, final)
        self._remove_used_state(stage.name)

    def _save_recipe(self) -> None:
        from spdtool.run.records import RunRecord

        if self.recipe.smoke:
            # a file that nobody overlooks when a folder is passed on
            (self.path / SMOKE_MARK).write_text("A few steps on a small random model. Its numbers mean nothing.\n")
        else:
            (self.path / SMOKE_MARK).unlink(missing_ok=True)
        record = RunRecord(
            spdtool=metadata.version("spdtool"),
            smoke=self.recipe.smoke,
            recipe=self.recipe.model_dump(mode="json"),
            threads=self.threads,
        )
        write_json(self.path / "run.json", record)


def _read_threads(file: Path) -> int | None:
    """Read from a run.json how many threads its training began with; None where there is none, or it has not begun."""
    try:
        threads = json.loads(file.read_text("utf-8")).get("threads")
    except (OSError, ValueError, AttributeError):  # `Run.open` says what is wrong with it
        return None
    return threads if isinstance(threads, int) and threads > 0 else None


def read_stage_record(folder: Path) -> StageRecord:
    """Read the stage.json in `folder`.

    Raises:
        Corrupt: it cannot be read.
    """
    from spdtool.run.records import StageRecord

    file = folder / RECORD
    try:
        return StageRecord.model_validate(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError) as error:  # pydantic's errors are ValueErrors, as those of json and of UTF-8 are
        raise Corrupt(f"{file} cannot be read: {error}", redo_hint(folder.name, folder.parent)) from None


def default_path(recipe: Recipe) -> Path:
    """Return `runs/<task>-<sparsity>`, with recipe, seed and the smoke mark where they are not the default.

    A student with a shape has `small` in place of the sparsity, one with a goal has what is asked for.
    """
    task = recipe.task
    if task == "local" and recipe.data:
        task = Path(recipe.data).stem
    size = "small" if recipe.prune.is_structured else f"{recipe.sparsity:g}"
    # What the user asked for, so that the folder is found again.
    name = f"{task}-{recipe.goal.label or size}"
    if recipe.name != "default":
        name += f"-{recipe.name}"
    if recipe.seed:
        name += f"-seed{recipe.seed}"
    if recipe.smoke:
        name = f"smoke-{name}"
    return Path("runs") / name
