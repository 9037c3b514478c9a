"""`spdtool predict --input`: data files, plain lines, and ambiguous input, which is refused."""

from __future__ import annotations

import io
import itertools
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import spdtool as library
from spdtool.data import files
from spdtool.data.formats.arrow import iterate_tables
from spdtool.errors import DataError
from spdtool.serving import inputs
from spdtool.serving.predict import InputLine, predict_lines

Call = Callable[..., Any]
TEXTS = ["good, film", 'a "bad" meal', "so cold it was", "very kind"]
TABLES = (".csv", ".tsv", ".jsonl", ".parquet", ".arrow")  # the other readers are of kinds whose rows are no such table
SECONDS = ["bad", "it was, then", "a\\tb", "quite"]


def write(folder: Path, ending: str, columns: dict[str, list[str]]) -> Path:
    """Write the columns as a data file in the format of `ending`."""
    import csv

    import pyarrow
    from pyarrow import parquet

    file, rows = folder / f"rows{ending}", list(zip(*columns.values(), strict=True))
    if ending == ".parquet":
        parquet.write_table(pyarrow.table(columns), file)
    elif ending == ".arrow":
        table = pyarrow.table(columns)
        with pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    elif ending == ".jsonl":
        file.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    elif ending == ".csv":
        with file.open("w", newline="") as stream:
            csv.writer(stream).writerows([list(columns), *rows])
    else:
        file.write_text("".join("\t".join(row) + "\n" for row in [tuple(columns), *rows]))
    return file


def labels(result: Any) -> list[str]:
    assert result.exit_code == 0, result.output
    return [json.loads(line)["label"] for line in result.stdout.splitlines()]


@pytest.mark.parametrize("ending", TABLES)
def test_a_data_file_is_read_by_the_columns_of_the_task(
    ending: str, single: Path, servable: Path, tmp_path: Path, spdtool: Call
) -> None:
    gold = ["yes", "no", "no", "yes"]
    file = write(tmp_path, ending, {"sentence": TEXTS, "label": gold})
    assert labels(spdtool("predict", single, "--input", file, "--json")) == library.load(single)(TEXTS)
    pairs = write(tmp_path, ending, {"label": gold, "second": SECONDS, "id": gold, "first": TEXTS})
    assert labels(spdtool("predict", servable, "--input", pairs, "--json")) == library.load(servable)(TEXTS, SECONDS)
    read = files.read_file(pairs)
    with inputs.open_input(str(pairs), library.load(servable)) as lines:
        assert [(line.number, line.text, line.pair) for line in lines] == [
            *zip(read.lines, read.column("first"), read.column("second"), strict=True)
        ]


def test_missing_columns_are_reported_and_can_be_named(
    single: Path, older_bundle: Path, tmp_path: Path, spdtool: Call
) -> None:
    file = write(tmp_path, ".csv", {"review": TEXTS, "stars": ["1"] * 4})
    result = spdtool("predict", single, "--input", file)
    assert result.exit_code == 2
    assert "has the columns 'review', 'stars', and not 'sentence'" in " ".join(result.stderr.split())
    assert "--text" in result.stderr
    for bundle in (single, older_bundle):
        labelled = spdtool("predict", bundle, "--input", file, "--text", "review", "--json")
        assert labels(labelled) == library.load(single)(TEXTS)
    assert "--text names 2 columns; the model takes" in spdtool(
        "predict", single, "--input", file, "--text", "review,stars"
    ).stderr.replace("\n", " ")
    assert spdtool("predict", older_bundle, "--input", file).exit_code == 2, "an older bundle does not know them"


def test_csv_files_with_quotes_blank_lines_and_short_rows(single: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(b'\xef\xbb\xbfsentence,label\r\n"two\r\nlines, ""quoted""",1\r\n\r\nshort\r\n ,2\r\nlast,3')
    classify = library.load(single)
    with inputs.open_input(str(file), classify) as lines:
        assert list(lines) == [
            InputLine(2, 'two\r\nlines, "quoted"'),
            InputLine(5, error="has 1 fields where 2 were expected (sentence, label)"),
            InputLine(6, error="has no text in the column 'sentence'"),
            InputLine(7, "last"),
        ]
    file.write_text('sentence\ngood\n"open\n')
    with (
        pytest.raises(DataError, match="the row that begins in line 3"),
        inputs.open_input(str(file), classify) as lines,
    ):
        list(lines)
    file.write_text("")
    with pytest.raises(DataError, match="is empty"), inputs.open_input(str(file), classify):
        pass


def test_blank_lines_at_the_end_of_a_tsv_are_no_rows(single: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.tsv"
    file.write_text("sentence\ngood\n\nbad\n\n\n")
    with inputs.open_input(str(file), library.load(single)) as lines:
        numbers = [(line.number, line.error) for line in lines]
    assert numbers == [(2, None), (3, "has no text in the column 'sentence'"), (4, None)]


def test_a_parquet_file_with_a_number_for_a_text(single: Path, tmp_path: Path) -> None:
    file = write(tmp_path, ".parquet", {"sentence": [1, 2]})  # type: ignore[list-item]
    with inputs.open_input(str(file), library.load(single)) as lines:
        assert [line.error for line in lines] == ["has a int in the column 'sentence', not text"] * 2
    for name, message in (("none.parquet", "there is no file"), ("bad.parquet", "is not a readable parquet file")):
        (tmp_path / "bad.parquet").write_text("x")
        with pytest.raises(DataError, match=message), inputs.open_input(str(tmp_path / name), library.load(single)):
            pass


PLAIN: dict[str, tuple[str, str, str, list[Any] | str]] = {
    "text": ("single", ".txt", "a, b\n{c\n", ["a, b", "{c"]),
    "text that looks like JSON": ("single", ".txt", "{a\nb\tc\n", ["{a", "b\tc"]),
    "pairs": ("servable", ".txt", "a\tb\nc\n", [("a", "b"), "has 1 filled columns"]),
    "no ending": ("single", "", "a\nb\n", ["a", "b"]),
    "JSON without an ending": ("single", "", '{"sentence": "a", "label": 1}\n{"text": "b"}\n', ["a", "b"]),
    "a JSON pair": ("servable", ".jsonl", '{"first": "a", "second": "b"}\n{"first": "a"}\n', [("a", "b"), "has no"]),
    "half a JSON pair": ("servable", ".jsonl", '{"first": "a", "second": null}\n', ["has no"]),
    "two columns for one text": ("single", "", "a\tb\n", "has two columns; the model takes one text (sentence)"),
    "a header for lines": ("servable", ".tsv", "a\tb\nc\td\n", "has the columns 'a', 'b', and not 'first'"),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_lines(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    bundle, ending, content, expected = PLAIN[kind]
    classify = library.load(request.getfixturevalue(bundle))
    file = tmp_path / f"lines{ending}"
    file.write_text(content)
    if isinstance(expected, str):
        with pytest.raises(DataError) as error, inputs.open_input(str(file), classify):
            pass
        assert expected in error.value.message
        assert "--format" in str(error.value.hint)
        return
    with inputs.open_input(str(file), classify) as lines:
        for line, wanted in zip(lines, expected, strict=True):
            if line.error:
                assert wanted in line.error
            else:
                assert (line.text if line.pair is None else (line.text, line.pair)) == wanted


def test_lines_of_the_other_kind_are_refused_one_by_one(single: Path, servable: Path, tmp_path: Path) -> None:
    from spdtool.serving import predict as lines

    input_lines = [InputLine(1, "good"), InputLine(2, "good", "bad"), InputLine(3, " "), InputLine(4, "good", "")]
    for bundle, refused_numbers in ((single, {2, 3, 4}), (servable, {1, 3, 4})):
        results = list(lines.predict_lines(library.load(bundle), input_lines))
        assert {row["line"] for row in results if "error" in row} == refused_numbers
        assert any("the model takes" in row.get("error", "") for row in results)


def test_one_text_on_the_command_line_must_fit_the_model(single: Path, servable: Path, spdtool: Call) -> None:
    for bundle, arguments, message in (
        (single, ("good", "--pair", "bad"), "the model takes one text"),
        (servable, ("good",), "the model takes two texts"),
        (single, ("",), "is empty"),
    ):
        result = spdtool("predict", bundle, *arguments)
        assert (result.exit_code, message in result.stderr) == (2, True), result.output


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet", ".txt"])
def test_memory_does_not_grow_with_the_file(ending: str, single: Path, tmp_path: Path) -> None:
    rows = {"sentence": ["good film " * 20] * 40_000}
    file = write(tmp_path, ".tsv" if ending == ".txt" else ending, rows)
    file = file.rename(file.with_suffix(ending))
    classify = library.load(single)
    next(iter(iterate_tables(file, 10))) if ending == ".parquet" else None  # imports pyarrow
    tracemalloc.start()
    with inputs.open_input(str(file), classify) as lines:
        assert sum(1 for _ in itertools.islice(lines, 50_000)) >= 40_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000, "the texts have eight million letters"


def test_standard_input_is_read_as_utf_8_in_any_locale(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO("\ufeffcaf\u00e9 na\u00efve\n\u4e2d\u6587\n".encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(content, encoding="latin-1", errors="replace"))
    with inputs.open_input("-", library.load(single), "text") as lines:
        assert [line.text for line in lines] == ["caf\u00e9 na\u00efve", "\u4e2d\u6587"]


def test_a_row_with_an_unknown_token_id_does_not_fail_the_other_rows(
    single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classify = library.load(single)
    rows = classify.encode(TEXTS)
    largest = [int(row.ids.max()) for row in rows]
    limit = max(largest)
    monkeypatch.setattr(classify, "_vocabulary_size", limit)  # the tokenizer has one token more than the model
    lines = [InputLine(number, text) for number, text in enumerate(TEXTS, 1)]
    answers = list(predict_lines(classify, lines))
    assert [("error" in answer) for answer in answers] == [token == limit for token in largest]
    assert any("label" in answer for answer in answers)


def lines_of(file: Path, *text: str, reads_words: bool = False, columns: tuple[str, ...] = ()) -> list[InputLine]:
    classify: Any = SimpleNamespace(text=text, decision=SimpleNamespace(reads_words=reads_words))
    with inputs.open_input(str(file), classify, columns=columns) as lines:
        return list(lines)


def test_files_that_are_no_lines_are_read_as_tables(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    records = [{"id": 1, "text": "one"}, {"id": 2, "text": " "}, {"id": 3, "text": "three"}]
    for content in (json.dumps(records), json.dumps(records, indent=1), json.dumps({"data": [
        {"question": "", "text": record["text"]} for record in records
    ]})):  # fmt: skip
        file.write_text(content, "utf-8")
        lines = lines_of(file, "text")
        assert [line.text for line in lines] == ["one", "", "three"]
        assert lines[1].error == "has no text in the column 'text'"
    with pytest.raises(DataError, match="has the columns 'question', 'text', and not 'review'"):
        lines_of(file, "review")
    squad = {"data": [{"paragraphs": [{"context": "a b", "qas": [{"id": "1", "question": "who"}]}]}]}
    for indent in (None, 1):
        file.write_text(json.dumps(squad, indent=indent), "utf-8")
        assert lines_of(file, "question", "context") == [InputLine(1, "who", "a b")]
    file.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")  # an object a line
    assert [line.text for line in lines_of(file, "text")] == ["one", " ", "three"]
    file.write_text("[1, 2]", "utf-8")
    with pytest.raises(DataError, match="row 1: a int, not an object"):
        lines_of(file, "text")


def test_words_of_a_tagger_are_joined_as_in_training_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.conll").write_text("-DOCSTART- O\n\nAnna B-PER\nran O\n\nBob B-PER\n", "utf-8")
    assert [line.text for line in lines_of(tmp_path / "rows.conll", "tokens", reads_words=True)] == ["Anna ran", "Bob"]
    row = {"tokens": ["Anna", " ", "ran"]}
    for name, content in (("rows.jsonl", json.dumps(row)), ("rows.json", json.dumps([row]))):
        (tmp_path / name).write_text(content + "\n", "utf-8")
        assert [line.text for line in lines_of(tmp_path / name, "tokens", reads_words=True)] == ["Anna ran"]
        assert "no" in str(lines_of(tmp_path / name, "tokens")[0].error)
