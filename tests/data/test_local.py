"""Tasks from a user's files: every format gives the same rows, and every defect is named by file and line."""

from __future__ import annotations

import bz2
import gzip
import json
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from spdtool.data.dataset import Dataset, Rows, find_dataset
from spdtool.data.splits import draw_dev_rows
from spdtool.errors import DataError, RecipeError
from spdtool.recipe.fields import Recipe
from spdtool.tasks.prepare import find_task
from spdtool.tasks.scores.metrics import METRICS

Records = list[dict[str, Any]]
FORMATS = ("csv", "tsv", "jsonl", "parquet")
PLAIN: Records = [{"text": f"row {i}", "label": "yes" if i % 3 else "no"} for i in range(40)]


def make(path: Path, records: Records) -> Path:
    """Write `records` in the format of the suffix of `path`."""
    columns = list(records[0])
    ending = path.suffix.removeprefix(".")
    if ending == "parquet":
        parquet.write_table(pa.Table.from_pylist(records), path)
    elif ending == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif ending == "tsv":
        path.write_text("\n".join("\t".join(map(str, row)) for row in [columns, *(r.values() for r in records)]))
    else:
        quoted = [[str(cell).replace('"', '""') for cell in row] for row in [columns, *(r.values() for r in records)]]
        path.write_text("".join(",".join(f'"{cell}"' for cell in row) + "\r\n" for row in quoted), newline="")
    return path


def local(data: Path, text: tuple[str, ...] = (), label: str | None = None, seed: int = 0) -> Dataset:
    return find_dataset(Recipe(task="local", data=str(data), text=text, label=label, seed=seed))


def rows(data: Path, seed: int = 0, **columns: Any) -> dict[str, Rows]:
    return local(data, **columns).load(str(data), seed)


def texts(split: Rows) -> list[str]:
    return [*split.first]


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_gives_the_same_rows(ending: str, tmp_path: Path) -> None:
    task = local(make(tmp_path / f"mine.{ending}", PLAIN))
    splits = task.load(None, 0)
    assert (task.name, task.text, task.labels, task.metrics) == ("local", ("text",), ("no", "yes"), ("accuracy", "f1"))
    assert task.kind == "classification"
    together = Counter(pair for split in splits.values() for pair in zip(split.first, split.labels, strict=True))
    assert together == Counter((record["text"], int(record["label"] == "yes")) for record in PLAIN)
    assert splits["train"].second is None
    assert splits == rows(make(tmp_path / "twin.csv", PLAIN))


@pytest.mark.parametrize("ending", FORMATS)
def test_a_folder_keeps_its_own_dev_and_test_sets(ending: str, tmp_path: Path) -> None:
    pair = [{"first": "a", "second": "b", "score": 0.5}, {"first": "c", "second": "d", "score": 2.0}]
    make(tmp_path / f"train.{ending}", pair)
    make(tmp_path / f"validation.{ending}", pair[1:])
    make(tmp_path / f"test.{ending}", pair[:1])
    task = local(tmp_path, text=("second", "first"), label="score")
    assert task.kind == "regression"
    assert task.metrics == ("pearson", "spearman")
    assert task.load(str(tmp_path), 7) == {
        "train": Rows(["b", "d"], ["a", "c"], [0.5, 2.0]),
        "dev": Rows(["d"], ["c"], [2.0]),
        "test": Rows(["b"], ["a"], [0.5]),
    }
    assert f"test.{ending} is scored once, at the end" in task.about


def test_a_test_file_without_labels_is_ignored_and_reported(tmp_path: Path) -> None:
    make(tmp_path / "train.jsonl", PLAIN)
    for unlabeled in ({"text": "a"}, {"text": "a", "label": -1}, {"text": "a", "label": None}):
        make(tmp_path / "test.jsonl", [unlabeled])
        task = local(tmp_path)
        assert set(task.load(None, 0)) == {"train", "dev"}, unlabeled
        assert "test.jsonl has no labels: `spdtool predict` gives it some" in task.about, unlabeled
    make(tmp_path / "test.jsonl", [{"text": "a", "label": "yes"}, {"text": "b", "label": None}])
    with pytest.raises(DataError, match=r"test\.jsonl, line 2: no label"):
        rows(tmp_path)


def test_a_test_share_is_taken_of_each_class_before_the_dev_rows_are_drawn(tmp_path: Path) -> None:
    records = [{"text": f"row {i % 280}", "label": "ab"[i % 280 > 200]} for i in range(300)]
    data = make(tmp_path / "mine.jsonl", records)
    recipe = Recipe(task="local", data=str(data), test_share=0.25)
    splits = find_task(recipe).read_rows(recipe)
    texts_by_split = {name: set(split.first) for name, split in splits.items()}
    assert texts_by_split.keys() == {"train", "dev", "test"}
    assert not texts_by_split["test"] & (texts_by_split["train"] | texts_by_split["dev"])
    assert sum(map(len, splits.values())) == 300
    texts_by_class = {
        label: len({t for t, k in zip(splits["test"].first, splits["test"].labels, strict=True) if k == label})
        for label in (0, 1)
    }
    assert texts_by_class == {0: 50, 1: 20}
    assert find_task(recipe).read_rows(recipe) == splits
    assert len(splits["dev"]) > 10, "the draws of test and dev have nothing to do with each other"
    other_recipe = recipe.model_copy(update={"seed": 1})
    assert find_task(other_recipe).read_rows(other_recipe)["test"] != splits["test"]


def test_a_test_share_beside_a_test_file_is_refused(tmp_path: Path) -> None:
    for name in ("train", "test"):
        make(tmp_path / f"{name}.csv", PLAIN)
    with pytest.raises(DataError, match="the data have the test rows"):
        find_dataset(Recipe(task="local", data=str(tmp_path), test_share=0.1))


def test_a_folder_without_a_dev_set_is_split_like_a_file(tmp_path: Path) -> None:
    single_file = make(tmp_path / "mine.csv", PLAIN)
    (tmp_path / "folder").mkdir()
    make(tmp_path / "folder" / "train-00000-of-00001.parquet", PLAIN)
    assert rows(tmp_path / "folder") == rows(single_file)


def test_the_drawn_dev_set_is_about_a_tenth_of_each_class_and_depends_on_the_seed(tmp_path: Path) -> None:
    records = [{"text": f"row {i}", "label": "abc"[(i > 200) + (i > 290)]} for i in range(300)]
    data = make(tmp_path / "mine.jsonl", records)
    splits = rows(data, seed=3)
    shares = {label: count / (201, 90, 9)[label] for label, count in Counter(splits["dev"].labels).items()}
    assert shares == {label: pytest.approx(0.1, abs=0.035) for label in range(3)}
    assert not set(splits["train"].first) & set(splits["dev"].first)
    assert len(splits["train"]) + len(splits["dev"]) == 300
    numbers = [int(text.split()[1]) for text in splits["train"].first]
    assert numbers == sorted(numbers)
    assert rows(data, seed=3) == splits
    assert rows(data, seed=4) != splits


def test_a_class_of_one_row_stays_in_train(tmp_path: Path) -> None:
    splits = rows(make(tmp_path / "mine.csv", [*PLAIN, {"text": "rare", "label": "maybe"}]))
    assert "rare" in splits["train"].first
    assert 0 not in splits["dev"].labels


def side_of(splits: dict[str, Rows]) -> dict[tuple[str, ...], str]:
    return {
        pair: name
        for name, split in splits.items()
        for pair in zip(split.first, split.second or split.first, strict=True)
    }


@pytest.mark.parametrize("pairs", [False, True])
def test_adding_or_removing_a_row_moves_no_other_row(pairs: bool) -> None:
    texts = [f"row {i}" for i in range(1000)]
    rows = Rows(texts, texts[::-1] if pairs else None, [i % 2 for i in range(1000)])
    before = side_of(draw_dev_rows(rows, 0, 0.1))
    for row_numbers in ([*range(1, 1000)], [*range(500), *range(501, 1000)], [999, *range(999)]):
        after = side_of(draw_dev_rows(rows.select(row_numbers), 0, 0.1))
        assert all(before[pair] == split for pair, split in after.items())
    assert side_of(draw_dev_rows(rows, 1, 0.1)) != before


def test_equal_texts_stay_on_one_side_whatever_their_labels() -> None:
    rows = Rows([f"row {i % 60}" for i in range(600)], None, [i // 60 % 2 for i in range(600)])
    for seed in range(20):
        splits = draw_dev_rows(rows, seed, 0.1)
        assert not set(splits["train"].first) & set(splits["dev"].first)


def test_every_class_of_two_texts_is_on_both_sides_and_dev_keeps_its_share() -> None:
    labels = [i for i in range(50) for _ in range(i + 1)]
    rows = Rows([f"row {i}" for i in range(len(labels))], None, labels)
    for seed in range(20):
        splits = draw_dev_rows(rows, seed, 0.1)
        assert set(splits["train"].labels) == set(range(50))
        assert set(splits["dev"].labels) == set(range(1, 50))
        assert 0.08 < len(splits["dev"]) / len(rows) < 0.14


def test_a_regression_draws_its_dev_set_from_all_rows(tmp_path: Path) -> None:
    splits = rows(make(tmp_path / "mine.tsv", [{"text": f"row {i}", "label": i / 7} for i in range(50)]))
    assert 4 <= len(splits["dev"]) <= 8
    assert set(splits["train"].labels) | set(splits["dev"].labels) == {float(str(i / 7)) for i in range(50)}


def test_labels_decide_between_classes_and_regression(tmp_path: Path) -> None:
    cases: list[Any] = [
        ([10, 9, 100], ("9", "10", "100"), ("accuracy", "f1_macro")),
        (["10", "9", "b"], ("10", "9", "b"), ("accuracy", "f1_macro")),
        ([1.0, 0.0, 1], ("0", "1"), ("accuracy", "f1")),
        ([-1, 1, -1], ("-1", "1"), ("accuracy", "f1")),
        (["1", "01", "1"], ("01", "1"), ("accuracy", "f1")),
        ([True, False, True], ("False", "True"), ("accuracy", "f1")),
        (["pos", "neg", "neg"], ("neg", "pos"), ("accuracy", "f1")),
        ([1, 2.5, 3], (), ("pearson", "spearman")),
        (["1e-3", ".5", "2"], (), ("pearson", "spearman")),
        ([0.5, 1.5, "n/a", "bad", "good"], ("0.5", "1.5", "bad", "good", "n/a"), ("accuracy", "f1_macro")),
        (["10000000000000000000001", "10000000000000000000002"], None, ("accuracy", "f1")),
    ]
    for number, (labels, classes, metrics) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        records = [{"text": f"row {i}", "label": label} for i, label in enumerate(labels * 3)]
        task = local(make(folder / "mine.jsonl", records))
        assert task.labels == (tuple(labels) if classes is None else classes), labels
        assert task.metrics == metrics, labels
        assert set(metrics) <= METRICS.keys()
        splits = task.load(None, 0)
        for split in splits.values():
            for text, label in zip(split.first, split.labels, strict=True):
                written = labels[int(text.split()[1]) % len(labels)]
                if task.labels:
                    assert task.labels[int(label)] == str(written).removesuffix(".0"), labels
                else:
                    assert label == float(written), labels


def test_columns_are_guessed_where_only_one_reading_is_possible(tmp_path: Path) -> None:
    cases: list[Any] = [
        (["id", "sentence", "label"], ("sentence",), "label"),
        (["text", "target"], ("text",), "target"),
        (["sentence2", "labels", "sentence1", "idx"], ("sentence1", "sentence2"), "labels"),
        (["question", "sentence", "label"], ("question", "sentence"), "label"),
        (["premise", "hypothesis", "label", "genre"], ("premise", "hypothesis"), "label"),
        (["review body", "label"], ("review body",), "label"),
    ]
    for number, (columns, text, label) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        records = [{name: f"{name} {i % 2}" for name in columns} for i in range(8)]
        task = local(make(folder / "mine.csv", records))
        assert task.text == text, columns
        assert task.labels == (f"{label} 0", f"{label} 1"), columns


def test_ambiguous_columns_are_refused(tmp_path: Path) -> None:
    cases: list[Any] = [
        (["text", "label", "target"], {}, "more than one column that is clearly the label", "--label"),
        (["text", "stars"], {}, "no column that is clearly the label; it has 'text', 'stars'", "--label"),
        (["text", "sentence", "label"], {}, "leaves open which column is the text; it has 'text', 'sen", "--text"),
        (["title", "body", "label"], {}, "leaves open which column is the text; it has 'title', 'body'", "--text"),
        (["sentence1", "sentence2", "text", "label"], {}, "leaves open which column is the text", "--text"),
        (["sentence", "label"], {"text": ("sentense",)}, "no column 'sentense'; it has 'sentence'", "'sentence'"),
        (["sentence", "label"], {"label": "lable"}, "no column 'lable'", "did you mean 'label'?"),
        (["sentence;label"], {"label": "label"}, "no column 'label'; it has 'sentence;label'", "separated"),
        (["text", "label"], {"text": ("text", "text")}, "names the column 'text' twice", "two columns"),
        (["text", "label"], {"text": ("label",), "label": "label"}, "named as text and as label", "the answer"),
        (["text", "label"], {"text": ("label",)}, "no column that is clearly the label", "--label"),
        (["a", "b", "c", "label"], {"text": ("a", "b", "c")}, "names 3 columns: a, b, c", "pair"),
    ]
    for number, (columns, options, problem, hint) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        data = make(folder / "mine.csv", [{name: f"{name} {i % 2}" for name in columns} for i in range(8)])
        with pytest.raises(DataError) as error:
            local(data, **options)
        assert problem in error.value.message
        assert hint in str(error.value.hint), columns


def test_csv_is_quoted_and_tsv_is_not(tmp_path: Path) -> None:
    comma, tab = tmp_path / "mine.csv", tmp_path / "mine.tsv"
    strange_text = 'she said "no\u2028\x85, never"'
    comma.write_bytes(
        ('\ufefftext,label\r\n"a, ""b""\nc",x\r\n\r\n' + f"{strange_text[:8]},y\r\nd,x\r\ne,y\r\n").encode()
    )
    tab.write_bytes(f"\ufefftext\tlabel\r\n\"{strange_text}\tx\r\n'\ty\nd\tx\ne\ty\n".encode())
    splits = rows(comma, text=("text",))
    assert sorted(splits["train"].first + splits["dev"].first) == sorted(['a, "b"\nc', strange_text[:8], "d", "e"])
    splits = rows(tab, text=("text",))
    assert sorted(splits["train"].first + splits["dev"].first) == sorted(['"' + strange_text, "'", "d", "e"])


BAD: dict[str, tuple[str, bytes, str]] = {
    "empty csv": ("csv", b"", "is empty"),
    "blank jsonl": ("jsonl", b"\n \n", "is empty"),
    "header alone": ("csv", b"text,label\n", "has no rows"),
    "header alone, tsv": ("tsv", b"text\tlabel\n", "has no rows"),
    "ragged csv": ("csv", b'text,label\n"a\nb",x\nc\n', "line 4: 1 fields where 2 were expected"),
    "ragged over two lines": ("csv", b'text,label\na,x\n"b\nc"\nd,x\n', "line 3: 1 fields where 2 were expected"),
    "ragged, too long": ("csv", b"text,label\na,x\nb,c,y\n", "line 3: 3 fields where 2 were expected"),
    "ragged tsv": ("tsv", b"text\tlabel\na\tx\nb\n", "line 3: 1 fields where 2 were expected"),
    "open quote": ("csv", b'text,label\na,x\n"b,y\nc,x\n', "row that begins in line 3: unexpected end of data"),
    "text after a quote": ("csv", b'text,label\n"a"b,x\n', "row that begins in line 2: ',' expected after"),
    "not utf-8": ("csv", b"text,label\na,x\ncaf\xe9,y\n", "line 3: byte 0xe9 is not UTF-8"),
    "not utf-8, jsonl": ("jsonl", b'{"text": "caf\xe9", "label": 1}\n', "line 1: byte 0xe9 is not UTF-8"),
    "name twice": ("csv", b"text,label,label\na,x,y\n", "two columns called 'label'"),
    "no text": ("csv", b"text,label\na,x\n  ,y\nb,x\nc,y\n", "line 3: no text in the column 'text'"),
    "no label": ("csv", b"text,label\na,x\nb,\nc,y\n", "line 3: no label"),
    "null text": ("jsonl", b'{"text": "a", "label": 1}\n{"text": null, "label": 0}\n', "line 2: no text in the column"),
    "absent text": ("jsonl", b'{"text": "a", "label": 1}\n\n{"label": 0}\n', "line 3: no text in the column"),
    "absent label": ("jsonl", b'{"text": "a", "label": 1}\n{"text": "b"}\n', "line 2: no label"),
    "nan label": ("jsonl", b'{"text": "a", "label": 0.5}\n{"text": "b", "label": NaN}\n', "line 2: no label: nan"),
    "infinite label": ("jsonl", b'{"text": "a", "label": 0.5}\n{"text": "b", "label": Infinity}\n', "line 2: no label"),
    "list as label": ("jsonl", b'{"text": "a", "label": [1]}\n', "has 1 label"),
    "number as text": (
        "jsonl",
        b'{"text": 7, "label": 1}\n{"text": 8, "label": 0}\n',
        "line 1: the column 'text' holds",
    ),
    "half a character": (
        "jsonl",
        b'{"text": "a", "label": 1}\n{"text": "\\ud83d", "label": 0}\n',
        "line 2: the column 'text' holds half a surrogate pair",
    ),
    "no json": ("jsonl", b'{"text": "a", "label": 1}\n{"text": \n', "line 2: not JSON"),
    "an array": ("jsonl", b'[{"text": "a", "label": 1}]\n', "line 1: a list, not an object"),
    "deep json": ("jsonl", b"[" * 200_000 + b"\n", "line 1: not JSON"),
    "no parquet": ("parquet", b"text,label\na,x\n", "is not a readable parquet file"),
    "empty parquet": ("parquet", b"", "is not a readable parquet file"),
    "one class": ("csv", b"text,label\na,x\nb,x\n", "every label in"),
    "no number": (
        "csv",
        b"text,label\na,0.5\nb,1.5\nc,inf\nd,2.5\n",
        "line 4: the label 'inf' is not a number, and 3 of",
    ),
    "no number among whole ones": ("csv", b"text,label\na,1\nb,2\nc,3\nd,?\n", "line 5: the label '?' is not a number"),
    "utf-16": ("csv", "text,label\na,x\nb,y\n".encode("utf-16"), "is UTF-16, not UTF-8"),
    "utf-16 without a mark": ("csv", "text,label\na,x\nb,y\n".encode("utf-16-le"), "is UTF-16, not UTF-8"),
    "utf-16, the other one": ("jsonl", '{"text": "a", "label": 1}\n'.encode("utf-16-be"), "is UTF-16, not UTF-8"),
    "utf-32": ("csv", "text,label\na,x\nb,y\n".encode("utf-32"), "is UTF-32, not UTF-8"),
    "a workbook": ("csv", b"PK\x03\x04\x14\x00\x06\x00\x08\x00", "is a zip archive or a workbook"),
    "an old workbook": ("tsv", bytes.fromhex("d0cf11e0a1b11ae1") + bytes(100), "is an old workbook"),
    "gzip": ("csv", gzip.compress(b"text,label\na,x\n"), "is compressed by gzip, not the .csv that its name says"),
    "bzip2": ("jsonl", bz2.compress(b"{}"), "is compressed by bzip2"),
    "parquet as csv": ("csv", b"PAR1\x15\x04\x15\x10" + bytes(40) + b"PAR1", "is a parquet file, not the .csv"),
    "gzip by its name": ("csv.gz", b"", "ends in '.gz'"),
    "one text": ("csv", b"text,label\n" + b"a,x\na,y\n" * 20, "40 rows (all have the same text) are too few"),
    "cells": ("json", b'{"columns": ["text", "label"], "data": [["a", "x"], ["b", "y"]]}', "holds lists of cells"),
    "no names": ("csv", b"good film,pos\nbad film,neg\nok,pos\n", "no column that is clearly the label"),
    "one number": ("csv", b"text,label\na,0.5\nb,0.5\n", "every label in"),
    "an id as label": ("csv", b"text,label\na,1\nb,2\nc,3\nd,4\n", "4 different labels in 4 rows"),
    "two rows": ("csv", b"text,label\na,1\nb,2\n", "2 rows are too few"),
    "unknown ending": ("xlsx", b"PK", "ends in '.xlsx'"),
    "plain json": ("json", b"[]", "has no rows"),
}


HINTS = {
    "another encoding": ("my data.csv", b"text,label\ncaf\xe9,x\n", "'/my data.csv' > '/my data-utf8.csv'"),
    "UTF-16": ("a.csv", "text,label\na,x\n".encode("utf-16"), "iconv -f utf-16 -t utf-8 /a.csv > /a-utf8.csv"),
    "a list": ("a.jsonl", b'[\n{"text": "a", "label": 1}\n]\n', "name the file .json"),
    "a list in a line": ("a.jsonl", b'[{"text": "a", "label": 1}]\n', "name the file .json"),
    "pandas": ("a.json", b'{"text": {"0": "a"}, "label": {"0": "x"}}', "orient='records'"),
    "no names": ("a.csv", b"good film,pos\nbad film,neg\nok,pos\n", "write a line of names above it"),
    "gzip": ("a.csv.gz", b"\x1f\x8b", "decompress it first"),
    "a workbook": ("a.xlsx", b"PK", "save it as csv first"),
    "no ending": ("rows", b"text,label\na,x\n", "known endings: .csv"),
}


def test_a_hint_says_what_to_type(tmp_path: Path) -> None:
    for case, (name, content, hint) in HINTS.items():
        data = tmp_path / name
        data.write_bytes(content)
        with pytest.raises(DataError) as caught:
            rows(data)
        assert caught.value.hint is not None, case
        assert hint in caught.value.hint.replace(str(tmp_path), ""), (case, caught.value.hint)


def test_a_broken_file_is_refused_by_name_and_line(tmp_path: Path) -> None:
    for case, (ending, content, problem) in BAD.items():
        data = tmp_path / f"mine.{ending}"
        data.write_bytes(content)
        with pytest.raises(DataError) as error:
            rows(data)
        assert problem in error.value.message, case
        assert error.value.exit_code == 2, case
        if case not in ("two rows", "one text"):
            assert str(data) in error.value.message, case


def test_decimal_numbers_and_bytes_of_parquet_are_read_as_numbers_and_text(tmp_path: Path) -> None:
    numbers = [Decimal(row % 3) for row in range(40)]
    table = pa.table({"text": pa.array([f"row {row}".encode() for row in range(40)]), "label": pa.array(numbers)})
    assert table.schema.field("text").type == pa.binary()
    parquet.write_table(table, tmp_path / "mine.parquet")
    assert local(tmp_path / "mine.parquet").labels == ("0", "1", "2")
    assert texts(rows(tmp_path / "mine.parquet")["train"])[0].startswith("row ")
    halves = [number / 2 for number in numbers]
    parquet.write_table(table.set_column(1, "label", pa.array(halves)), tmp_path / "mine.parquet")
    assert local(tmp_path / "mine.parquet").kind == "regression"


def test_a_label_of_thousands_of_digits_is_a_name(tmp_path: Path) -> None:
    digits = "1" * 5000
    records = [{"text": f"row {i}", "label": digits if i % 2 else "2"} for i in range(20)]
    for ending in ("csv", "tsv", "jsonl", "parquet"):
        assert local(make(tmp_path / f"mine.{ending}", records)).labels == (digits, "2"), ending
    quoted = tmp_path / "quoted.tsv"
    quoted.write_text("text\tlabel\n" + "".join(f'"row {i}"\t{digits if i % 2 else 2}\n' for i in range(20)))
    assert local(quoted).labels == (digits, "2")


def test_a_message_quotes_only_the_ends_of_a_long_cell(tmp_path: Path) -> None:
    make(tmp_path / "train.jsonl", PLAIN)
    make(tmp_path / "dev.jsonl", [{"text": "a", "label": "x" * 100_000}])
    with pytest.raises(DataError, match=r"line 1: the label 'xxx.* … x*' is in no training row") as error:
        rows(tmp_path)
    assert len(str(error.value)) < 1100


def test_the_known_endings_are_listed_and_capitals_do_not_matter(tmp_path: Path) -> None:
    known = "known endings: .csv, .tsv, .jsonl, .parquet, .arrow, .json, .conll, .bio, .iob"
    for ending, further in (("xlsx", "save it as csv first"), ("txt", "add --teacher, a sentence encoder's folder")):
        (tmp_path / f"mine.{ending}").write_text("text")
        with pytest.raises(DataError) as error:
            rows(tmp_path / f"mine.{ending}")
        hint = error.value.hint or ""
        assert known in hint, ending
        assert further in hint, ending
    assert len(rows(make(tmp_path / "mine.csv", PLAIN).rename(tmp_path / "MINE.CSV"))["train"]) > 30


def test_a_dev_file_that_does_not_fit_train_is_refused(tmp_path: Path) -> None:
    cases: list[Any] = [
        (
            [{"text": "a", "label": "yes"}, {"text": "b", "label": "maybe"}],
            "line 3: the label 'maybe' is in no training",
        ),
        ([{"sentence": "a", "label": "yes"}], "has no column 'text'; it has 'sentence', 'label'"),
        ([{"text": "a", "label": ""}], "line 2: no label"),
    ]
    for number, (dev, problem) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder / "train.csv", PLAIN)
        file = make(folder / "valid.csv", dev)
        with pytest.raises(DataError) as error:
            rows(folder)
        assert problem in error.value.message
        assert str(file) in error.value.message


def test_a_dev_label_of_a_regression_must_be_a_number(tmp_path: Path) -> None:
    make(tmp_path / "train.tsv", [{"text": f"row {i}", "label": i / 2} for i in range(9)])
    make(tmp_path / "dev.tsv", [{"text": "a", "label": 1.5}, {"text": "b", "label": "high"}])
    with pytest.raises(DataError, match="line 3: the label 'high' is not a number"):
        rows(tmp_path)


def test_a_folder_with_no_or_two_files_of_a_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no training rows: looked for train\.csv, .* found nothing"):
        rows(tmp_path)
    make(tmp_path / "train.csv", PLAIN)
    make(tmp_path / "dev.csv", PLAIN)
    make(tmp_path / "validation.jsonl", PLAIN)
    with pytest.raises(DataError, match=r"has dev\.csv and validation\.jsonl"):
        rows(tmp_path)


def test_a_folder_may_have_a_file_or_a_folder_for_each_split(tmp_path: Path) -> None:
    layouts = ("{}.csv", "{}/mine.csv", "{}-00000-of-00001.csv")
    for name in ("dev", "validation", "valid", "val", "eval"):
        for number, layout in enumerate(layouts):
            folder = tmp_path / f"{name}-{number}"
            for split, records in (("train", PLAIN), (name, PLAIN[:7])):
                file = folder / layout.format(split)
                file.parent.mkdir(parents=True, exist_ok=True)
                make(file, records)
            sizes = {split: len(split_rows) for split, split_rows in rows(folder).items()}
            assert sizes == {"train": 40, "dev": 7}, layout.format(name)
            assert "tenth" not in local(folder).about, layout.format(name)


def test_an_evaluation_file_beside_a_dev_set_is_ignored(tmp_path: Path) -> None:
    for name, count in (("train", 40), ("dev", 7), ("eval", 9)):
        make(tmp_path / f"{name}.csv", PLAIN[:count])
    assert len(rows(tmp_path)["dev"]) == 7


def test_files_that_look_like_a_dev_set_are_reported(tmp_path: Path) -> None:
    make(tmp_path / "train.csv", PLAIN)
    make(tmp_path / "evaluation.csv", PLAIN)
    assert "a tenth of its rows is the dev set (left alone: evaluation.csv)" in local(tmp_path).about


def test_regression_is_what_the_recipe_says(tmp_path: Path) -> None:
    stars = make(tmp_path / "stars.csv", [{"text": f"row {i}", "label": i % 5} for i in range(40)])
    halves = make(tmp_path / "halves.csv", [{"text": f"row {i}", "label": i % 5 / 2} for i in range(40)])
    mixed = make(tmp_path / "mixed.csv", [{"text": f"row {i}", "label": i % 5 / 2 or "x"} for i in range(40)])

    def task(data: Path, regression: bool | None) -> Dataset:
        return find_dataset(Recipe(task="local", data=str(data), regression=regression))

    assert (task(stars, None).labels, task(halves, None).labels) == (tuple("01234"), ())
    assert task(stars, True).labels == ()
    assert set(task(stars, True).load(None, 0)["train"].labels) == {0.0, 1.0, 2.0, 3.0, 4.0}
    assert task(halves, False).labels == ("0", "0.5", "1", "1.5", "2")
    assert task(mixed, False).labels == ("0.5", "1", "1.5", "2", "x")
    for regression in (None, True):
        with pytest.raises(DataError, match="line 2: the label 'x' is not a number, and 32 of 40 are"):
            task(mixed, regression)
    with pytest.raises(RecipeError, match="knows its own columns and labels"):
        find_dataset(Recipe(task="cola", regression=True))


def test_a_column_whose_name_holds_a_comma(tmp_path: Path) -> None:
    data = make(tmp_path / "mine.csv", [{"a, b": f"row {i}", "c": "other", "label": i % 2} for i in range(8)])
    assert local(data, text=("a", "b")).text == ("a, b",)
    pair = make(tmp_path / "pair.csv", [{"a,b": "x", "a": "y", "b": f"z{i}", "label": i % 2} for i in range(8)])
    assert local(pair, text=("a", "b")).text == ("a", "b")


def test_columns_without_a_name_are_ignored(tmp_path: Path) -> None:
    data = tmp_path / "mine.csv"
    data.write_text(",text,label,\n" + "".join(f"{i},row {i},{i % 2},\n" for i in range(8)))
    assert len(rows(data)["train"]) == 6


def test_data_must_be_given_and_must_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs rows"):
        find_dataset(Recipe(task="local"))
    with pytest.raises(DataError, match="does not exist"):
        local(tmp_path / "none.csv")


def test_load_reads_the_data_that_it_is_given(tmp_path: Path) -> None:
    task = local(make(tmp_path / "mine.csv", PLAIN))
    other_file = make(
        tmp_path / "other.csv", [{"text": f"other {i}", "label": "yes" if i % 2 else "no"} for i in range(20)]
    )
    assert all(text.startswith("other") for text in texts(task.load(str(other_file), 0)["train"]))
    assert all(text.startswith("row") for text in texts(task.load(None, 0)["train"]))


def test_max_rows_of_a_sorted_file_still_shows_every_class(tmp_path: Path) -> None:
    data = make(tmp_path / "mine.csv", sorted(PLAIN, key=lambda record: record["label"]))
    recipe = Recipe(task="local", data=str(data), max_rows=12)
    splits = find_task(recipe).read_rows(recipe)
    assert len(splits["train"]) == 12
    assert set(splits["train"].labels) == {0, 1}
    assert splits == find_task(recipe).read_rows(recipe)


def test_questions_and_rankings_are_read_from_shards_whatever_the_order_of_their_keys(tmp_path: Path) -> None:
    answer = {"text": ["a"], "answer_start": [0]}
    kinds: dict[str, dict[str, Any]] = {
        "spans": {"question": "who", "context": "a", "answers": answer},
        "ranking": {"query": "who", "passage": "a", "relevant": 1},
        "tokens": {"tokens": ["a", "b"], "tags": ["B-X", "O"]},
    }
    for kind, row in kinds.items():
        other = row | {"relevant": 0} if kind == "ranking" else row
        files = {"train/a": row, "train/b": dict(reversed(other.items())), "dev/a": row}
        for name, content in files.items():
            (tmp_path / kind / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / kind / f"{name}.jsonl").write_text(json.dumps(content), "utf-8")
        dataset = find_dataset(Recipe(task="local", data=str(tmp_path / kind)))
        rows = dataset.load(None, 0)["train"]
        assert (dataset.kind, rows.first[0]) == (kind, rows.first[1])
        assert rows.second is None or rows.second == ["a", "a"]
        (tmp_path / kind / "train/b.jsonl").write_text(json.dumps(row | {"further": 1}), "utf-8")
        with pytest.raises(DataError, match="b.jsonl has the columns"):
            find_dataset(Recipe(task="local", data=str(tmp_path / kind)))
