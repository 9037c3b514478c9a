"""Data files as users have them: separators, quoting, long fields, Unicode forms, saved data sets."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from spdtool.data.dataset import Dataset, find_dataset
from spdtool.data.files import read_file, read_header
from spdtool.data.local import check_header
from spdtool.errors import DataError
from spdtool.recipe.fields import Recipe

ROWS = [(f"row {i}", "no" if i % 3 else "yes") for i in range(30)]
COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def local(data: Path, **fields: Any) -> Dataset:
    return find_dataset(Recipe(task="local", data=str(data), **fields))


def write_rows(path: Path, rows: list[tuple[Any, ...]] = ROWS, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, **options).writerows([("text", "label"), *rows])
    return path


def named_table(labels: list[int], names: tuple[str, ...]) -> pa.Table:
    """Make a table as the library `datasets` writes it, with named classes in the column `label`."""
    features = {"text": {"dtype": "string", "_type": "Value"}, "label": {"names": names, "_type": "ClassLabel"}}
    table = pa.table({"text": [f"row {i}" for i in range(len(labels))], "label": labels})
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def test_a_header_in_another_encoding_is_refused_as_the_whole_file_is(tmp_path: Path) -> None:
    for ending in ("csv", "tsv", "jsonl"):
        file = tmp_path / f"rows.{ending}"
        file.write_bytes("text\tlabel\na\tx\n".encode("utf-16"))
        for read in (read_file, read_header):
            with pytest.raises(DataError, match="is UTF-16, not UTF-8"):
                read(file)


def test_a_parquet_file_whose_names_or_values_python_cannot_hold_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    table = pa.table({"text": ["a", "b"], "label": pa.array([0, 2**50], pa.timestamp("ms"))})
    parquet.write_table(table, file)
    for read in (read_file, read_header):
        with pytest.raises(DataError, match="is not a readable parquet file"):
            read(file)
    parquet.write_table(named_table([0, 1], ("no", "yes")), file)
    content = file.read_bytes()
    assert content.count(b"text") > 1
    file.write_bytes(content.replace(b"text", b"te\xeet"))
    for read in (read_file, read_header):
        with pytest.raises(DataError, match="is not a readable parquet file"):
            read(file)


def test_a_schema_of_another_form_names_no_classes(tmp_path: Path) -> None:
    table = named_table([0, 1], ("no", "yes"))
    for features in ([], ["a"], "a", None):
        schema = {"huggingface": json.dumps({"info": {"features": features}})}
        parquet.write_table(table.replace_schema_metadata(schema), tmp_path / "rows.parquet")
        assert read_file(tmp_path / "rows.parquet").class_names == {}


def save_arrow(table: pa.Table, folder: Path) -> None:
    """Write a split as `datasets.save_to_disk` does."""
    folder.mkdir(parents=True)
    with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table)
    (folder / "state.json").write_text("{}")
    (folder / "dataset_info.json").write_text("{}")
    (folder / "cache-0123456789.arrow").write_bytes(b"not rows")


def test_another_csv_separator_is_detected_and_reported(tmp_path: Path) -> None:
    for separator, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")):
        data = local(write_rows(tmp_path / f"{name}.csv", delimiter=separator))
        assert data.text == ("text",)
        assert f"separated by {name}" in data.about
    file = tmp_path / "named.csv"
    file.write_text("sep=;\n" + (tmp_path / "semicolons.csv").read_text())
    assert read_file(file).columns == ("text", "label")
    comma = write_rows(tmp_path / "comma.csv", [("a; b|c", "x"), ("d", "y")])
    assert read_file(comma).rows[0] == ["a; b|c", "x"]
    assert not read_file(comma).note


def test_a_field_may_be_very_long(tmp_path: Path) -> None:
    book = "word " * 40_000
    assert read_file(write_rows(tmp_path / "long.csv", [(book, "x"), ("a", "y")])).rows[0][0] == book


def test_tsv_quotes_are_removed_only_if_a_csv_writer_made_them(tmp_path: Path) -> None:
    quoted_rows = [('she said "no"', "x"), ("a\tb", "y"), ("c\nd", "x"), ("plain", "y")]
    for number, quoting in enumerate((csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC)):
        file = write_rows(tmp_path / f"{number}.tsv", quoted_rows, delimiter="\t", quoting=quoting)
        assert [tuple(row) for row in read_file(file).rows] == quoted_rows
        assert "quoted" in read_file(file).note
    plain = tmp_path / "plain.tsv"
    for text in ('"Great" he said', '"Great"', 'said "no"', '"open', '""'):
        plain.write_text(f"text\tlabel\n{text}\tx\nb\ty\n")
        assert read_file(plain).rows[0][0] == text
        assert not read_file(plain).note


def test_columns_are_found_in_either_unicode_form(tmp_path: Path) -> None:
    file = tmp_path / "forms.csv"
    file.write_text(f"{DECOMPOSED},label\n" + "".join(f"{text},{label}\n" for text, label in ROWS), "utf-8")
    for name in (COMPOSED, DECOMPOSED):
        assert local(file, text=(name,), label="label").text == (COMPOSED,)
    file.write_text(f"{DECOMPOSED},{COMPOSED},label\na,b,c\n", "utf-8")
    with pytest.raises(DataError, match="two columns called"):
        read_file(file)


def test_only_numbered_files_are_shards_and_others_are_reported(tmp_path: Path) -> None:
    for name in ("train", "train-old", "train_backup", "dev"):
        write_rows(tmp_path / "one" / f"{name}.csv")
    data = local(tmp_path / "one")
    assert len(data.load(None, 0)["train"]) == len(ROWS)
    assert "left alone: train-old.csv, train_backup.csv" in data.about
    for name in ("train-00000-of-00002", "train-00001-of-00002-0123456789abcdef", "dev", "train-old"):
        write_rows(tmp_path / "two" / f"{name}.csv")
    data = local(tmp_path / "two")
    assert len(data.load(None, 0)["train"]) == 2 * len(ROWS)
    assert "left alone: train-old.csv" in data.about
    (tmp_path / "two" / "train-00000-of-00002.csv").unlink()
    with pytest.raises(DataError, match="one of 2 files by its name"):
        local(tmp_path / "two")


def test_saved_data_sets_and_clones_are_read_with_the_names_of_their_classes(tmp_path: Path) -> None:
    names = ("pos", "neg", "never")
    table = named_table([i % 2 for i in range(40)], names)
    save_arrow(table, tmp_path / "dict" / "train")
    save_arrow(table.slice(0, 8), tmp_path / "dict" / "validation")
    save_arrow(table, tmp_path / "alone")
    (tmp_path / "clone" / "data").mkdir(parents=True)
    parquet.write_table(table, tmp_path / "clone" / "data" / "train-00000-of-00001.parquet")
    for folder in ("dict", "alone", "clone"):
        data = local(tmp_path / folder)
        assert data.labels == ("pos", "neg"), "in the order of the schema, without a class that no row has"
        splits = data.load(None, 0)
        assert set(splits["train"].labels) == {0, 1}
        assert ("row 0" in splits["train"].first) == (splits["train"].labels[0] == 0)
    assert local(tmp_path / "dict", regression=True).labels == ()


def test_a_label_outside_the_schema_is_refused(tmp_path: Path) -> None:
    for label, message in ((-1, "no label"), (2, "or the README names 2 classes")):
        parquet.write_table(named_table([0, 1, label], ("a", "b")), tmp_path / "rows.parquet")
        with pytest.raises(DataError, match=message):
            local(tmp_path / "rows.parquet")


def test_folders_of_several_data_sets_are_named(tmp_path: Path) -> None:
    for name in ("english", "german"):
        write_rows(tmp_path / name / "train.csv")
    with pytest.raises(DataError, match="its folders english, german have") as error:
        local(tmp_path)
    assert f"--data {tmp_path / 'english'}" in str(error.value.hint)


def test_a_pointer_of_a_clone_is_no_file_of_rows(tmp_path: Path) -> None:
    for name in ("rows.csv", "rows.parquet", "rows.jsonl"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        for read in (read_file, read_header):
            with pytest.raises(DataError, match="pointer of git-lfs"):
                read(tmp_path / name)


UNSUPPORTED: list[tuple[list[dict[str, Any]], str]] = [
    ([{"context": "a", "question": "b", "answers": "a"}], "question answering"),
    ([{"document": "a", "summary": "b"}], "text generation"),
    ([{"source": "a", "target": "b"}], "text generation"),
    ([{"anchor": "a", "positive": "b"}], "sentence embeddings"),
    ([{"question": "a", "choices": ["b"], "answer": 0}], "multiple choice"),
]


HINTS = {
    "question answering": "a JSON file of SQuAD",
    "sentence embeddings": "for a sentence encoder: --teacher FOLDER of sentence-transformers; for a reranker",
}


def test_rows_of_unsupported_tasks_are_refused_by_the_name_of_the_task(tmp_path: Path) -> None:
    for number, (records, kind) in enumerate(UNSUPPORTED):
        file = tmp_path / f"{number}.parquet"
        parquet.write_table(pa.Table.from_pylist(records), file)
        with pytest.raises(DataError) as error:
            local(file).load(None, 0)
        assert kind in error.value.message, records
        assert HINTS.get(kind, "supported are classes and numbers") in str(error.value.hint)
    file = tmp_path / "chosen.parquet"
    parquet.write_table(pa.Table.from_pylist([{"tokens": "a", "ner_tags": "B", "x": "a"}] * 4), file)
    with pytest.raises(DataError, match="token classification"):
        local(file, text=("tokens",), label="ner_tags")
    records = [{"source": "web", "target": i % 2, "text": f"row {i}"} for i in range(9)]
    parquet.write_table(pa.Table.from_pylist(records), file)
    assert local(file, text=("text",)).labels == ("0", "1")


def make_header(name: str, content: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(content)
        return folder / name

    return make


HEADERS: list[tuple[Callable[[Path], Path], str]] = [
    (make_header("rows.csv", "body,stars\na,b\n"), "no column that is clearly the label"),
    (make_header("rows.csv", "tokens,ner_tags\na,b\n"), "token classification"),
    (make_header("rows.tsv", "label\tx\ty\na\tb\tc\n"), "leaves open which column is the text"),
    (make_header("rows.jsonl", '{"context": "a", "question": "b", "answers": "c"}\n'), "question answering"),
    (make_header("rows.xlsx", "PK"), "ends in '.xlsx'"),
    (lambda folder: folder / "none.csv", "does not exist"),
    (lambda folder: folder, "no training rows"),
]


def test_faults_in_the_header_are_refused_before_torch_is_imported(tmp_path: Path) -> None:
    for number, (make, message) in enumerate(HEADERS):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(DataError, match=message):
            check_header(Recipe(task="local", data=str(make(folder))))
    code = "import sys, spdtool\ntry: spdtool.compress(data=sys.argv[1], model='x', device='cpu')\n"
    code += "except spdtool.errors.DataError: print({'torch', 'transformers'} & set(sys.modules))"
    file = make_header("last.csv", "body,stars\na,b\n")(tmp_path)
    process = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False)
    assert process.stdout.strip() == "set()", process.stderr


def test_lists_that_a_csv_file_holds_as_text_are_lists(tmp_path: Path) -> None:
    cells: list[tuple[str, object]] = [
        ("['joy', 'fear']", ["joy", "fear"]),  # str() of a list, as pandas writes it
        ('["joy", "fear"]', ["joy", "fear"]),  # JSON
        ("['joy' 'fear']", ["joy", "fear"]),  # str() of an array of numpy; Python would read one text
        ("[0 1 1]", [0, 1, 1]),
        ("[]", []),
        ("{'text': ['a\\'b'], 'answer_start': [3]}", {"text": ["a'b"], "answer_start": [3]}),
        (r"['C:\Dir']", [r"C:\Dir"]),
    ]
    for cell, value in cells:
        table = read_file(write_rows(tmp_path / "rows.csv", [("a", cell), ("b", cell), ("c", "")]))
        assert table.column("label") == [value, value, ""], cell
        assert "the lists in 'label' are written as text" in table.note
    for cell in ("[joy fear]", "[1, 2", "[" * 5000 + "]" * 5000, "[CLS]", "(1, 2)", "['a', open]", "\x00"):
        table = read_file(write_rows(tmp_path / "rows.csv", [("a", cell), ("b", cell)]))
        assert table.column("label") == [cell, cell], cell[:20]
    mixed = read_file(write_rows(tmp_path / "rows.csv", [("a", "['joy']"), ("b", "joy")]))
    assert mixed.column("label") == ["['joy']", "joy"]


def test_a_json_file_may_hold_an_object_a_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in ROWS), "utf-8")
    assert local(file).labels == ("no", "yes")
    assert "it holds a JSON object a line" in local(file).about
    file.write_text('{"text": "a"}\n{"text": \n', "utf-8")
    with pytest.raises(DataError, match=r"rows.json, line 2: not JSON"):
        local(file)


def test_a_file_of_lines_is_refused_with_what_it_looks_like(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for content, hint in (
        ("EU NNP B-ORG\nwon VBD O\n\nRome NNP B-LOC\n", "call it train.conll"),
        ("a text\nanother one\n", "rows with labels are read from files with columns"),
    ):
        (folder / "train.txt").write_text(content, "utf-8")
        for path in (folder, folder / "train.txt"):
            with pytest.raises(DataError) as caught:
                local(path)
            assert hint in str(caught.value.hint)


def test_a_file_without_a_header_is_refused_with_that_hint(tmp_path: Path) -> None:
    file = tmp_path / "rows.tsv"
    file.write_text("a film that nobody has seen\t1\nanother one\t0\n", "utf-8")
    with pytest.raises(DataError) as caught:
        local(file)
    assert "its first line looks like a row" in str(caught.value.hint)


def test_numbers_are_named_by_a_file_of_labels_beside_them(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("negative\npositive\n", "utf-8")
    file = write_rows(tmp_path / "rows.csv", [(text, int(label == "yes")) for text, label in ROWS])
    assert local(file).labels == ("negative", "positive")
    assert local(file, regression=True).labels == ()
    write_rows(file, [(text, 2 * int(label == "yes")) for text, label in ROWS])
    assert local(file).labels == ("0", "2")  # not the numbers of those names
