"""Notes about rows: dev texts that are also in train, and long lists of names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spdtool.data.dataset import Rows
from spdtool.data.overview import leaked_rows, leaked_unlabeled_rows, list_names


def test_dev_rows_whose_text_is_in_train_are_counted() -> None:
    train, dev = Rows(["x", "y", "y"], None, [0, 1, 0]), Rows(["y", "z", "y"], None, [0, 1, 0])
    assert leaked_rows(train, dev, "dev") == [
        "2 of 3 dev rows have a text that is in train too: their score is flattered"
    ]
    assert leaked_rows(train, Rows(["z"], None, [0]), "dev") == []


def test_dev_and_test_rows_among_the_unlabelled_are_counted() -> None:
    splits = {name: Rows([text], None, [0]) for name, text in (("train", "a"), ("dev", "b"), ("test", "c"))}
    assert leaked_unlabeled_rows(splits) == []
    lines = leaked_unlabeled_rows(splits | {"unlabeled": Rows(["a", "b", "c"], None, [0] * 3)})
    assert [line.split(" rows")[0] for line in lines] == ["1 of 1 dev", "1 of 1 test"]
    assert all("in the unlabelled texts too" in line for line in lines)


def test_pairs_are_equal_only_if_both_texts_are() -> None:
    train, dev = Rows(["a", "b"], ["x", "y"], [0, 1]), Rows(["a", "b"], ["y", "y"], [0, 1])
    assert leaked_rows(train, dev, "dev")[0].startswith("1 of 2 dev rows")


def test_texts_in_shards_are_not_read() -> None:
    class Unreadable(list[str]):
        def __iter__(self) -> Any:
            pytest.fail("read")

    assert leaked_rows(Rows(tuple("ab"), None, np.array([0, 1])), Rows(Unreadable("ab"), None, [0, 1]), "dev") == []


def test_of_many_names_the_first_are_listed() -> None:
    assert list_names(["a", "b"]) == "a, b"
    assert list_names([str(number) for number in range(30)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 22 more"
