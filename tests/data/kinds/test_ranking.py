"""Rows of a reranker: columns, relevance, whole queries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spdtool.data.dataset import Rows, find_dataset
from spdtool.data.kinds.ranking import (
    draw_dev_queries,
    find_ranking_columns,
    read_unlabeled_queries,
    sample_queries,
)
from spdtool.errors import DataError
from spdtool.recipe.reading import request_recipe
from spdtool.tasks.prepare import task_of

HEADER = "query_id\tquery\tpassage\trelevant\n"


def load(path: Path, *sets: str) -> dict[str, Rows]:
    recipe = request_recipe(data=path, sets=sets)
    dataset = find_dataset(recipe)
    assert dataset.kind == "ranking"
    return dataset.load(recipe.data, recipe.seed)


def write_rows(path: Path, queries: int = 8) -> Path:
    lines = []
    for passage in range(3):  # the passages of a query are not next to each other
        for query in range(queries):
            lines.append(f"q{query}\twhat is {query}\tpassage {passage} of {query}\t{int(passage == 1)}\n")
    path.write_text(HEADER + "".join(lines), "utf-8")
    return path


def test_columns_of_query_passage_and_relevance_are_a_ranking() -> None:
    assert find_ranking_columns(("query_id", "query", "passage", "relevant")) is not None
    assert find_ranking_columns(("question", "document", "label")) is not None
    for columns in (("question", "sentence", "label"), ("query", "passage"), ("query", "positive"), ("text", "label")):
        assert find_ranking_columns(columns) is None, columns


def test_passages_of_a_query_come_together_and_dev_has_whole_queries(tmp_path: Path) -> None:
    splits = load(write_rows(tmp_path / "rows.tsv"), "dev_share=0.3")
    assert set(splits["train"].first).isdisjoint(splits["dev"].first)
    for rows in splits.values():
        labels = np.asarray(rows.labels)
        assert len(rows) % 3 == 0
        assert np.all(np.diff(labels[:, 0]) >= 0)
        assert labels[:, 1].reshape(-1, 3).tolist() == [[0, 1, 0]] * (len(rows) // 3)
    assert sum(map(len, splits.values())) == 24


def test_dev_queries_do_not_depend_on_the_other_rows() -> None:
    rows = Rows([f"query {index // 2}" for index in range(40)], [f"passage {index}" for index in range(40)],
                np.array([[index // 2, index % 2] for index in range(40)]))  # fmt: skip
    fewer = Rows(rows.first[:30], rows.second[:30] if rows.second else None, np.asarray(rows.labels)[:30])
    splits, fewer_splits = draw_dev_queries(rows, 1, 0.3), draw_dev_queries(fewer, 1, 0.3)
    assert set(fewer_splits["dev"].first) == set(splits["dev"].first) & set(fewer.first)
    with pytest.raises(DataError, match="all rows are of one query"):
        draw_dev_queries(Rows(["a", "a"], ["b", "c"], np.array([[0, 0], [0, 1]])), 1, 0.3)


def test_a_sample_has_whole_queries() -> None:
    rows = Rows(["a", "a", "a", "b", "b"], list("12345"), np.array([[0, 1], [0, 0], [0, 0], [1, 1], [1, 0]]))
    for count, sizes in ((None, {5}), (9, {5}), (3, {2, 3}), (1, {2, 3})):
        assert len(sample_queries(rows, count, 0)) in sizes, count


def test_a_relevance_that_is_not_an_integer_is_refused_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.tsv"
    for cell, message in (
        ("yes", "relevance 'yes' is no whole number"),
        ("0.5", "no whole number"),
        ("-1", "no whole number"),
        ("", "no label"),
    ):
        file.write_text(HEADER + f"q1\tone\ttext\t1\nq1\tone\tother\t{cell}\n", "utf-8")
        with pytest.raises(DataError, match=f"line 3.*{message}"):
            load(file)


def test_one_id_cannot_have_two_texts(tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text(HEADER + "q1\tone\ttext\t1\nq1\ttwo\tother\t0\n", "utf-8")
    with pytest.raises(DataError, match="'q1' has two texts: 'one' and 'two'"):
        load(tmp_path / "rows.tsv")


def test_what_flatters_or_spoils_the_score_of_a_ranking_is_said(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.tsv")
    one_sided = "q1\tnew\ttext\t1\nq1\tnew\tother\t1\nq2\tnewer\ttext\t0\nq2\tnewer\ttext\t0\n"
    (tmp_path / "dev.tsv").write_text(HEADER + one_sided, "utf-8")
    write_rows(tmp_path / "test.tsv", queries=2)
    recipe = request_recipe(data=tmp_path)
    task = task_of(find_dataset(recipe))
    assert "test.tsv is scored once, at the end" in task.dataset.about
    assert task.data_warnings(task.read_rows(recipe)) == [
        "6 of 6 test rows have a text that is in train too: their score is flattered",
        "1 queries of dev have no relevant passage: they are left out of the metrics",
        "1 queries of dev have relevant passages only: every order of them is perfect",
        "1 rows of dev have a query with a passage that an earlier row has",
        "2 of 2 test queries are in train too: their score is flattered",
    ]
    (tmp_path / "test.tsv").write_text(HEADER + "q1\tnew\ttext\t-1\n", "utf-8")
    assert "test.tsv has no labels" in find_dataset(recipe).about
    (tmp_path / "dev.tsv").write_text(HEADER + "q1\tnew\ttext\t0\n", "utf-8")
    with pytest.raises(DataError, match="no passage of .*dev.tsv is relevant to its query"):
        find_dataset(recipe)


def test_settings_of_other_kinds_of_rows_are_refused(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.tsv")
    for setting in ("regression=true", "multilabel=true"):
        with pytest.raises(DataError, match=f"{setting}, and .* holds queries with passages"):
            load(file, setting)
    with pytest.raises(DataError, match="pairs are what a sentence encoder is scored by"):
        load(file, f"pairs={file}")


def test_rows_without_relevance_have_queries_of_their_own(tmp_path: Path) -> None:
    recipe = request_recipe(data=write_rows(tmp_path / "rows.tsv"))
    dataset = find_dataset(recipe)
    train = dataset.load(recipe.data, recipe.seed)["train"]
    lines, rows = tmp_path / "a.txt", tmp_path / "a.tsv"
    lines.write_text("one\tx\n\ntwo\ty\none\tz\n", "utf-8")
    rows.write_text("query_id\tpassage\tquery\n1\tx\tone\n2\ty\ttwo\n1\tz\tone\n", "utf-8")
    for file in (lines, rows):
        unlabeled = read_unlabeled_queries(file, (), dataset, train)
        assert unlabeled.first == ["one", "one", "two"]
        assert unlabeled.second == ["x", "z", "y"]
        labels = np.asarray(unlabeled.labels)
        assert (labels[:, 0] - labels[0, 0]).tolist() == [0, 0, 1]
        assert not set(labels[:, 0]) & set(np.asarray(train.labels)[:, 0])
        assert labels[:, 1].tolist() == [0, 0, 0]
    lines.write_text("one\tx\ntwo\n", "utf-8")
    rows.write_text("query\trelevant\none\t1\n", "utf-8")
    for file, message in ((lines, "line 2: 1 texts where 2 were expected"), (rows, "has no column 'passage'")):
        with pytest.raises(DataError, match=message):
            read_unlabeled_queries(file, (), dataset, train)


def test_the_recipe_says_whether_rows_are_ranked(tmp_path: Path) -> None:
    file = tmp_path / "rows.tsv"
    lines = [f"query {row // 3}\tpassage {row}\t{int(row % 3 == 0)}\n" for row in range(60)]
    file.write_text("sentence1\tsentence2\tlabel\n" + "".join(lines), "utf-8")
    assert find_dataset(request_recipe(data=file)).kind == "classification"
    ranked = request_recipe(data=file, text=("sentence1", "sentence2"), label="label", sets=("ranking=true",))
    assert find_dataset(ranked).kind == "ranking"
    file.write_text("query\tpassage\tlabel\n" + "".join(lines).replace("\t1\n", "\tyes\n"), "utf-8")
    with pytest.raises(DataError) as caught:
        find_dataset(request_recipe(data=file))
    assert "for classes of pairs: --set ranking=false" in str(caught.value.hint)
    classes = request_recipe(data=file, text=("query", "passage"), sets=("ranking=false",))
    assert find_dataset(classes).labels == ("0", "yes")


def test_a_drawn_dev_set_without_a_relevant_passage_is_refused(tmp_path: Path) -> None:
    lines = [f"query {row // 2}\tpassage {row}\t{int(row == 0)}\n" for row in range(40)]
    (tmp_path / "rows.tsv").write_text("query\tpassage\trelevant\n" + "".join(lines), "utf-8")
    with pytest.raises(DataError, match="none of the queries drawn as the dev set"):
        load(tmp_path / "rows.tsv")
