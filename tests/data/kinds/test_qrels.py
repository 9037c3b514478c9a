"""Queries, passages and judgements in separate files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from spdtool.data.dataset import Rows, find_dataset
from spdtool.data.kinds.qrels import find_qrels
from spdtool.errors import DataError
from spdtool.recipe.reading import request_recipe


def write_beir(folder: Path, judgements: str = "q1\tp1\t1\nq2\tp2\t1\nq2\tp3\t0\n") -> Path:
    queries = [{"_id": f"q{number}", "text": f"query {number}"} for number in (1, 2, 3)]
    passages = [{"_id": f"p{number}", "title": "Title", "text": f"passage {number}"} for number in range(9)]
    for name, records in (("queries", queries), ("corpus", passages)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)), "utf-8")
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / "qrels/train.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judgements}", "utf-8")
    return folder


def load(path: Path, *sets: str) -> dict[str, Rows]:
    recipe = request_recipe(data=path, sets=sets)
    return find_dataset(recipe).load(recipe.data, recipe.seed)


def test_texts_are_joined_by_their_ids_and_passages_are_drawn_where_all_are_relevant(tmp_path: Path) -> None:
    folder = write_beir(tmp_path)
    splits = load(folder, "negatives=3")
    rows = {query: [] for query in ("query 1", "query 2")}
    for split in splits.values():
        assert split.second is not None
        for query, passage, (_, relevance) in zip(split.first, split.second, np.asarray(split.labels), strict=True):
            rows[query].append((passage, int(relevance)))
    assert sorted(rows["query 2"]) == [("Title passage 2", 1), ("Title passage 3", 0)]
    assert [relevance for _, relevance in rows["query 1"]] == [1, 0, 0, 0]
    assert rows["query 1"][0][0] == "Title passage 1"
    assert len({passage for passage, _ in rows["query 1"]}) == 4
    repeated = load(folder, "negatives=3")
    assert all(repeated[name].second == split.second for name, split in splits.items())


def test_the_files_of_trec_have_no_header(tmp_path: Path) -> None:
    (tmp_path / "queries.tsv").write_text("1\tone\n2\ttwo\n", "utf-8")
    (tmp_path / "collection.tsv").write_text("7\tseven\n8\teight\n", "utf-8")
    for split in ("train", "dev"):
        (tmp_path / f"qrels.{split}.tsv").write_text("1 0 7 1\n1 0 8 0\n2\t0\t8\t2\n2 0 7 0\n", "utf-8")
    splits = load(tmp_path)
    assert splits["dev"].second == ["seven", "eight", "eight", "seven"]
    assert np.asarray(splits["dev"].labels)[:, 1].tolist() == [1, 0, 2, 0]


def test_faults_in_judgements_are_named(tmp_path: Path) -> None:
    for judgements, message in (
        ("q1\tp99\t1\n", "line 2: there is no passage 'p99'"),
        ("q9\tp1\t1\n", "line 2: there is no query 'q9'"),
        ("q1\tp1\n", "line 2: 2 columns"),
        ("q1\tp1\t1\nq1\tp1\t0\n", "line 3: the passage 'p1' has the relevance 0 to the query 'q1', and 1 in an"),
        (f"q1\tp1\t1\nq2\tp2\t{10**30}\n", "is no whole number from 0 to 1,000,000"),
        ("q1\tp1\t1\nq2\tp2\t-2\n", "line 3: the relevance '-2' is no whole number from 0"),
    ):
        with pytest.raises(DataError, match=message):
            load(write_beir(tmp_path, judgements))
    (tmp_path / "qrels/train.tsv").rename(tmp_path / "qrels/a.tsv")
    (tmp_path / "qrels/b.tsv").write_text("q1\tp1\t1\n", "utf-8")
    with pytest.raises(DataError, match="no judgements of training queries"):
        find_qrels(tmp_path)


def test_judgements_of_test_queries_are_a_test_set(tmp_path: Path) -> None:
    folder = write_beir(tmp_path)
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq3\tp1\t1\n", "utf-8")
    assert set(load(folder)["test"].first) == {"query 3"}
    (folder / "corpus.jsonl").write_text('{"_id": "p1", "text": "a"}\n{"_id": "p1", "text": "b"}\n', "utf-8")
    with pytest.raises(DataError, match="line 2: the id 'p1' has another text in an earlier line"):
        load(folder)


def test_queries_of_each_split_may_have_a_file_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "collection.tsv").write_text("7\tseven\n8\teight\n", "utf-8")
    for split, number in (("train", 1), ("dev", 2)):
        (tmp_path / f"queries.{split}.tsv").write_text(f"{number}\tquery of {split}\n", "utf-8")
        (tmp_path / f"qrels.{split}.tsv").write_text(f"{number}\t0\t7\t1\n{number}\t0\t8\t0\n", "utf-8")
    assert {name: set(rows.first) for name, rows in load(tmp_path).items()} == {
        "train": {"query of train"},
        "dev": {"query of dev"},
    }
    for split in ("train", "dev"):  # as TREC calls them
        (tmp_path / f"qrels.{split}.tsv").rename(tmp_path / f"{split}.qrels")
    assert set(load(tmp_path)) == {"train", "dev"}


def test_judgements_without_texts_are_named(tmp_path: Path) -> None:
    folder = write_beir(tmp_path)
    (folder / "corpus.jsonl").rename(folder / "passages.jsonl")
    with pytest.raises(DataError, match="has judgements, train.tsv, and no passages: looked for corpus.jsonl"):
        load(folder)
