"""Queries with lists of passages give the rows of a ranking, whatever the lists are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spdtool.data.dataset import find_dataset
from spdtool.data.local import check_header
from spdtool.errors import DataError
from spdtool.recipe.reading import request_recipe

QUERIES = [f"query {number}" for number in range(8)]
HUB = {"passages": {"passage_text": ["right", "wrong", "other"], "is_selected": [1, 0, 0]}, "answers": []}
EXPECTED = {(query, "right", 1) for query in QUERIES} | {(q, text, 0) for q in QUERIES for text in ("wrong", "other")}


def rows_of(path: Path, *sets: str) -> set[tuple[str, str, int]]:
    recipe = request_recipe(data=path, sets=sets)
    check_header(recipe)
    dataset = find_dataset(recipe)
    assert dataset.kind == "ranking"
    rows = set()
    for split in dataset.load(None, 0).values():
        assert split.second is not None
        relevance = np.asarray(split.labels)[:, 1].tolist()
        rows |= set(zip(split.first, split.second, relevance, strict=True))
    return rows


def write(path: Path, **fields: Any) -> Path:
    path.write_text("".join(json.dumps({"query": query} | fields) + "\n" for query in QUERIES), "utf-8")
    return path


def test_every_form_of_lists_gives_the_same_rows(tmp_path: Path) -> None:
    forms: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({"pos": ["right"], "neg": ["wrong", "other"], "pos_scores": [0.9]}, ("ranking=true",)),
        ({"positive": "right", "negative_1": "wrong", "negative_2": "other"}, ("ranking=true",)),
        ({"positive_passages": [{"text": "right", "docid": "1"}],
          "negative_passages": [{"text": "wrong"}, {"title": "", "text": "other"}]}, ("ranking=true",)),
        ({"docs": ["right", "wrong", "other"], "labels": [1, 0, 0]}, ()),
        (HUB, ()),
    ]  # fmt: skip
    for number, (fields, sets) in enumerate(forms):
        assert rows_of(write(tmp_path / f"{number}.jsonl", **fields), *sets) == EXPECTED, fields


def test_triples_have_no_header_and_a_query_a_line(tmp_path: Path) -> None:
    lines = [f"{query}\tright\t{text}\n" for query in QUERIES for text in ("wrong", "other")]
    file = tmp_path / "triples.train.small.tsv"
    file.write_text("".join(lines), "utf-8")
    assert rows_of(file, "ranking=true") == EXPECTED
    file.write_text("".join(f"{number}\t2\t3\n" for number in range(8)), "utf-8")
    with pytest.raises(DataError, match="numbers of queries and passages, not their texts"):
        rows_of(file, "ranking=true")


def test_passages_are_drawn_for_queries_that_have_relevant_ones_only(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"query": query, "pos": [f"of {query}"]}) + "\n" for query in QUERIES), "utf-8")
    rows = rows_of(file, "ranking=true", "negatives=2")
    for query in QUERIES:
        assert {text for name, text, relevance in rows if name == query and relevance} == {f"of {query}"}
        assert sum(name == query for name, _, _ in rows) == 3


def test_what_may_train_a_sentence_encoder_is_no_ranking_by_itself(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", pos=["right"], neg=["wrong"])
    with pytest.raises(DataError) as caught:
        rows_of(file)
    assert "for a reranker: --set ranking=true" in str(caught.value.hint)


def test_lists_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    for fields, message in (
        ({"docs": ["a", "b"], "labels": [1]}, "line 1: 'docs' is no list with a relevance for each passage"),
        ({"docs": ["a", 3], "labels": [1, 0]}, "line 1: the column 'docs' holds a int, not text"),
        ({"pos": ["a"], "neg": [""]}, "line 1: no text in the column 'neg'"),
        ({"pos": ["a"], "neg": None, "positive": [7]}, "holds a int, not text"),
    ):
        with pytest.raises(DataError, match=message):
            rows_of(write(tmp_path / "rows.jsonl", **fields), "ranking=true")


def test_a_passage_of_two_judgements_is_relevant_and_the_plan_says_so(tmp_path: Path) -> None:
    lines = [{"query": query, "pos": ["a"], "neg": ["b"]} for query in QUERIES]
    lines.append({"query": "query 0", "pos": ["b"], "neg": ["c"]})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    assert ("query 0", "b", 1) in rows_of(file, "ranking=true")
    about = find_dataset(request_recipe(data=file, sets=("ranking=true",))).about
    assert "1 passages are relevant in one row, and not in another: they count as relevant" in about
