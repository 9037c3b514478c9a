"""A run is a folder.

    runs/mrpc-0.9/
      run.json            the recipe, written before anything else
      teacher/ prune/ ... one folder per finished stage; its stage.json was written last
      .prune.partial/     a stage in progress, with the state from which it resumes

`stage.json` holds what the stage read (stages and rows, by hash), its section of the recipe, its metrics, and every
file it wrote with size and sha256. It is written last, inside the partial folder, which is then renamed: a folder
called `prune` is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from spdtool import ranks as processes
from spdtool.errors import Corrupt, RunError, RunLocked, RunMismatch, SpdError, StageMissing
from spdtool.recipe import STAGES
from spdtool.recipe import reading as recipes
from spdtool.recipe.fields import MAY_CHANGE, Recipe, first_stage_using

RECORD = "stage.json"
STATE = "state"
LEFT = "left"  # students at sparsities on the way to the target
SMOKE_MARK = "SMOKE-RUN-NOT-A-RESULT.txt"
LOCK = ".lock"
BEFORE_THE_RECIPE = {LOCK, SMOKE_MARK, ".run.json.tmp"}  # all that a call killed before run.json can have left


@dataclass
class Work:
    """A stage in progress: the folder it writes to and the metrics that its stage.json will hold."""

    stage: str
    folder: Path
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        """Where the resumable state lives; it is removed when the stage is done."""
        return self.folder / STATE


class Run:
    """Keeps one run folder: its recipe, which stages are done, and what the stage in progress has read."""

    def __init__(self, path: Path | str, recipe: Recipe) -> None:
        self.path = Path(path)
        self.recipe = recipe
        self._reads: dict[str, str] = {}
        self._data: dict[str, Any] | None = None

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """The run that lies at `path`.

        Raises:
            RunError: there is none, or its run.json cannot be read.
        """
        file = Path(path) / "run.json"
        if not file.is_file():
            raise RunError(f"{path} is not a run folder: it has no run.json", "start one with `spdtool compress`")
        try:
            return cls(path, recipes.load_recipe(file))
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise RunError(f"{file} cannot be read: {error}") from None
        except SpdError as error:
            raise RunError(f"{file} was written by another version: {error.message}", error.hint) from None

    @classmethod
    def at(cls, path: Path | str, recipe: Recipe, *, redo: str | None = None, dry: bool = False) -> Run:
        """The run at `path` for `recipe`; nothing is written until its first stage starts.

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
            if path.exists() and (not path.is_dir() or {file.name for file in path.iterdir()} - BEFORE_THE_RECIPE):
                raise RunError(f"{path} exists and is not a run folder", "give another --run")
            above = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
            if not os.access(above, os.W_OK):
                raise _no_place(path, f"{above} may not be written to")
            return cls(path, recipe)
        old = cls.open(path)
        changed = [d for d in recipe.diff(old.recipe) if d[0] not in MAY_CHANGE]
        kept = STAGES[: STAGES.index(redo)] if redo else STAGES
        finished = [stage for stage in kept if old.done(stage)]
        fatal = [d for d in changed if first_stage_using(d[0]) in finished]
        if fatal:
            lines = "; ".join(f"{name} is {theirs!r} there and {mine!r} here" for name, mine, theirs in fatal[:5])
            raise RunMismatch(
                f"{path} belongs to another recipe: {lines}", _way_out(path, [name for name, _, _ in fatal])
            )
        run = cls(path, recipe)
        if changed and not dry and processes.is_main():
            with run._lock():
                run._save_recipe()
        return run

    def done(self, stage: str) -> bool:
        """Whether `stage` is finished."""
        return (self.path / stage / RECORD).is_file()

    def record(self, stage: str) -> dict[str, Any]:
        """What `stage` said of itself in its stage.json.

        Raises:
            StageMissing: it is not finished.
            Corrupt: its stage.json cannot be read.
        """
        if not self.done(stage):
            raise StageMissing(
                f"{self.path} has no finished stage {stage!r}",
                f"run `spdtool {stage} --run {self.path}`, or `spdtool compress` for everything that is missing",
            )
        try:
            record = json.loads((self.path / stage / RECORD).read_text("utf-8"))
            record["files"], record["inputs"], record["metrics"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise Corrupt(f"{self.path / stage / RECORD} cannot be read: {error}", _redo(stage, self.path)) from None
        assert isinstance(record, dict)
        return record

    def read(self, stage: str) -> Path:
        """The folder of a finished stage, its files checked by sha256; noted as an input of the stage in progress.

        Raises:
            StageMissing: it is not finished.
            Corrupt: a file was altered or cut short, or the stage was made from an input that has since been replaced.
        """
        record, folder = self.record(stage), self.path / stage
        for file in record["files"]:
            path = folder / file["path"]
            if not path.is_file():
                raise Corrupt(f"{path} is missing", _redo(stage, self.path))
            if path.stat().st_size != file["size"]:
                raise Corrupt(
                    f"{path} holds {path.stat().st_size} bytes; the stage wrote {file['size']}", _redo(stage, self.path)
                )
            if sha256(path) != file["sha256"]:
                raise Corrupt(f"{path} was altered since the stage wrote it", _redo(stage, self.path))
        for source, digest in record["inputs"].items():
            if self.done(source) and sha256(self.path / source / RECORD) != digest:
                raise Corrupt(
                    f"{stage} was made from a {source} stage that has since been replaced", _redo(stage, self.path)
                )
        self._reads[stage] = sha256(folder / RECORD)
        return folder

    def note_data(self, facts: dict[str, Any]) -> None:
        """Note the rows of the stage in progress, which must be those that the stages it has read saw themselves.

        Args:
            facts: of the rows, see `identify_rows`.

        Raises:
            RunMismatch: they are others.
        """
        self.check_data(facts, self._reads)
        self._data = facts

    def check_data(self, facts: dict[str, Any], stages: Iterable[str]) -> None:
        """Raise RunMismatch unless finished `stages` saw these rows; one of an older version does not say."""
        for stage in stages:
            theirs = self.record(stage).get("data") or facts
            if theirs != facts:
                raise RunMismatch(
                    f"the rows are not those of the stage {stage!r} in {self.path}: {_changed(theirs, facts)}",
                    "put the data back, give another --run, or begin anew with `spdtool teacher --again`",
                )

    @contextmanager
    def stage(self, stage: str) -> Iterator[Work]:
        """Open `stage` for writing; on success commit it atomically, on failure keep only a state to resume from.

        Of several processes that train together only the main one writes: to the others the folder is given to look at.

        Raises:
            RunLocked: another process works in this run folder.
            RunError: the stage is already done.
        """
        if not processes.is_main():
            yield Work(stage, self._partial(stage))
            self._forget()
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _no_place(self.path, error.strerror or str(error)) from None
        with self._lock():
            if self.done(stage):
                raise RunError(f"{stage} is already done in {self.path}", _redo(stage, self.path))
            if not (self.path / "run.json").exists():
                self._save_recipe()
            work = Work(stage, self._partial(stage))
            work.folder.mkdir(exist_ok=True)
            for spent in map(self._spent, STAGES):
                shutil.rmtree(spent, ignore_errors=True)
            for leftover in work.folder.iterdir():
                if leftover.name not in (STATE, "metrics.jsonl", LEFT):
                    _remove(leftover)
            started = time.time()
            try:
                yield work
                self._commit(work, started)
            except BaseException:
                if not (work.state.exists() and any(work.state.iterdir())):
                    shutil.rmtree(work.folder, ignore_errors=True)
                raise
            finally:
                self._forget()

    def discard(self, stage: str) -> list[str]:
        """Remove `stage` and every later one; return the names of those that were there.

        Raises:
            RunLocked: another process works in this run folder.
        """
        gone: list[str] = []
        if not processes.is_main():
            return gone
        with self._lock():
            for name in reversed(STAGES[STAGES.index(stage) :]):  # a kill in between leaves no stage without its input
                if self.done(name):
                    gone.insert(0, name)
                for folder in (self.path / name, self._partial(name), self._spent(name)):
                    if folder.exists():
                        _remove(folder / RECORD)  # first, so that a kill in between leaves nothing that looks whole
                        shutil.rmtree(folder)
        return gone

    def fingerprint(self, stage: str) -> str:
        """Hash of all that decides the result of `stage`: its recipe and what it has read so far."""
        section = self.recipe.section(stage).model_dump(mode="json")
        decides = [self.recipe.shared_fields(), section, self._reads, self._data]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def _forget(self) -> None:
        """The next stage has read nothing yet."""
        self._reads, self._data = {}, None

    def _partial(self, stage: str) -> Path:
        """Where a stage in progress writes."""
        return self.path / f".{stage}.partial"

    def _spent(self, stage: str) -> Path:
        """Where the state goes in one piece when the stage is done: a half-removed one would look damaged."""
        return self.path / f".{stage}.spent"

    def _commit(self, work: Work, started: float) -> None:
        found = sorted(path for path in work.folder.rglob("*") if path.is_file())
        files = [path for path in found if work.state not in path.parents]
        record = {
            "stage": work.stage,
            "smoke": self.recipe.smoke,
            "spdtool": metadata.version("spdtool"),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": round(time.time() - started, 1),
            "inputs": self._reads,
            "data": self._data,
            "recipe": self.recipe.shared_fields()
            | {work.stage: self.recipe.section(work.stage).model_dump(mode="json")},
            "metrics": work.metrics,
            "machine": machine(),
            "files": [
                {"path": str(path.relative_to(work.folder)), "size": path.stat().st_size, "sha256": sha256(path)}
                for path in files
            ],
        }
        write_json(work.folder / RECORD, record)
        final = self.path / work.stage
        if final.exists():  # a folder without stage.json: not ours to trust
            shutil.rmtree(final)
        if work.state.exists():
            work.state.rename(self._spent(work.stage))
        work.folder.rename(final)
        shutil.rmtree(self._spent(work.stage), ignore_errors=True)

    def _save_recipe(self) -> None:
        if self.recipe.smoke:
            (self.path / SMOKE_MARK).write_text("A few steps on a random two-layer model. Its numbers mean nothing.\n")
        else:
            (self.path / SMOKE_MARK).unlink(missing_ok=True)
        write_json(
            self.path / "run.json",
            {
                "spdtool": metadata.version("spdtool"),
                "smoke": self.recipe.smoke,
                "recipe": self.recipe.model_dump(mode="json"),
            },
        )

    @contextmanager
    def _lock(self) -> Iterator[None]:
        lock = FileLock(self.path / LOCK)  # held by the operating system: it dies with its owner
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunLocked(
                f"another process is working in {self.path}", "wait for it, or give another --run"
            ) from None
        try:
            yield
        finally:
            lock.release()


def default_path(recipe: Recipe) -> Path:
    """`runs/<task>-<sparsity>`, and the recipe, the seed and the smoke mark where they are not the default."""
    task = Path(recipe.data).stem if recipe.task == "local" and recipe.data else recipe.task
    name = f"{task}-{recipe.sparsity:g}"
    if recipe.name != "default":
        name += f"-{recipe.name}"
    if recipe.seed:
        name += f"-seed{recipe.seed}"
    return Path("runs") / (f"smoke-{name}" if recipe.smoke else name)


def machine() -> dict[str, Any]:
    """What a number in stage.json was measured on."""
    versions = {}
    for package in ("torch", "transformers", "accelerate", "onnx", "onnxruntime", "onnxruntime-gpu"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions,
    }


def sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(file: Path, value: Any) -> None:
    """Write `value` whole or not at all: to a sibling, flushed to disk, then renamed."""
    sibling = file.with_name(f".{file.name}.tmp")
    try:
        with sibling.open("w", encoding="utf-8") as stream:
            json.dump(value, stream, indent=2, ensure_ascii=False)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        sibling.replace(file)
    except BaseException:
        sibling.unlink(missing_ok=True)
        raise


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A hidden sibling to make and fill, which becomes `folder` (absent or empty) on success, else is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a call that was killed
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _no_place(path: Path, why: str) -> RunError:
    return RunError(f"no run folder can be made at {path}: {why}", "give another --run")


def _way_out(path: Path, changed: list[str]) -> str:
    """What helps where finished stages were made with other values of the fields `changed`."""
    first = min(map(first_stage_using, changed), key=STAGES.index)
    if any(name.split(".")[0] not in STAGES and first_stage_using(name) == "teacher" for name in changed):
        return f"give another --run; its teacher may be this one: --teacher {path / 'teacher'}"
    if first == "teacher":
        return f"give another --run, or drop all of it: the same options with `spdtool teacher --run {path} --again`"
    sets = " ".join(f"--set {name}=..." for name in changed)
    return f"give another --run, or drop {first} and what follows: `spdtool {first} --run {path} --again {sets}`"


def _changed(theirs: dict[str, Any], mine: dict[str, Any]) -> str:
    there, here = (", ".join(f"{count:,} {name}" for name, count in facts["rows"].items()) for facts in (theirs, mine))
    if there != here:
        return f"{there} there, {here} here"
    return (
        f"as many ({here}), but other texts, labels or order (digest {theirs['digest'][:8]}, now {mine['digest'][:8]})"
    )


def _redo(stage: str, path: Path) -> str:
    return f"to redo it and what follows: `spdtool {stage} --run {path} --again`"
