"""Queries, passages and judgements in files of their own, joined by ids: the layouts of BEIR, MS MARCO and TREC."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spdtool.data.formats.jsonl import read_jsonl
from spdtool.data.formats.separated import read_tsv
from spdtool.data.formats.table import Table, read_text
from spdtool.data.labels import parse_number
from spdtool.data.splits import DEV_NAMES, TEST_NAMES, TRAIN_NAMES, find_files
from spdtool.errors import DataError

QUERY_FILES = ("queries.jsonl", "queries.tsv")
QUERIES_OF_SPLITS = ("queries.*.jsonl", "queries.*.tsv")  # queries.train.tsv and queries.dev.tsv, as MS MARCO has them
PASSAGE_FILES = ("corpus.jsonl", "collection.jsonl", "collection.tsv", "corpus.tsv")
JUDGEMENT_FILES = ("*qrels*.tsv", "*qrels*.txt", "*.qrels", "qrels/*.tsv", "qrels/*.txt")
COLUMNS = ("query_id", "query", "passage", "relevant")
ID_KEYS = ("_id", "id")


@dataclass(frozen=True)
class QrelsFiles:
    """Files of one folder: `judgements` by split, of which `train` is always there."""

    queries: tuple[Path, ...]
    passages: Path
    judgements: dict[str, Path]


@dataclass(frozen=True)
class Judgement:
    """One line of a qrels file."""

    line: int
    query: str
    passage: str
    relevance: str


def find_qrels(folder: Path) -> QrelsFiles | None:
    """Find queries, passages and judgements in a folder; None where it has rows of another form.

    Raises:
        DataError: there are judgements, and no texts beside them, or none of the training queries.
    """
    if not folder.is_dir():
        return None
    judgements = sorted({path for pattern in JUDGEMENT_FILES for path in folder.glob(pattern)})
    if not judgements:
        return None
    queries = [folder / name for name in QUERY_FILES if (folder / name).is_file()][:1]
    queries = queries or sorted(path for pattern in QUERIES_OF_SPLITS for path in folder.glob(pattern))
    passages = [folder / name for name in PASSAGE_FILES if (folder / name).is_file()]
    for files, texts, usual in ((queries, "queries", QUERY_FILES), (passages, "passages", PASSAGE_FILES)):
        if not files and find_files(folder, TRAIN_NAMES):
            return None
        if not files:
            raise DataError(
                f"{folder} has judgements, {judgements[0].name}, and no {texts}: looked for {', '.join(usual)}",
                f"add the file of {texts}: an id and a text a row",
            )
    by_split: dict[str, Path] = {}
    for split, names in (("train", TRAIN_NAMES), ("dev", DEV_NAMES), ("test", TEST_NAMES)):
        for path in judgements:
            words = path.stem.replace("-", ".").replace("_", ".").split(".")
            if set(words) & set(names):
                by_split.setdefault(split, path)
    if "train" not in by_split and len(judgements) == 1:  # as most of BEIR has them, whatever its name
        by_split = {"train": judgements[0]}
    if "train" not in by_split:
        listed = ", ".join(path.name for path in judgements)
        raise DataError(f"{folder} has no judgements of training queries: {listed}", "name one of them qrels.train.tsv")
    return QrelsFiles(tuple(queries), passages[0], by_split)


def read_judged_tables(files: QrelsFiles, negatives: int, seed: int) -> dict[str, Table]:
    """Join queries, passages and judgements into a table for each split.

    Args:
        negatives: passages to draw at random for a query whose judged passages are all relevant.
        seed: of the draws, with the query's id.

    Raises:
        DataError: a file is not what it says, or a judgement names an unknown id.
    """
    queries: dict[str, str] = {}
    for file in files.queries:
        queries |= read_texts_by_id(file)
    passages = read_texts_by_id(files.passages)
    passage_ids = list(passages)
    tables = {}
    for split, path in files.judgements.items():
        rows: list[list[object]] = []
        lines = []
        by_query: dict[str, list[Judgement]] = {}
        relevance: dict[tuple[str, str], str] = {}
        for judgement in read_judgements(path):
            pair = judgement.query, judgement.passage
            _refuse_contradiction(path, judgement, relevance.setdefault(pair, judgement.relevance))
            by_query.setdefault(judgement.query, []).append(judgement)
        for query_id, judged in by_query.items():
            for judgement in judged:
                _require_id(path, judgement, query_id in queries, "query", query_id)
                _require_id(path, judgement, judgement.passage in passages, "passage", judgement.passage)
                rows.append([query_id, queries[query_id], passages[judgement.passage], judgement.relevance])
                lines.append(judgement.line)
            if all(parse_number(judgement.relevance) != 0 for judgement in judged):  # 0, or 0.0
                used = {judgement.passage for judgement in judged}
                for passage_id in draw_negatives(passage_ids, used, negatives, f"{seed} {query_id}"):
                    rows.append([query_id, queries[query_id], passages[passage_id], "0"])
                    lines.append(judged[0].line)
        tables[split] = Table(path, COLUMNS, rows, lines)
    return tables


def draw_negatives(passage_ids: Sequence[str], used: set[str], count: int, key: str) -> list[str]:
    """Draw `count` passages that a query has no judgement of; fewer where there are no more."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())
    drawn = random.Random(seed).sample(passage_ids, min(len(passage_ids), count + len(used)))
    return [passage_id for passage_id in drawn if passage_id not in used][:count]


def read_texts_by_id(path: Path) -> dict[str, str]:
    """Read a file of ids and texts: jsonl with `_id`, `text` and perhaps `title`, or two columns without a header.

    Raises:
        DataError: an id or a text is missing.
    """
    if path.suffix == ".jsonl":
        table = read_jsonl(path)
        key = next((name for name in ID_KEYS if name in table.columns), None)
        if key is None or "text" not in table.columns:
            raise DataError(f"{path} has the columns {', '.join(table.columns)}", "_id and text were expected")
        ids, texts = table.column(key), table.column("text")
        titles = table.column("title") if "title" in table.columns else [None] * len(ids)
    else:
        table = read_tsv(path, ("id", "text"))
        ids, texts, titles = table.column("id"), table.column("text"), [None] * len(table.rows)
    by_id: dict[str, str] = {}
    for row, (text_id, title, text) in enumerate(zip(ids, titles, texts, strict=True)):
        # As BEIR joins them: many passages are hard to understand without their title.
        joined = f"{title or ''} {text or ''}".strip()
        if text_id is None or not joined:
            table.refuse(row, "an id or a text is missing", "leave such rows out")
        if by_id.setdefault(str(text_id), joined) != joined:
            table.refuse(row, f"the id {str(text_id)!r} has another text in an earlier line", "each id needs one text")
    return by_id


def read_judgements(path: Path) -> list[Judgement]:
    """Read a qrels file: query, passage and relevance with a header (BEIR), or four columns (TREC).

    Raises:
        DataError: a line has another number of columns.
    """
    judgements = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        cells = line.split()
        if not cells or (number == 1 and cells[0] in ("query-id", "query_id", "qid")):
            continue
        if len(cells) not in (3, 4):
            raise DataError(
                f"{path}, line {number}: {len(cells)} columns",
                "query, passage, relevance; or query, 0, passage, relevance",
            )
        judgements.append(Judgement(number, cells[0], cells[-2], cells[-1]))
    return judgements


def _require_id(path: Path, judgement: Judgement, exists: bool, kind: str, name: str) -> None:
    if not exists:
        raise DataError(f"{path}, line {judgement.line}: there is no {kind} {name!r}", f"each {kind} needs its text")


def _refuse_contradiction(path: Path, judgement: Judgement, earlier: str) -> None:
    """Raise DataError for a judgement whose passage an earlier line gives another relevance to the same query."""
    if judgement.relevance != earlier:
        raise DataError(
            f"{path}, line {judgement.line}: the passage {judgement.passage!r} has the relevance "
            f"{judgement.relevance} to the query {judgement.query!r}, and {earlier} in an earlier line",
            "leave one of them",
        )
