"""Rows with several labels: every file format gives the same rows, and invalid labels are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from spdtool.data.dataset import Dataset, find_dataset
from spdtool.data.kinds.label_sets import find_joined_classes
from spdtool.data.local import check_header
from spdtool.data.overview import contradicting_rows
from spdtool.data.splits import draw_dev_rows
from spdtool.errors import DataError, RecipeError
from spdtool.recipe.fields import Recipe
from spdtool.tasks.prepare import find_task

NAMES = ("anger", "joy", "fear")
SETS = [["joy"], ["anger", "fear"], ["fear"], ["joy", "anger"], ["anger"], ["joy", "fear"]] * 5
EXPECTED = np.array([[name in names for name in NAMES] for names in SETS], np.uint8)


def recipe(data: Path, **fields: Any) -> Recipe:
    return Recipe(task="local", data=str(data), **fields)


def described(data: Path, **fields: Any) -> Dataset:
    check_header(recipe(data, **fields))
    return find_dataset(recipe(data, **fields))


def labels(dataset: Dataset) -> np.ndarray:
    """Return the labels of all rows, in the order of their texts."""
    splits = dataset.load(None, 0)
    numbered = []
    for split in splits.values():
        for text, row in zip(split.first, np.asarray(split.labels), strict=True):
            numbered.append((int(text.split()[1]), row))
    return np.array([row for _, row in sorted(numbered, key=lambda entry: entry[0])])


def write_jsonl(file: Path, cells: list[Any]) -> Path:
    file.write_text("".join(json.dumps({"text": f"row {i}", "label": cell}) + "\n" for i, cell in enumerate(cells)))
    return file


def write_tsv(file: Path, columns: dict[str, list[Any]]) -> Path:
    rows = [["text", *columns], *([f"row {i}", *cells] for i, cells in enumerate(zip(*columns.values(), strict=True)))]
    file.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    return file


def test_every_way_of_writing_several_labels_gives_the_same_rows(tmp_path: Path) -> None:
    numbers = [[NAMES.index(name) for name in names] for names in SETS]
    named_folder = tmp_path / "named"
    named_folder.mkdir()
    (named_folder / "labels.txt").write_text("\n".join(NAMES) + "\n")
    switches = {name: EXPECTED[:, index].tolist() for index, name in enumerate(NAMES)}
    features = {"label": {"feature": {"names": list(NAMES), "_type": "ClassLabel"}, "_type": "Sequence"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"text": [f"row {i}" for i in range(len(SETS))], "label": numbers})
    parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / "mine.parquet")
    cases: dict[str, tuple[Path, dict[str, Any], bool]] = {
        "lists of names": (write_jsonl(tmp_path / "mine.jsonl", SETS), {}, False),
        "lists of numbers": (write_jsonl(named_folder / "lists.jsonl", numbers), {}, True),
        "lists of numbers with a schema": (tmp_path / "mine.parquet", {}, True),
        "commas": (
            write_tsv(named_folder / "mine.tsv", {"label": [",".join(map(str, row)) for row in numbers]}),
            {},
            True,
        ),
        "names with commas": (
            write_tsv(tmp_path / "mine.tsv", {"label": [", ".join(names) for names in SETS]}),
            {"multilabel": True},
            False,
        ),
        "switches": (write_tsv(tmp_path / "switches.tsv", switches), {"multilabel": True}, True),
        "named switches": (tmp_path / "switches.tsv", {"label": ",".join(NAMES)}, True),
    }
    for case, (data, fields, is_ordered) in cases.items():
        dataset = described(data, **fields)
        assert (dataset.kind, dataset.metrics) == ("multilabel", ("f1_micro", "f1_macro", "map")), case
        assert dataset.labels == (NAMES if is_ordered else tuple(sorted(NAMES))), case
        order = [NAMES.index(name) for name in dataset.labels]
        assert np.array_equal(labels(dataset), EXPECTED[:, order]), case
        assert "a row may have several labels" in dataset.about, case


def test_several_labels_a_row_are_never_guessed(tmp_path: Path) -> None:
    commas = write_tsv(tmp_path / "mine.tsv", {"label": ["a,b", "c"] * 15})
    assert described(commas).labels == ("a,b", "c")
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    assert described(commas).kind == "multilabel"
    assert "--set multilabel=false" in described(commas).about
    assert described(commas, multilabel=False).labels == ("a,b", "c")
    (tmp_path / "labels.txt").write_text("a,b\nc\n")
    assert described(commas).labels == ("a,b", "c"), "a name may hold a comma"
    switches = write_tsv(tmp_path / "switches.tsv", {name: [0, 1] * 15 for name in "xyz"})
    with pytest.raises(DataError, match="zeros and ones in 'x', 'y', 'z'") as error:
        described(switches)
    assert "--set multilabel=true" in str(error.value.hint)


def test_rows_without_any_label_are_written_as_empty_lists(tmp_path: Path) -> None:
    dataset = described(write_jsonl(tmp_path / "mine.jsonl", [[], *SETS]))
    assert labels(dataset)[0].tolist() == [0, 0, 0]


def test_invalid_labels_are_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("a\nb\n")
    cases: dict[str, tuple[list[Any], str]] = {
        "number": ([[0], [1, 2]], "line 2: the label '2' is neither one of the 2 names nor a number below 2"),
        "digits": ([[0], ["1" * 5000]], "is neither one of the 2 names nor a number below 2"),
        "name": ([["a"], ["c"]], "line 2: the label 'c' is neither"),
        "nothing": ([["a"], None], "line 2: no label: None"),
        "empty": ([["a"], [""]], "line 2: no label: ''"),
        "nested": ([["a"], [["b"]]], "line 2: the label is a list"),
        "object": ([["a"], [{"b": 1}]], "line 2: the label is a dict"),
    }
    for case, (cells, problem) in cases.items():
        data = write_jsonl(tmp_path / "mine.jsonl", cells * 10)
        with pytest.raises(DataError) as error:
            labels(described(data))
        assert problem in error.value.message, case
    for content, problem in (("a\n\nb\n", "line 2: no name"), ("a\na\n", "line 2: 'a' is there already")):
        (tmp_path / "labels.txt").write_text(content)
        with pytest.raises(DataError, match=problem):
            described(write_jsonl(tmp_path / "mine.jsonl", SETS))
    (tmp_path / "labels.txt").unlink()
    switches = write_tsv(tmp_path / "switches.tsv", {"x": [0, 1] * 15, "y": [0, 2] * 15})
    with pytest.raises(DataError, match="line 3: the column 'y' holds '2'"):
        labels(described(switches, label="x,y"))


def test_settings_that_contradict_the_rows_are_refused(tmp_path: Path) -> None:
    lists = write_jsonl(tmp_path / "mine.jsonl", SETS)
    with pytest.raises(DataError, match="line 1: the label is a list, and the recipe says multilabel=false"):
        described(lists, multilabel=False)
    with pytest.raises(DataError, match="regression=true"):
        described(lists, regression=True)
    with pytest.raises(RecipeError, match="knows its own columns"):
        find_dataset(Recipe(task="demo", multilabel=True))


def test_a_dev_label_that_no_training_row_has_is_refused_unless_a_file_names_it(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", SETS)
    write_jsonl(tmp_path / "dev.jsonl", [["joy"], ["awe"]])
    with pytest.raises(DataError, match="line 2: the label 'awe' is in no training row"):
        described(tmp_path).load(None, 0)
    (tmp_path / "labels.txt").write_text("\n".join([*NAMES, "awe"]))
    assert described(tmp_path).load(None, 0)["dev"].labels[1].tolist() == [0, 0, 0, 1]  # type: ignore[index,union-attr]


def test_a_rare_label_is_on_both_sides_of_the_drawn_dev_set(tmp_path: Path) -> None:
    sets = [["common"] + (["rare"] if i % 50 == 0 else []) for i in range(200)] + [["other"]] * 20
    rows = described(write_jsonl(tmp_path / "mine.jsonl", sets)).load(None, 0)
    for split in ("train", "dev"):
        assert (np.asarray(rows[split].labels).sum(axis=0) > 0).all(), split
    assert draw_dev_rows(rows["train"], 0, 0.1)["dev"].first


def test_rows_of_several_labels_in_several_files_are_those_of_one(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    further = [["late"], ["late", *SETS[0]], []]
    write_jsonl(tmp_path / "one/train.jsonl", [*SETS, *further])
    write_jsonl(tmp_path / "two/train-0.jsonl", SETS)
    write_jsonl(tmp_path / "two/train-1.jsonl", further)  # a label that the first file does not have
    datasets = []
    for name in ("one", "two"):
        write_jsonl(tmp_path / name / "dev.jsonl", SETS)
        datasets.append(described(tmp_path / name))
    joined, sharded = datasets
    assert "late" in sharded.labels
    assert (sharded.labels, sharded.kind) == (joined.labels, joined.kind)
    for split, rows in joined.load(None, 0).items():
        assert np.array_equal(sharded.load(None, 0)[split].labels, rows.labels)


def test_lists_with_a_zero_or_one_for_each_label_are_no_names(tmp_path: Path) -> None:
    for zero, one in ((0, 1), (0.0, 1.0), (False, True)):
        vectors = [[one, zero, zero], [zero, one, one], [zero, zero, zero], [one, one, zero]]
        write_jsonl(tmp_path / "train.jsonl", vectors)
        write_jsonl(tmp_path / "dev.jsonl", vectors[:1])
        dataset = described(tmp_path)
        assert dataset.labels == ("0", "1", "2")
        assert "holds a 0 or 1 for each label" in dataset.about
        assert np.array_equal(dataset.load(None, 0)["train"].labels, np.array(vectors, np.uint8))
    (tmp_path / "labels.txt").write_text("joy\nfear\nrage\n", "utf-8")
    assert described(tmp_path).labels == ("joy", "fear", "rage")
    write_jsonl(tmp_path / "dev.jsonl", [[1, 0]])
    with pytest.raises(DataError, match="line 1: the column 'label' holds \\[1, 0\\]"):
        described(tmp_path).load(None, 0)


def test_what_is_no_label_in_a_list_is_refused(tmp_path: Path) -> None:
    good = [["joy"], ["joy", "fear"], []]
    for cell, message in (
        ({"joy": 1}, "line 4: the label is an object"),
        ([0.5, 0.1], "line 4: the list of labels holds 0.5"),
        (["\ud800"], "line 4: the label .* holds half a surrogate pair"),
        (["O", "B-PER"], "the lists in 'label' are tags of words"),
    ):
        write_jsonl(tmp_path / "train.jsonl", [*good, cell])
        with pytest.raises(DataError, match=message):
            described(tmp_path / "train.jsonl").load(None, 0)


def test_a_column_of_zeros_and_ones_with_one_other_cell_is_not_left_out(tmp_path: Path) -> None:
    file = tmp_path / "train.csv"
    rows = "".join(f"t{row},{('TRUE', 'false')[row % 2]},{row // 2 % 2}.0\n" for row in range(8))
    file.write_text(f"text,joy,fear\n{rows}", "utf-8")
    assert described(file, multilabel=True).labels == ("joy", "fear")
    for cell in ("0.5", "", "2"):
        file.write_text(f"text,joy,fear\n{rows}t,1,{cell}\n", "utf-8")
        with pytest.raises(DataError, match=f"line 10: the column 'fear' holds '{cell}'"):
            described(file, multilabel=True)


def test_labels_of_a_cell_are_parted_by_the_sign_that_most_cells_have(tmp_path: Path) -> None:
    for separator, name in ((",", "commas"), (", ", "commas"), ("|", "vertical bars"), (" ; ", "semicolons"),
                            (" ", "spaces")):  # fmt: skip
        file = write_tsv(tmp_path / "rows.tsv", {"label": [separator.join(names) for names in SETS]})
        dataset = described(file, multilabel=True)
        assert dataset.labels == tuple(sorted(NAMES)), separator
        assert f"parted by {name}" in dataset.about
        (tmp_path / "labels.txt").write_text("\n".join(NAMES) + "\n")
        assert (labels(described(file)) == EXPECTED).all()  # by itself
        (tmp_path / "labels.txt").unlink()
    write_tsv(tmp_path / "rows.tsv", {"label": ["New York", "New Jersey", "Rome"] * 9})
    assert described(tmp_path / "rows.tsv", multilabel=True).labels == ("New Jersey", "New York", "Rome")


def test_classes_that_look_like_several_labels_are_named(tmp_path: Path) -> None:
    for separator in (",", "|", "; "):
        file = write_tsv(tmp_path / "rows.tsv", {"label": [separator.join(names) for names in SETS]})
        task = find_task(recipe(file))
        warnings = task.data_warnings(task.read_rows(recipe(file)))
        assert any("looks like several labels: if it is, --set multilabel=true" in line for line in warnings)
    for classes in (("a, b", "c"), ("New York", "New Jersey"), ("a/b", "a"), ("x,", ",x"), ("1,5", "2")):
        assert find_joined_classes(classes) is None, classes


def test_rows_that_never_have_several_labels_are_named(tmp_path: Path) -> None:
    file = write_tsv(tmp_path / "rows.tsv", {"label": ["/".join(names) for names in SETS]})
    task = find_task(recipe(file, multilabel=True))
    warnings = task.data_warnings(task.read_rows(recipe(file, multilabel=True)))
    assert any("no training row has more than one label" in line for line in warnings)


def test_texts_with_other_labels_elsewhere_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    lines = [{"text": f"row {number % 20}", "label": SETS[number // 20]} for number in range(40)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = find_task(recipe(file)).read_rows(recipe(file))
    assert f"{len(rows['train'])} of {len(rows['train'])} training rows" in contradicting_rows(rows["train"])[0]
    assert contradicting_rows(rows["train"].select(range(1))) == []
