"""Questions about contexts: SQuAD's files and the layout of `datasets`; answers that are not in their context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from spdtool.data.dataset import Dataset
from spdtool.data.local import check_header, local_dataset
from spdtool.errors import DataError
from spdtool.recipe.reading import build_recipe

CONTEXTS = [f"In {1900 + number} the Zürich café no. {number} opened." for number in range(20)]


def local(path: Path) -> Dataset:
    recipe = build_recipe("default", {"task": "local", "data": str(path)}, [])
    check_header(recipe)
    return local_dataset(recipe)


def squad(answers: Any = None, **fields: Any) -> dict[str, Any]:
    """A file of SQuAD: two questions about each context."""
    articles = []
    for number, context in enumerate(CONTEXTS):
        year = str(1900 + number)
        right = [{"text": year, "answer_start": 3}] if answers is None else answers
        questions = [
            {"id": f"{number}-{index}", "question": f"When {index}?", "answers": right} | fields for index in (0, 1)
        ]
        articles.append({"title": year, "paragraphs": [{"context": context, "qas": questions}]})
    return {"version": "1.1", "data": articles}


def write(tmp_path: Path, content: Any, name: str = "train.json") -> Path:
    (tmp_path / name).write_text(json.dumps(content), "utf-8")
    return tmp_path / name


def test_squad_files_are_read_and_no_context_is_in_both_splits(tmp_path: Path) -> None:
    dataset = local(write(tmp_path, squad()))
    assert (dataset.kind, dataset.text, dataset.labels) == ("spans", ("question", "context"), ("start", "end"))
    splits = dataset.load(None, 0)
    assert len(splits["train"]) + len(splits["dev"]) == 40
    assert splits["train"].second is not None
    assert splits["dev"].second is not None
    assert not set(splits["train"].second) & set(splits["dev"].second)
    for rows in splits.values():
        assert rows.second is not None
        for context, spans in zip(rows.second, rows.labels, strict=True):
            assert [context[start:end] for start, end in spans] == [context[3:7]]


def test_questions_without_an_answer_have_no_span(tmp_path: Path) -> None:
    plausible = [{"text": "1900", "answer_start": 3}]
    content = squad(is_impossible=True, answers=plausible, plausible_answers=plausible)
    content["data"] += squad()["data"]
    rows = local(write(tmp_path, content)).load(None, 0)["train"]
    assert sorted(map(len, rows.labels)) == [0] * (len(rows) // 2) + [1] * (len(rows) // 2)


def test_the_layout_of_datasets_is_read_too(tmp_path: Path) -> None:
    records = []
    for number, context in enumerate(CONTEXTS):
        answers = {
            "text": ["opened", "opened", "Z"],
            "answer_start": [context.index("opened")] * 2 + [context.index("Z")],
        }
        records.append({"id": str(number), "title": "t", "context": context, "question": "What?", "answers": answers})
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write(tmp_path, records, "rows.json")
    write(tmp_path, {"data": records}, "version.json")
    layouts = [
        local(tmp_path / name).load(None, 0)["train"].labels
        for name in ("rows.parquet", "rows.jsonl", "rows.json", "version.json")
    ]
    assert layouts[0] == layouts[1] == layouts[2] == layouts[3]
    assert all(len(spans) == 2 for spans in layouts[0])


def test_an_answer_outside_of_its_context_is_refused_and_a_moved_one_is_said(tmp_path: Path) -> None:
    for answers, message in (
        (
            [{"text": "1850", "answer_start": 3}],
            "'1850' does not stand at character 3 .* the answer 0 times",
        ),
        ([{"text": "e", "answer_start": 900}], "does not stand at character 900"),
        ([{"text": "opened", "answer_start": -6}], ""),
        ([{"text": "opened", "answer_start": 2}], ""),
        ([{"text": "", "answer_start": 2}], "an answer has the text ''"),
        ([{"text": "In", "answer_start": "0"}], "the answer_start '0'"),
        ([{"answer": "In"}], "the text None"),
        ({"text": ["In"], "answer_start": []}, "the answers are"),
    ):
        file = write(tmp_path, squad(answers))
        if message:
            with pytest.raises(DataError, match=message) as error:
                local(file)
            assert "question 1:" in error.value.message
        else:
            assert "40 answers did not stand at their answer_start" in local(file).about, answers


def test_files_of_another_layout_are_refused(tmp_path: Path) -> None:
    for content, message in (
        ({"a": 1}, "neither a list of objects nor of SQuAD's layout"),
        ({"data": []}, "has no questions"),
        ({"data": [{"title": "x"}, {"paragraphs": []}]}, "'paragraphs' is missing"),
        ([1], "row 1: a int, not an object"),
        (squad(question=" "), "no text in the column 'question'"),
        ([{"question": "a", "context": "b", "answers": "c"}] * 3, "without `answers` as SQuAD has them"),
    ):
        with pytest.raises(DataError, match=message):
            local(write(tmp_path, content))
    (tmp_path / "train.json").write_text("{")
    with pytest.raises(DataError, match="is no JSON"):
        local(tmp_path / "train.json")


def test_files_without_answers_teach_and_score_nothing(tmp_path: Path) -> None:
    rows = [{"id": "q", "question": f"who {i}", "context": f"{i} ran", "answers": spans(str(i))} for i in range(6)]
    hidden = [row | {"answers": {"text": [], "answer_start": []}} for row in rows]
    files = {"train": rows, "dev": rows, "test": hidden}
    for split, content in files.items():
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, content)), "utf-8")
    dataset = local(tmp_path)
    assert set(dataset.load(None, 0)) == {"train", "dev"}
    assert "test.jsonl has no labels" in dataset.about
    assert "5 questions of train.jsonl have an id that an earlier one has" in dataset.about
    for split in ("dev", "train"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, hidden)), "utf-8")
        with pytest.raises(DataError, match=f"no question of .*{split}.jsonl has an answer"):
            local(tmp_path)


def spans(text: str) -> dict[str, list[object]]:
    return {"text": [text], "answer_start": [0]}


def test_is_impossible_has_to_be_a_truth_value(tmp_path: Path) -> None:
    question = {"id": "7", "question": "who", "is_impossible": "false", "answers": [{"text": "a", "answer_start": 0}]}
    content = {"data": [{"paragraphs": [{"context": "a b", "qas": [question]}]}]}
    (tmp_path / "train.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(DataError, match="is_impossible is 'false' of the question '7'"):
        local(tmp_path / "train.json")


def test_answers_may_have_spaces_around_them_or_no_begin(tmp_path: Path) -> None:
    rows = [{"question": "When?", "context": context} for context in CONTEXTS]
    for answers, change in (
        ({"text": [" opened. "], "answer_start": [27]}, "had spaces around them"),
        (["opened."], "were found elsewhere in the context"),
    ):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row | {"answers": answers}) + "\n" for row in rows), "utf-8")
        dataset = local(file)
        assert change in dataset.about
        train = dataset.load(None, 0)["train"]
        assert train.second is not None
        assert train.second[0][slice(*train.labels[0][0])] == "opened."


def test_answers_without_a_column_answers_are_no_classes(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    row = {"question": "When?", "context": CONTEXTS[0], "answer": "1900"}
    file.write_text((json.dumps(row) + "\n") * 20, "utf-8")
    with pytest.raises(DataError, match="question answering"):
        local(file)
