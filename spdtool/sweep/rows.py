"""One run as one row: the scores of teacher and student, zeros, seconds, bytes and speed, as its stage records tell.

Nothing is computed here that a stage has not measured; what an older or an unfinished run does not hold is None.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from spdtool.recipe import PHASES
from spdtool.recipe.fields import Recipe
from spdtool.run.folder import RECORD, Run

DONE, UNFINISHED, FAILED, STOPPED = "done", "unfinished", "failed", "stopped"


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        run: its folder. status: done, unfinished, failed, or stopped as hopeless; `error` says why.
        teacher, student: dev scores. teacher_train, student_train: scores on rows that were trained on.
        nonzeros, weights: of the encoder's prunable matrices.
        seconds: that the student's phases took.
        bytes, teacher_bytes, speed: of the best exported form and of the dense teacher; only where there is a bench.
        toward: the sparsity that the run went on to, for a student that was left on the way.
        left: the students that were left on the way.
    """

    task: str
    recipe: str
    sparsity: float
    seed: int
    run: str
    status: str = UNFINISHED
    error: str | None = None
    smoke: bool = False
    teacher: float | None = None
    student: float | None = None
    teacher_train: float | None = None
    student_train: float | None = None
    nonzeros: int | None = None
    weights: int | None = None
    seconds: float | None = None
    bytes: int | None = None
    teacher_bytes: int | None = None
    speed: float | None = None
    toward: float | None = None
    left: tuple[Row, ...] = ()

    @property
    def label(self) -> str:
        """The recipe as tables name it."""
        return self.recipe if self.toward is None else f"{self.recipe}, on the way to {self.toward:g}"

    @property
    def kept(self) -> float | None:
        """The student's dev score as a share of the teacher's; none where the teacher has learnt nothing."""
        if self.student is None or self.teacher is None or self.teacher <= 0:
            return None
        return self.student / self.teacher

    @property
    def teacher_gap(self) -> float | None:
        """Train score minus dev score of the teacher: how far it overfits."""
        return difference(self.teacher_train, self.teacher)

    @property
    def student_gap(self) -> float | None:
        """The same of the student."""
        return difference(self.student_train, self.student)

    def record(self) -> dict[str, Any]:
        """The row as JSON, with what follows from it."""
        derived = {"kept": self.kept, "teacher_gap": self.teacher_gap, "student_gap": self.student_gap}
        return asdict(self) | derived | {"left": [row.record() for row in self.left]}


def read(record: Mapping[str, Any]) -> Row:
    """The row that `Row.record` wrote; fields of other versions are left out."""
    known = {name: value for name, value in record.items() if name in Row.__dataclass_fields__}
    return Row(**known | {"left": tuple(map(read, record.get("left", ())))})


def of_recipe(recipe: Recipe, run: Path | str) -> Row:
    """The row of a run that has not begun."""
    task = Path(recipe.data).stem if recipe.task == "local" and recipe.data else recipe.task
    return Row(task, recipe.name, recipe.sparsity, recipe.seed, str(run), smoke=recipe.smoke)


def of_run(run: Run) -> Row:
    """The row of a run, as far as it has come; raises Corrupt where a record cannot be read."""
    row = of_recipe(run.recipe, run.path)
    if not run.done("teacher"):
        return row
    row = replace(row, teacher=dev(run.record("teacher")), teacher_train=train(teacher_record(run)))
    phases = [run.record(phase) for phase in PHASES if run.done(phase)]
    if not phases:
        return row
    metrics = phases[-1]["metrics"]
    row = replace(
        row,
        status=DONE if run.done(PHASES[-1]) else UNFINISHED,
        student=dev(phases[-1]),
        student_train=train(phases[-1]),
        seconds=sum(record["seconds"] for record in phases),
    )
    row = replace(row, **counts(metrics.get("zeros", {})), **benched(run))
    return replace(row, left=tuple(on_the_way(row, phases[0]["metrics"].get("left") or ())))


def on_the_way(row: Row, left: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    """Rows of the students that the prune stage left in its folder."""
    for student in left:
        weights = row.weights or 0
        counted = counts(student.get("zeros") or {})
        yield replace(
            row,
            sparsity=student["sparsity"],
            toward=row.sparsity,
            run=str(Path(row.run) / PHASES[0] / student.get("folder", "")),
            status=DONE,
            student=score(student.get("dev")),
            student_train=score(student.get("train")),
            nonzeros=counted["nonzeros"] or round(weights * (1 - student["sparsity"])) or None,
            seconds=None,
            bytes=None,
            speed=None,
        )


def flat(rows: Iterable[Row]) -> list[Row]:
    """Every row, and after it the rows of the students that its run left on the way."""
    return [each for row in rows for each in (row, *row.left)]


def teacher_record(run: Run) -> dict[str, Any]:
    """What the teacher's stage says; of a given teacher that lies in a run, what was measured when it was trained."""
    record = run.record("teacher")
    own: dict[str, Any] = record["metrics"]
    trained = teacher_folder(run) / RECORD
    if train(record) is not None or own.get("given") is None or not trained.is_file():
        return record
    found: dict[str, Any] = json.loads(trained.read_text("utf-8"))
    return found if found.get("stage") == "teacher" else record


def teacher_folder(run: Run) -> Path:
    """Where the teacher was trained: in this run, or where it was given from."""
    given = run.record("teacher")["metrics"].get("given")
    return Path(given) if given else run.path / "teacher"


def counts(zeros: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Nonzeros and weights over all prunable matrices."""
    if not zeros:
        return {"nonzeros": None, "weights": None}
    sizes = sum(size for _, size in zeros.values())
    return {"nonzeros": sizes - sum(dead for dead, _ in zeros.values()), "weights": sizes}


def benched(run: Run) -> dict[str, Any]:
    """Bytes of the best exported form and of the teacher, and how many times faster it ran with the fewest threads."""
    if not run.done("bench") or not run.done("export"):
        return {}
    bench, exported = run.record("bench")["metrics"], run.record("export")["metrics"]
    best = exported["student"] if bench["best"] == "student" else exported[bench["best"]]["student"]
    return {
        "bytes": best["bytes"],
        "teacher_bytes": exported["teacher"]["bytes"],
        "speed": headline(bench)[1]["median"],
    }


def headline(bench: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The fewest threads that a bench timed with, mostly one, and the speed with them: median, low and high."""
    threads = min(bench["speeds"], key=int)
    return threads, bench["speeds"][threads]


def score(metrics: Any) -> float | None:
    """The headline score of some metrics, where there are any."""
    return metrics.get("score") if isinstance(metrics, Mapping) else None


def dev(record: Mapping[str, Any]) -> float | None:
    """Dev score of what a stage handed over."""
    return score(record["metrics"].get("dev"))


def train(record: Mapping[str, Any]) -> float | None:
    """Score on rows that were trained on; older runs have none."""
    return score(record["metrics"].get("train"))


def difference(left: float | None, right: float | None) -> float | None:
    """`left - right`, where both are known."""
    return None if left is None or right is None else left - right
