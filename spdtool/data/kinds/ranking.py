"""Rows of a reranker: queries, each with passages that are relevant to it or not.

    query_id  query  passage  relevant          a file, or a folder with train and dev
    queries.jsonl  corpus.jsonl  qrels/*.tsv    texts by their ids, and which passage answers which query (BEIR)
    queries.tsv  collection.tsv  qrels*.tsv     the same without headers (MS MARCO, TREC)

The passages of a query are next to each other, whatever the order of the file. Queries are drawn into the dev set as a
whole: a passage of a query in train, and another in dev, would give the answer away.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from spdtool.data.columns import Columns, read_texts, require_column
from spdtool.data.dataset import Dataset, Rows
from spdtool.data.formats.table import Table
from spdtool.data.labels import normalize_label, parse_number
from spdtool.data.unlabeled import read_unlabeled_table
from spdtool.errors import DataError
from spdtool.recipe.fields import Recipe

QUERY_NAMES = ("query", "question")
PASSAGE_NAMES = ("passage", "document", "doc")
RELEVANCE_NAMES = ("relevant", "relevance", "label", "score")
ID_NAMES = ("query_id", "qid", "query-id", "question_id")
MOST_RELEVANT = 1_000_000  # a gain; what is larger is an id, a time or a hash
METRICS = ("mrr@10", "ndcg@10", "map")


def find_ranking_columns(columns: Sequence[str]) -> Columns | None:
    """Return the columns of query, passage and relevance; None where the rows are of another kind."""
    chosen = []
    for names in (QUERY_NAMES, PASSAGE_NAMES, RELEVANCE_NAMES):
        present = [name for name in names if name in columns]
        if not present:
            return None
        chosen.append(present[0])
    return Columns((chosen[0], chosen[1]), chosen[2])


def holds_ranking(columns: Sequence[str], recipe: Recipe) -> bool:
    """Tell whether rows are queries with passages: the recipe says so, or the names of their columns."""
    return find_ranking_columns(columns) is not None if recipe.ranking is None else recipe.ranking


def choose_ranking_columns(table: Table, recipe: Recipe) -> Columns:
    """Return the columns that the recipe names, else those that their names tell.

    Raises:
        DataError: one does not exist, or cannot be guessed.
    """
    guess = find_ranking_columns(table.columns)
    text = recipe.text or (guess.text if guess else ())
    label = recipe.label or (guess.label if guess else None)
    if len(text) != 2 or label is None:
        raise DataError(
            f"{table.path} leaves open which columns are query, passage and relevance; it has "
            f"{', '.join(map(repr, table.columns))}",
            "give --text QUERY,PASSAGE --label RELEVANCE",
        )
    for name in (*text, label):
        require_column(table, name)
    return Columns((text[0], text[1]), label)


def ranking_dataset(recipe: Recipe, tables: Mapping[str, Table]) -> Dataset:
    """Describe queries with their passages.

    Args:
        tables: `train`, and `dev` and `test` where the data have them.

    Raises:
        DataError: a column or a text is missing, or a relevance is no whole number.
    """
    if recipe.test_share:
        raise DataError("--test-share would part the passages of a query", "add a file called test")
    columns = choose_ranking_columns(tables["train"], recipe)
    splits = {name: _read_query_rows(table, columns) for name, table in tables.items()}
    if "dev" in splits and not (np.asarray(splits["dev"].labels)[:, 1] > 0).any():
        raise DataError(
            f"no passage of {tables['dev'].path} is relevant to its query: there is nothing to score by",
            "give a dev file with relevant passages, or none: it is then drawn from the training queries",
        )

    def load(_data: str | None, seed: int) -> dict[str, Rows]:
        if "dev" in splits:
            return splits
        drawn = draw_dev_queries(splits["train"], seed, recipe.dev_share)
        if (
            not (np.asarray(drawn["dev"].labels)[:, 1] > 0).any()
            and (np.asarray(drawn["train"].labels)[:, 1] > 0).any()
        ):
            raise DataError(
                f"none of the queries drawn as the dev set of {recipe.data} has a relevant passage",
                "draw more (--set dev_share=0.3), or give a folder with train and dev",
            )
        return splits | drawn

    return Dataset(
        name="local",
        kind="ranking",
        text=columns.text,
        labels=(),
        metrics=METRICS,
        load=load,
        about=f"{columns.text[1]} of each {columns.text[0]} in {recipe.data}, ranked by {columns.label}",
    )


def has_relevance(table: Table, columns: Columns) -> bool:
    """Tell whether a row says that its passage is relevant; files with secret judgements have none."""
    if columns.label not in table.columns:
        return False
    return any(str(cell).strip() not in ("", "None", "0", "0.0", "False", "-1") for cell in table.column(columns.label))


def read_relevance(table: Table, column: str) -> list[int]:
    """Return the relevance of each row: 0, or how relevant it is.

    Raises:
        DataError: a cell holds no whole number from 0 to `MOST_RELEVANT`.
    """
    values = []
    for row, cell in enumerate(table.column(column)):
        if isinstance(cell, bool):
            values.append(int(cell))
            continue
        label = normalize_label(table, row, cell)
        number = parse_number(label)
        if number is None or not number.is_integer() or not 0 <= number <= MOST_RELEVANT:
            table.refuse(
                row,
                f"the relevance {label[:60]!r} is no whole number from 0 to {MOST_RELEVANT:,}",
                "0: the passage is not relevant; 1 or more: how relevant it is"
                + ("; write 0 for what TREC marks as spam" if number is not None and number < 0 else "")
                + ("; for classes of pairs: --set ranking=false" if number is None else ""),
            )
        values.append(int(number))
    return values


def read_unlabeled_queries(file: Path, columns: Sequence[str], dataset: Dataset, train: Rows) -> Rows:
    """Read queries with passages whose relevance nobody knows: it is 0, which no loss reads.

    Args:
        columns: of query and passage, see `read_unlabeled_table`.
        train: the training rows, whose query numbers are others.

    Raises:
        DataError: the file cannot be read, or one id stands for two queries.
    """
    table, names = read_unlabeled_table(file, columns, dataset)
    rows = _group_by_query(table, names, [0] * len(table.rows))
    first_number = int(np.asarray(train.labels)[:, 0].max()) + 1
    return replace(rows, labels=np.asarray(rows.labels) + np.array([first_number, 0]))


def _read_query_rows(table: Table, columns: Columns) -> Rows:
    """Return the rows of a table; labels are [query number, relevance]."""
    for name in (*columns.text, columns.label):
        require_column(table, name)
    return _group_by_query(table, columns.text, read_relevance(table, columns.label))


def _group_by_query(table: Table, names: Sequence[str], relevance: Sequence[int]) -> Rows:
    """Return the rows of a table, the passages of a query next to each other; `names` are its two text columns."""
    queries, passages = (read_texts(table, name) for name in names)
    keys = _query_keys(table, queries)
    numbers: dict[object, int] = {}
    labels = np.array([[numbers.setdefault(key, len(numbers)), 0] for key in keys], np.int64)
    labels[:, 1] = relevance
    order = np.argsort(labels[:, 0], kind="stable").tolist()
    return Rows([queries[row] for row in order], [passages[row] for row in order], labels[order])


def _query_keys(table: Table, queries: Sequence[str]) -> Sequence[object]:
    """Return what tells the queries of a table apart: their ids, or else their texts.

    Raises:
        DataError: one id stands for two texts.
    """
    name = next((name for name in ID_NAMES if name in table.columns), None)
    if name is None:
        return queries
    ids = [str(cell) for cell in table.column(name)]
    texts: dict[str, str] = {}
    for row, (query_id, query) in enumerate(zip(ids, queries, strict=True)):
        if texts.setdefault(query_id, query) != query:
            first = texts[query_id]
            problem = f"the query {query_id!r} has two texts: {first[:60]!r} and {query[:60]!r}"
            table.refuse(row, problem, f"give each query an id of its own, or leave the column {name!r} out")
    return ids


def select_queries(rows: Rows, queries: Sequence[int] | np.ndarray) -> Rows:
    """Return the rows of these query numbers alone, in their order."""
    labels = np.asarray(rows.labels)
    chosen = np.flatnonzero(np.isin(labels[:, 0], queries)).tolist()
    assert rows.second is not None
    return Rows([rows.first[row] for row in chosen], [rows.second[row] for row in chosen], labels[chosen])


def sample_queries(rows: Rows, count: int | None, seed: int) -> Rows:
    """Draw whole queries that have about `count` rows together, at least one; None: all."""
    if count is None or count >= len(rows):
        return rows
    queries, sizes = np.unique(np.asarray(rows.labels)[:, 0], return_counts=True)
    order = list(range(len(queries)))
    random.Random(seed).shuffle(order)
    chosen: list[int] = []
    total = 0
    for number in order:
        if chosen and total + sizes[number] > count:
            continue
        chosen.append(int(queries[number]))
        total += int(sizes[number])
    return select_queries(rows, chosen)


def draw_dev_queries(rows: Rows, seed: int, dev_share: float) -> dict[str, Rows]:
    """Draw about `dev_share` of the queries as `dev`, by `seed` and the query's text alone.

    Raises:
        DataError: fewer than two queries.
    """
    salt = seed.to_bytes(8, "little")
    draws: dict[int, float] = {}
    labels = np.asarray(rows.labels)
    for number, query in zip(labels[:, 0].tolist(), rows.first, strict=True):
        if number not in draws:
            digest = hashlib.blake2b(query.encode(), digest_size=8, salt=salt).digest()
            draws[number] = int.from_bytes(digest) / 2**64
    if len(set(draws.values())) < 2:
        raise DataError("all rows are of one query: nothing would be left to train on", "give rows of more queries")
    ranked = sorted(set(draws.values()))
    # At least one text on each side; equal texts draw equal numbers, and stay together.
    limit = min(max(dev_share, ranked[0]), ranked[-2])
    dev = [number for number, draw in draws.items() if draw <= limit]
    train = [number for number, draw in draws.items() if draw > limit]
    return {"train": select_queries(rows, train), "dev": select_queries(rows, dev)}
