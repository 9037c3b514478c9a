"""How the rows were read: what the plan says of their labels, and what it finds odd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from spdtool.data import overview
from spdtool.tasks import Rows, Task

ToyTask = Callable[..., Task]


def splits(train: list[Any], dev: list[Any], texts: tuple[list[str], list[str]] | None = None) -> dict[str, Rows]:
    """Splits with these labels; texts are all different unless they are given."""
    first = texts or ([f"train {i}" for i in range(len(train))], [f"dev {i}" for i in range(len(dev))])
    return {"train": Rows(first[0], None, train), "dev": Rows(first[1], None, dev)}


def test_classes_are_counted_in_train_and_dev(toy_task: ToyTask) -> None:
    task, rows = toy_task(labels=("neg", "pos")), splits([0, 1, 1], [1])
    assert overview.label_line(task, rows) == "2 classes: neg 1, pos 2; dev: neg 0, pos 1"
    assert overview.class_counts(task, rows) == {"train": {"neg": 1, "pos": 2}, "dev": {"neg": 0, "pos": 1}}


def test_a_regression_has_a_range(toy_task: ToyTask) -> None:
    task, rows = toy_task(labels=()), splits([0.1, 4.9, 2], [1.0])
    assert overview.label_line(task, rows) == "regression, 0.1 to 4.9"
    assert overview.class_counts(task, rows) == {}
    assert list(overview.notes(task, rows)) == []


def test_of_many_classes_the_first_are_shown(toy_task: ToyTask) -> None:
    names = tuple(f"c{i:02}" for i in range(30))
    line = overview.label_line(toy_task(labels=names), splits([*range(30)], [*range(30)]))
    assert line.startswith("30 classes: c00 1, c01 1,")
    assert line.endswith("c07 1 and 22 more")


@pytest.mark.parametrize(
    ("labels", "rows", "said"),
    [
        (("a", "b"), splits([0, 1], [0, 1]), []),
        (("a", "b"), splits([0, 1], [0, 0]), ["no row of dev has the label 'b'"]),
        (("a", "b", "c"), splits([1, 1], [0, 1]), ["no row of train has the label 'a', 'c'", "no row of dev has the"]),
        (("No", "no", "yes"), splits([0, 1, 2], [0, 1, 2]), ["the labels 'No', 'no' differ by case or surrounding"]),
        (("pos", " pos"), splits([0, 1], [0, 1]), ["the labels 'pos', ' pos' differ"]),
        (("NA", "b", "nan"), splits([0, 1, 2], [0, 1, 2]), ["the label 'NA', 'nan' is taken for a class"]),
        (
            ("a", "b"),
            splits([0, 1, 0], [0, 1, 0], (["x", "y", "y"], ["y", "z", "y"])),
            ["2 of 3 dev rows have a text that is in train too"],
        ),
    ],
)
def test_what_deserves_attention_is_noted(
    toy_task: ToyTask, labels: tuple[str, ...], rows: dict[str, Rows], said: list[str]
) -> None:
    found = list(overview.notes(toy_task(labels=labels), rows))
    assert len(found) == len(said)
    assert all(start in line for start, line in zip(said, found, strict=True))


def test_pairs_are_alike_in_both_texts_only(toy_task: ToyTask) -> None:
    rows = {"train": Rows(["a", "b"], ["x", "y"], [0, 1]), "dev": Rows(["a", "b"], ["y", "y"], [0, 1])}
    assert list(overview.notes(toy_task(), rows)) == [
        "1 of 2 dev rows have a text that is in train too: their score is flattered"
    ]


def test_texts_in_shards_are_not_read(toy_task: ToyTask) -> None:
    class Untouched(list[str]):
        def __iter__(self) -> Any:
            pytest.fail("read")

    rows: Any = {"train": Rows(tuple("ab"), None, np.array([0, 1])), "dev": Rows(Untouched("ab"), None, [0, 1])}  # type: ignore[arg-type]
    assert list(overview.notes(toy_task(), rows)) == []
