"""Rows of a sweep and their summaries: means, deviations, gaps, retention, Pareto front, intermediate students."""

from __future__ import annotations

import json

import pytest

from spdtool.run.records import IntermediateStudent, StudentRow
from spdtool.sweep import rows, summary


def row(**fields):
    defaults = {"task": "toy", "recipe": "default", "sparsity": 0.5, "seed": 0, "run": "r", "status": "done"}
    return StudentRow(**defaults | {"teacher": 0.8, "student": 0.6} | fields)


def test_a_spread_has_the_sample_deviation_and_none_for_one_value():
    examples = [
        ([0.5, 0.6, 0.7], "60.0 ± 10.0"),
        ([0.5], "50.0 ± -"),
        ([], "-"),
        ([None, 0.25, None], "25.0 ± -"),
    ]
    for values, text in examples:
        assert str(summary.spread(values)) == text, values


def test_retention_and_gaps_follow_from_the_scores_of_a_row():
    examples = [
        ({}, (0.75, None, None)),
        ({"teacher": 0.0}, (None, None, None)),
        ({"teacher": -0.1}, (None, None, None)),
        ({"chance": 0.8}, (None, None, None)),
        ({"chance": 0.79}, (0.75, None, None)),
        ({"teacher_train": 0.9, "student_train": 0.55}, (0.75, 0.1, -0.05)),
    ]
    for fields, expected in examples:
        derived = row(**fields)
        figures = (derived.retention, derived.teacher_gap, derived.student_gap)
        assert figures == pytest.approx(expected), fields


def test_a_row_is_read_from_json_with_fields_of_another_version():
    original = row(students=[row(sparsity=0.3, target_sparsity=0.5)], bytes=7)
    record = json.loads(json.dumps(original.model_dump(mode="json") | {"added_later": 1}))
    assert StudentRow.model_validate(record) == original


def test_means_are_over_seeds_of_one_task_recipe_and_sparsity():
    student_rows = [row(seed=seed, student=score, teacher=1.0) for seed, score in enumerate((0.5, 0.7))]
    student_rows += [row(recipe="other"), row(sparsity=0.9), row(task="second")]
    summaries = summary.summarise(student_rows)
    assert [(summary_row.task, summary_row.recipe, summary_row.sparsity) for summary_row in summaries] == [
        ("toy", "default", 0.5), ("toy", "default", 0.9), ("toy", "other", 0.5), ("second", "default", 0.5)
    ]  # fmt: skip
    assert str(summaries[0].student) == "60.0 ± 14.1"
    assert summaries[0].retention.mean == pytest.approx(0.6)


def test_retention_is_the_mean_of_the_ratios_of_each_seed():
    student_rows = [row(teacher=1.0, student=0.5), row(seed=1, teacher=0.5, student=0.5)]
    assert summary.summarise(student_rows)[0].retention.mean == pytest.approx(0.75)


def test_a_teacher_at_chance_has_no_retention():
    chance_row = row(teacher=0.5, student=0.5, chance=0.5)
    assert "nothing to keep: the teacher is no better than chance" in summary.describe_row(chance_row)
    columns, (cells,) = summary.table(summary.summarise([chance_row]))
    assert cells[columns.index("kept")] == "-"
    assert summary.averages_table(summary.summarise([chance_row]))[1] == [["default", "0.5", "-", "0"]]
    two_rows = [chance_row, row(seed=1, chance=0.5)]
    assert summary.summarise(two_rows)[0].retention.mean == pytest.approx(0.75), (
        "a seed whose teacher has learned something counts"
    )


def test_failed_and_unfinished_trials_are_left_out_of_means():
    student_rows = [
        row(),
        row(seed=1, status="failed", student=None, error="DataError: no rows"),
        row(seed=2, status="unfinished"),
    ]
    (summarised,) = summary.summarise(student_rows)
    assert summarised.student.count == 1
    assert summary.table([summarised])[1][0][-1] == "1 (1 failed)"
    assert summary.failures(student_rows) == ["toy default 0.5 seed 1: failed: DataError: no rows"]
    assert "DataError: no rows" in summary.markdown("Sweep", student_rows)


def test_the_average_over_tasks_weighs_every_task_alike():
    student_rows = [row(seed=seed, teacher=1.0, student=1.0) for seed in range(3)] + [
        row(task="b", teacher=1.0, student=0.5)
    ]
    assert summary.averages(summary.summarise(student_rows)) == [
        summary.Average("default", 0.5, pytest.approx(0.75), 2)
    ]


def test_intermediate_students_are_rows_of_their_own():
    final_row = row(sparsity=0.95, weights=1000, nonzeros=50, seconds=9.0, bytes=5, speed=2.0)
    saved = IntermediateStudent(sparsity=0.7, step=4, folder="students/0.7", dev={"score": 0.75}, train={"score": 0.8})
    (intermediate,) = rows.intermediate_rows(final_row, [saved])
    assert intermediate.label == "default, on the way to 0.95"
    assert intermediate.run == "r/prune/students/0.7"
    assert (intermediate.student, intermediate.nonzeros, intermediate.bytes, intermediate.speed) == (
        0.75,
        300,
        None,
        None,
    )
    assert intermediate.student_gap == pytest.approx(0.05)
    assert [summary_row.recipe for summary_row in summary.summarise([row(students=[intermediate])])] == [
        "default",
        intermediate.label,
    ]


def test_the_pareto_front_contains_only_undominated_students():
    examples = [
        ([(1, 5), (2, 4), (3, 6)], [(1, 5), (3, 6)]),
        ([(2, 5), (1, 5)], [(1, 5)]),
        ([(1, 4), (1, 5)], [(1, 5)]),
        ([], []),
    ]
    for points, expected in examples:
        assert summary.pareto_front(points) == expected, points


def test_bytes_and_speed_are_columns_only_after_a_bench():
    assert "speed" not in summary.table(summary.summarise([row()]))[0]
    columns, cells = summary.table(summary.summarise([row(speed=2.0, bytes=12345), row(task="b")]))
    assert columns[-2:] == ["bytes", "speed"]
    assert [line[-2:] for line in cells] == [["12,345", "2.00x"], ["-", "-"]]
