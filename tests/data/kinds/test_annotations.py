"""Spans by characters, and files with a word a row, give words with tags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spdtool.data.dataset import Dataset
from spdtool.data.local import check_header, local_dataset
from spdtool.errors import DataError
from spdtool.recipe.reading import build_recipe

TEXT = "Dr. Anna Smith-Lee (36) lives in New York."
SPANS = [(4, 14, "PER"), (33, 41, "LOC")]
TAGGED = [("Anna", "B-PER"), ("Smith", "I-PER"), ("New", "B-LOC"), ("York", "I-LOC")]


def local(path: Path, **flags: Any) -> Dataset:
    recipe = build_recipe("default", {"task": "local", "data": str(path)} | flags, [])
    check_header(recipe)
    return local_dataset(recipe)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def texts(count: int = 12, **fields: Any) -> list[dict[str, Any]]:
    return [{"text": f"{TEXT} {number}"} | fields for number in range(count)]


def test_every_form_of_spans_gives_the_same_words_and_leaves_the_text_alone(tmp_path: Path) -> None:
    objects = [{"start": start, "end": end, "label": kind} for start, end, kind in SPANS]
    offsets = [{"start_offset": start, "end_offset": end, "labels": [kind]} for start, end, kind in SPANS]
    forms: list[dict[str, Any]] = [
        {"label": SPANS},
        {"entities": objects},
        {"spans": objects, "tokens": [{"text": "Dr.", "id": 0}]},
        {"entities": offsets},
        {"label": [[3, 14, "PER"], [32, 41, "LOC"]]},  # with the spaces around it
    ]
    for number, fields in enumerate(forms):
        dataset = local(write(tmp_path / f"{number}.jsonl", texts(**fields)))
        assert (dataset.kind, dataset.text) == ("tokens", ("text",)), fields
        rows = dataset.load(None, 0)["train"]
        assert rows.first[0].startswith(TEXT)
        words = [(rows.first[0][start:end], dataset.labels[tag]) for start, end, tag in rows.labels[0]]
        assert [word for word in words if word[1] != "O"] == TAGGED
        assert ("Lee", "O") in words  # a span ends within what a text calls one word
        assert ("36", "O") in words


def test_spans_that_cannot_be_are_named(tmp_path: Path) -> None:
    for spans, message in (
        ([[0, 99, "PER"]], "line 1: the span 0-99 .'PER'. is not in its text, which has 44 characters"),
        ([[5, 5, "PER"]], "the span 5-5"),
        ([[-3, 2, "PER"]], "the span -3-2"),
        ([[0, 8, "PER"], [4, 14, "LOC"]], "the spans 0-8 .'PER'. and 4-14 .'LOC'. overlap"),
    ):
        with pytest.raises(DataError, match=message):
            local(write(tmp_path / "rows.jsonl", texts(label=spans)))
    rows = [*texts(label=SPANS), {"text": TEXT, "label": ["PER"]}]
    with pytest.raises(DataError, match="line 13: the span 'PER' in 'label'"):
        local(write(tmp_path / "rows.jsonl", rows))


def test_a_word_a_row_is_joined_by_the_number_of_its_sentence(tmp_path: Path) -> None:
    file = tmp_path / "ner.csv"
    for is_repeated in (False, True):
        lines = ["Sentence #,Word,POS,Tag"]
        for number in range(12):
            for row, (word, tag) in enumerate([(f"Anna{number}", "B-per"), ("won", "O"), ("Rome", "B-geo")]):
                name = f"Sentence: {number}" if is_repeated or row == 0 else ""
                lines.append(f"{name},{word},NN,{tag}")
        file.write_text("\n".join(lines) + "\n", "utf-8")
        dataset = local(file)
        assert "a word a row, joined by 'Sentence #'" in dataset.about
        rows = dataset.load(None, 0)["train"]
        assert rows.first[0] == "Anna0 won Rome"
        assert [dataset.labels[tag] for _, _, tag in rows.labels[0]] == ["B-per", "O", "B-geo"]
    with pytest.raises(DataError, match="every word in .* has the tag .NN."):
        local(file, label="POS", text=("Word",))
    file.write_text("Sentence #,Word,Tag\n,Anna,B-per\n", "utf-8")
    with pytest.raises(DataError, match="line 2: no sentence in the column 'Sentence #'"):
        local(file)
