"""Sharded data: the same rows and labels as from one file, and defects named by file and row."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from spdtool.data import labels as label_module
from spdtool.data import sharded
from spdtool.data.dataset import Rows, identify_rows
from spdtool.errors import DataError
from spdtool.recipe.reading import build_recipe
from spdtool.tasks.prepare import find_task
from spdtool.tasks.task import Task

TEXTS = ["the film", "", "é là 日本", "a meal", "so good", "very bad", "it was", "fine then"]
TEXTS[1] = "one"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path: Path, texts: list[str], labels: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.table({"text": texts, "label": labels}), path)
    elif path.suffix == ".jsonl":
        lines = [json.dumps({"text": text, "label": label}) for text, label in zip(texts, labels, strict=True)]
        path.write_text("\n".join(lines) + "\n", "utf-8")
    else:
        lines = [f"{text},{label}" for text, label in zip(texts, labels, strict=True)]
        path.write_text("\n".join(["text,label", *lines]) + "\n", "utf-8")


def task(folder: Path) -> Task:
    return find_task(build_recipe("default", {"task": "local", "data": str(folder)}))


def rows(folder: Path) -> dict[str, Rows]:
    return task(folder).read_rows(build_recipe("default", {"task": "local", "data": str(folder)}))


def test_shards_give_the_rows_of_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "CHUNK_ROWS", 3)
    endings = (".parquet", ".jsonl", ".csv")
    layouts = ("train/{}", "train-{}-of-2")
    label_pairs: tuple[list[Any], ...] = (["b", "a"], [10, 9], [0.5, 1.25])
    for case, (ending, layout, labels) in enumerate(product(endings, layouts, label_pairs)):
        message = f"{layout}{ending} with the labels {labels}"
        many_files, one_file = tmp_path / f"{case}/many", tmp_path / f"{case}/one"
        gold = labels * 4
        for number, start in enumerate((0, 5)):
            write(many_files / (layout.format(number) + ending), TEXTS[start : start + 5], gold[start : start + 5])
        write(many_files / f"dev{ending}", TEXTS[::-1], gold[::-1])
        write(one_file / f"train{ending}", TEXTS, gold)
        write(one_file / f"dev{ending}", TEXTS[::-1], gold[::-1])
        for _ in range(2):  # read, and from the cache
            sharded_rows, single = rows(many_files), rows(one_file)
            for split in ("train", "dev"):
                assert list(sharded_rows[split].first) == single[split].first, message
                assert list(sharded_rows[split].labels) == single[split].labels, message
                assert sharded_rows[split].first[1:4] == single[split].first[1:4], message
                assert sharded_rows[split].select([2, 0]).first == single[split].select([2, 0]).first, message


def test_shards_without_a_dev_set_are_refused(tmp_path: Path) -> None:
    for shard in range(2):
        write(tmp_path / "train" / f"{shard}.csv", TEXTS, [0, 1] * 4)
    with pytest.raises(DataError, match="2 files of training rows and no dev set"):
        rows(tmp_path)


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        (["x", " "], [0, 1], r"1\.jsonl, line 2: no text in the column 'text'"),
        (["x", "y"], [0, None], r"1\.jsonl, line 2: no label"),
    ],
)
def test_a_defect_is_named_by_file_and_row(tmp_path: Path, texts: list[str], labels: list[Any], message: str) -> None:
    write(tmp_path / "train" / "0.jsonl", TEXTS, [0, 1] * 4)
    write(tmp_path / "train" / "1.jsonl", texts, labels)
    write(tmp_path / "dev.jsonl", TEXTS, [0, 1] * 4)
    with pytest.raises(DataError, match=message):
        rows(tmp_path)


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    for shard in range(2):
        write(tmp_path / "train" / f"{shard}.csv", TEXTS, [0, 1] * 4)
    write(tmp_path / "dev.csv", TEXTS, [0, 1] * 4)
    before = rows(tmp_path)["train"]
    write(tmp_path / "train" / "1.csv", [*TEXTS, "and more"], [0, 1] * 4 + [1])
    assert len(rows(tmp_path)["train"]) == len(before) + 1


def test_the_labels_of_all_files_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One shard has integer labels and the next has fractions; other shards are sorted by class."""
    monkeypatch.setattr(sharded, "CHUNK_ROWS", 3)
    for name, gold in (("numbers", ([1, 2, 3, 4] * 2, [0.5, 2.0] * 4)), ("sorted", (["b"] * 8, ["a"] * 8))):
        for shard, labels in enumerate(gold):
            write(tmp_path / name / "train" / f"{shard}.csv", TEXTS, labels)
        write(tmp_path / name / "dev.csv", TEXTS, gold[0])
    for _ in range(2):  # read, and from the cache
        assert task(tmp_path / "numbers").dataset.labels == ()
        assert list(rows(tmp_path / "numbers")["train"].labels) == [1.0, 2.0, 3.0, 4.0] * 2 + [0.5, 2.0] * 4
        assert list(rows(tmp_path / "numbers")["dev"].labels) == [1.0, 2.0, 3.0, 4.0] * 2
        assert task(tmp_path / "sorted").dataset.labels == ("a", "b")
        assert list(rows(tmp_path / "sorted")["train"].labels) == [1] * 8 + [0] * 8


def test_a_label_that_is_not_a_number_is_named_among_many_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_module, "MOST_CLASSES", 6)
    for shard in range(3):
        write(tmp_path / "train" / f"{shard}.csv", TEXTS, [shard + i / 10 for i in range(8)])
    write(tmp_path / "dev.csv", TEXTS, [0.5] * 7 + ["high"])
    for _ in range(2):
        assert task(tmp_path).dataset.labels == ()
        with pytest.raises(DataError, match=r"dev\.csv, line 9: the label 'high' is not a number"):
            rows(tmp_path)
    write(tmp_path / "train" / "2.csv", TEXTS, [*range(7), "none"])
    for _ in range(2):
        with pytest.raises(DataError, match=r"2\.csv, line 9: the label 'none' is not a number, and 23 of 24 are"):
            task(tmp_path)


def test_too_many_classes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_module, "MOST_CLASSES", 6)
    for shard in range(2):
        write(tmp_path / "train" / f"{shard}.csv", TEXTS, [f"id {i}" for i in range(8)])
    write(tmp_path / "dev.csv", TEXTS, ["id 0"] * 8)
    with pytest.raises(DataError, match=r"0\.csv brings the labels to more than 6 different ones"):
        rows(tmp_path)


def test_one_file_of_train_and_several_of_dev(tmp_path: Path) -> None:
    write(tmp_path / "train" / "all.csv", TEXTS, ["a", "b"] * 4)
    for shard in range(2):
        write(tmp_path / "validation" / f"{shard}.csv", TEXTS, ["a", "b"] * 4)
    assert {name: len(split) for name, split in rows(tmp_path).items()} == {"train": 8, "dev": 16}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("train/0.csv", "train/1.csv", "train.csv", "dev.csv"), r"train/0\.csv and train\.csv"),
        (("train.csv", "train.jsonl", "dev.csv"), r"train\.csv and train\.jsonl"),
        (("train/0.csv", "train/1.csv", "dev/0.csv", "val/0.csv"), r"dev/0\.csv and val/0\.csv"),
    ],
)
def test_two_places_for_one_split_are_refused(tmp_path: Path, files: tuple[str, ...], message: str) -> None:
    for file in files:
        write(tmp_path / file, TEXTS, ["a", "b"] * 4)
    with pytest.raises(DataError, match=f"has {message}"):
        rows(tmp_path)


def test_shards_are_identified_without_reading_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in range(2):
        write(tmp_path / "train" / f"{shard}.csv", TEXTS, ["a", "b"] * 4)
    write(tmp_path / "dev.csv", TEXTS, ["a", "b"] * 4)
    record = identify_rows(task(tmp_path).dataset, rows(tmp_path))
    assert record.rows == {"train": 16, "dev": 8}
    monkeypatch.setattr(sharded.MappedTexts, "__getitem__", lambda *_: pytest.fail("read"))
    assert identify_rows(task(tmp_path).dataset, rows(tmp_path)) == record
    write(tmp_path / "train" / "1.csv", TEXTS, ["b", "a"] * 4)
    assert identify_rows(task(tmp_path).dataset, rows(tmp_path)).digest != record.digest


def test_a_dev_label_that_no_training_row_has_is_refused(tmp_path: Path) -> None:
    for shard in range(2):
        write(tmp_path / "train" / f"{shard}.csv", TEXTS, ["a", "b"] * 4)
    write(tmp_path / "dev.csv", TEXTS, ["a", "c"] * 4)
    with pytest.raises(DataError, match="the label 'c' of the dev rows is in no training row"):
        rows(tmp_path)


WORDS = ["café", "", "naïve 文", "a", "b b"]


def test_texts_are_sliced_as_a_list_is() -> None:
    content = [text.encode() for text in WORDS]
    offsets = np.cumsum([0, *map(len, content)])
    texts = sharded.MappedTexts(np.frombuffer(b"".join(content), np.uint8), offsets, "digest")
    assert list(texts) == WORDS
    for rows in (slice(None), slice(1, 4), slice(3, 99), slice(4, 2), slice(-2, None), slice(None, None, -2)):
        assert texts[rows] == WORDS[rows], rows
    assert texts[-1] == WORDS[-1]
    with pytest.raises(IndexError):
        texts[len(WORDS)]


def test_a_test_set_beside_shards_is_read_if_it_has_labels(tmp_path: Path) -> None:
    for number, start in enumerate((0, 4)):
        write(tmp_path / f"train-{number}.jsonl", TEXTS[start : start + 4], ["a", "b", "a", "b"])
    write(tmp_path / "dev.jsonl", TEXTS, ["a", "b"] * 4)
    write(tmp_path / "test" / "one.jsonl", TEXTS[:2], ["b", "a"])
    splits = rows(tmp_path)
    assert (list(splits["test"].first), list(splits["test"].labels)) == (TEXTS[:2], [1, 0])
    assert "test is scored once, at the end" in task(tmp_path).dataset.about
    write(tmp_path / "test" / "one.jsonl", TEXTS[:2], [None, None])
    assert set(rows(tmp_path)) == {"train", "dev"}
    assert "test has no labels" in task(tmp_path).dataset.about
    recipe = build_recipe("default", {"task": "local", "data": str(tmp_path), "test_share": 0.1})
    with pytest.raises(DataError, match="not for rows in several files"):
        find_task(recipe)
