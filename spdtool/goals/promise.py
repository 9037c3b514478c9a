"""Hold what was measured against the goal of a recipe: speed-up, megabytes and dev score."""

from __future__ import annotations

from spdtool.bench.engines import Shape
from spdtool.bench.lineup import goal_engine
from spdtool.bench.profiles import is_of_this_machine
from spdtool.bench.ratios import BenchData, paired_ratio
from spdtool.bench.runtimes import ONNXRUNTIME
from spdtool.errors import GateError
from spdtool.export.onnx_session import usable_cores
from spdtool.goals.sizes import MEGABYTE
from spdtool.recipe.delivery import Goal
from spdtool.recipe.fields import Recipe
from spdtool.run.records import Promise, Ratio, Scores, ShapeProfile

POINTS = 100  # of a score of 1
ROUNDING = 1e-9  # of a difference of two scores


def timed_shape(goal: Goal, max_length: int, positions: int) -> Shape:
    """Return the batch and length at which a speed-up is promised.

    Args:
        positions: longest input of the models in tokens.
    """
    return Shape(goal.batch, min(goal.length or max_length, positions))


def timed_threads(goal: Goal) -> int:
    """Return the number of threads with which a speed-up is promised."""
    return goal.threads or usable_cores()


def count_points_lost(teacher: Scores, student: Scores) -> float:
    """Return by how many points, hundredths of a score of 1, the student's dev score is lower."""
    return POINTS * (teacher["score"] - student["score"])


def measure_promise(
    recipe: Recipe,
    data: BenchData,
    shape: Shape,
    teacher: Scores,
    student: Scores,
    *,
    profile: ShapeProfile | None = None,
) -> Promise:
    """Compare the figures of a bench with the goal of its recipe.

    Args:
        shape: that a speed-up is promised at.
        teacher, student: dev scores.
        profile: table of times by which the shape was chosen.
    """
    goal, promise = recipe.goal, Promise()
    # A sparse student is fast only where zeros are skipped, a small one in the plain file.
    engine = data.best if goal.has_full_width else "student"
    if goal.speedup is not None:
        _add_speedup(promise, goal, data, engine, shape, profile)
    if goal.max_mb is not None:
        promise.megabytes = data.files[engine].bytes / MEGABYTE
        _add_line(
            promise,
            f"at most {goal.max_mb:g} MB were asked for: {promise.megabytes:.1f} MB",
            broken=promise.megabytes > goal.max_mb,
        )
    if goal.max_drop is not None:
        promise.drop = count_points_lost(teacher, student)
        _add_line(
            promise,
            f"at most {goal.max_drop:g} points of dev score were to be lost: {promise.drop:.2f} were "
            f"({teacher['score']:.4f} to {student['score']:.4f})",
            broken=promise.drop > goal.max_drop + ROUNDING,
        )
    return promise


def refuse_broken(promise: Promise | None, recipe: Recipe) -> None:
    """Refuse a student that misses its goal; a smoke run's numbers mean nothing.

    Raises:
        GateError: says what was missed, and by how much.
    """
    if promise is None or not promise.broken or recipe.smoke:
        return
    hint = "ask for a little more than you need, or train it longer: --set prune.epochs=... --set finetune.epochs=..."
    if promise.drop is None or recipe.goal.max_drop is None or promise.drop <= recipe.goal.max_drop:
        hint = "repeat the bench on a machine that does nothing else: `spdtool bench --again`; or ask for a little more"
    raise GateError(f"the goal was missed: {'; '.join(promise.broken)}", hint)


def _add_speedup(
    promise: Promise, goal: Goal, data: BenchData, engine: str, shape: Shape, profile: ShapeProfile | None
) -> None:
    assert goal.speedup is not None
    threads = timed_threads(goal)
    where = f"batch {shape.batch}, length {shape.length}, {threads} thread{'s' if threads > 1 else ''}"
    if goal.runtime == ONNXRUNTIME:
        asked = f"{goal.speedup:g}x was asked for"
        ratio = data.speed_of_student(data.timing(engine, threads), [shape])
    else:
        asked = f"{goal.speedup:g}x was asked for in {goal.runtime}"
        measured = _speedup_elsewhere(data, goal.runtime, threads, shape)
        if measured is None:
            ratio = data.speed_of_student(data.timing(engine, threads), [shape])
            line = f"{asked}, which is not timed here; onnxruntime: {ratio} ({where})"
            _add_line(promise, line, broken=False)
            return
        ratio = measured
        if profile is not None and not is_of_this_machine(profile):
            # The shape was chosen for the machine of the table, and says nothing of this one.
            _add_line(promise, f"{asked}, by the times of {profile.machine}; here: {ratio} ({where})", broken=False)
            return
    promise.speedup = ratio
    line = f"{asked}: {ratio} ({where})"
    # The interval is of this process; another one differs by the tolerance.
    _add_line(promise, line, broken=ratio.high < goal.speedup * (1 - goal.tolerance))


def _speedup_elsewhere(data: BenchData, runtime: str, threads: int, shape: Shape) -> Ratio | None:
    """How many times faster the student's plain file is than the teacher's in a runtime; None: it was not timed."""
    student, teacher = goal_engine(runtime, "student"), goal_engine(runtime, "teacher")
    if not {student, teacher} <= set(data.engines):
        return None
    return paired_ratio([data.timing(teacher, threads)], data.timing(student, threads), [shape])


def _add_line(promise: Promise, line: str, *, broken: bool) -> None:
    promise.lines.append(line)
    if broken:
        promise.broken.append(line)
