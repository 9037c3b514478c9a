"""One run as one row: scores of teacher and student, zeros, seconds, bytes and speed, as its stage records hold them.

Nothing is computed here that a stage has not measured; what an unfinished run does not hold is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from spdtool.recipe import PHASES
from spdtool.recipe.fields import Recipe
from spdtool.run.folder import RECORD, Run, read_stage_record
from spdtool.run.records import IntermediateStudent, StudentRow, TrainingResult, ZeroCount


def row_of_recipe(recipe: Recipe, folder: Path | str) -> StudentRow:
    """Return the row of a run that has not begun."""
    task = recipe.task
    if task == "local" and recipe.data:
        task = Path(recipe.data).stem
    return StudentRow(
        task=task,
        recipe=recipe.name,
        sparsity=recipe.sparsity,
        seed=recipe.seed,
        run=str(folder),
        smoke=recipe.smoke,
    )


def row_of_run(run: Run) -> StudentRow:
    """Return the row of a run, as far as it has come.

    Raises:
        Corrupt: a record cannot be read.
    """
    row = row_of_recipe(run.recipe, run.path)
    if not run.done("teacher"):
        return row
    teacher = run.training_result("teacher")  # on this run's dev rows, also of a given teacher
    row.teacher, row.chance = teacher.score, teacher.chance
    row.teacher_train = trained_teacher(run).train_score
    finished = [phase for phase in PHASES if run.done(phase)]
    if not finished:
        return row
    student = run.training_result(finished[-1])
    row.student, row.student_train = student.score, student.train_score
    row.seconds = sum(run.record(phase).seconds for phase in finished)  # without the teacher, which trials share
    row.nonzeros, row.weights = count_weights(student.zeros)
    if finished[-1] == PHASES[-1]:
        row.status = "done"
    if run.done("export") and run.done("bench"):
        _add_bench(row, run)
    row.students = list(intermediate_rows(row, run.training_result(finished[0]).students))
    return row


def intermediate_rows(row: StudentRow, students: Iterable[IntermediateStudent]) -> Iterator[StudentRow]:
    """Yield the rows of the students that the prune stage of the run in `row` saved on its way."""
    for student in students:
        nonzeros = None
        if row.weights is not None:  # the final student's: all its stages have the same matrices
            nonzeros = round(row.weights * (1 - student.sparsity))
        yield StudentRow(
            task=row.task,
            recipe=row.recipe,
            sparsity=student.sparsity,
            target_sparsity=row.sparsity,
            seed=row.seed,
            run=str(Path(row.run) / PHASES[0] / student.folder),
            status="done",
            smoke=row.smoke,
            teacher=row.teacher,
            chance=row.chance,
            teacher_train=row.teacher_train,
            student=student.dev.get("score"),
            student_train=(student.train or {}).get("score"),
            nonzeros=nonzeros,
            weights=row.weights,
            teacher_bytes=row.teacher_bytes,
        )


def with_intermediate(rows: Iterable[StudentRow]) -> list[StudentRow]:
    """Return every row, followed by the rows of its intermediate students."""
    every = []
    for row in rows:
        every += [row, *row.students]
    return every


def trained_teacher(run: Run) -> TrainingResult:
    """Return the teacher's result; of a given teacher that lies in a run, the one from when it was trained."""
    result = run.training_result("teacher")
    source = teacher_folder(run)
    if result.train is not None or result.given is None or not (source / RECORD).is_file():
        return result
    record = read_stage_record(source)
    if record.stage != "teacher" or not isinstance(record.result, TrainingResult):
        return result
    return record.result


def teacher_folder(run: Run) -> Path:
    """Return the folder where the teacher was trained: in this run, or where it was given from."""
    given = run.training_result("teacher").given
    if given:
        return Path(given)
    return run.path / "teacher"


def count_weights(zeros: Mapping[str, ZeroCount]) -> tuple[int | None, int | None]:
    """Return nonzeros and weights over all prunable matrices, None without any."""
    if not zeros:
        return None, None
    nonzeros = size = 0
    for count in zeros.values():
        nonzeros += count.size - count.zeros
        size += count.size
    return nonzeros, size


def _add_bench(row: StudentRow, run: Run) -> None:
    """Add bytes and speed of the best exported form of the student."""
    bench, exported = run.bench_result(), run.export_result()
    best = exported.student
    if bench.best != "student":
        best = exported.targets[bench.best].student
    row.bytes, row.teacher_bytes = best.bytes, exported.teacher.bytes
    row.speed = bench.speed.median  # with the fewest threads, the headline of the bench
