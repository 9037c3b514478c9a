"""Fuzz the files of users: altered rows of every kind of task must be read, or refused by name, never a traceback.

    make fuzz
    python tests/fuzz_rows.py --seconds 3600 [--seed 0]

Each round draws a kind of task and writes its files; then it changes bytes, lines, cells, names or endings, and reads
them. Allowed are an SpdError, and rows that are whole: as many labels as texts, and texts that UTF-8 can hold. Exit
code 1: anything else, or a reading of over SLOW seconds. The seed in the message repeats a finding.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from spdtool.data.dataset import Rows
from spdtool.data.local import check_header
from spdtool.errors import SpdError
from spdtool.recipe.fields import Recipe
from spdtool.tasks.prepare import find_task

SLOW = 10.0  # seconds for some dozens of rows
ROWS = 30
ENDINGS = ("csv", "tsv", "jsonl", "parquet", "txt", "json", "conll", "arrow", "zip", "csv.gz", "CSV", "")
ODD_CELLS: tuple[Any, ...] = (
    "", " ", "\t", '"', '""', "'", ",", ";", "\r", "\n", "\x00", "\ufeff", "\u2028", "\u00a0", "NaN", "inf", "-1",
    "1e400", "None", "null", "true", "[]", "{}", "[", "a" * 140_000, "😀", "\u0301", "0", "00", "+1", "1.0", "1,5",
    "yes", "YES", None, True, False, 0, -1, 10**30, 0.5, float("nan"), float("inf"), [], [[]], {}, {"a": 1},
    ["a", None], "\ud800",
)  # fmt: skip
ODD_BYTES = (
    b"\x00", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n", b"\n\n", b'"', b'"""', b",", b";", b"\t", b"{", b"}",
    b"[", b"]", b"\\", b"\\u", b"\\ud800", b"\xe2\x80\xa8", b"1e999", b"-", b":", b"#", b"version https://git-lfs",
)  # fmt: skip
NAMES = (
    "train.csv", "train.tsv", "train.jsonl", "train.parquet", "dev.csv", "dev.jsonl", "test.csv", "validation.jsonl",
    "labels.txt", "corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "README.md", "train-00000-of-00002.jsonl",
    "train-00001-of-00002.jsonl", "data/train.jsonl", "train.conll", "dev.conll", "train.json", ".hidden", "notes.txt",
)  # fmt: skip
Records = list[dict[str, Any]]


def draw_text(draw: random.Random) -> str:
    """Draw some words."""
    words = draw.choices(
        ("good", "bad", "film", "plot", "was", "the", "a", "Paris", "café", "42"), k=draw.randint(1, 9)
    )
    return " ".join(words)


def draw_classes(draw: random.Random) -> Records:
    """Draw texts with one of some classes."""
    classes = draw.choice((("no", "yes"), (0, 1), (1, 2, 3), ("a", "b", "c")))
    return [{"text": f"{draw_text(draw)} {row}", "label": draw.choice(classes)} for row in range(ROWS)]


def draw_pairs(draw: random.Random) -> Records:
    """Draw pairs of texts with a class or a number."""
    return [
        {"first": draw_text(draw), "second": f"{draw_text(draw)} {row}", "score": draw.choice((0.5, 1.25, 3.0))}
        for row in range(ROWS)
    ]


def draw_label_sets(draw: random.Random) -> Records:
    """Draw texts with any number of labels."""
    return [
        {"text": f"{draw_text(draw)} {row}", "labels": draw.sample(("a", "b", "c"), draw.randint(0, 3))}
        for row in range(ROWS)
    ]


def draw_tags(draw: random.Random) -> Records:
    """Draw words with tags."""
    records = []
    for _ in range(ROWS):
        words = draw_text(draw).split()
        records.append({"tokens": words, "tags": draw.choices(("O", "B-PER", "I-PER"), k=len(words))})
    return records


def draw_ranking(draw: random.Random) -> Records:
    """Draw queries with passages."""
    return [
        {"query": f"query {row // 5}", "passage": f"{draw_text(draw)} {row}", "relevant": int(row % 5 == 0)}
        for row in range(ROWS)
    ]


def draw_questions(draw: random.Random) -> Records:
    """Draw questions with answers in their contexts."""
    records = []
    for row in range(ROWS):
        context = f"{draw_text(draw)} {row}"
        answer = draw.choice(context.split())
        answers = {"text": [answer], "answer_start": [context.index(answer)]}
        records.append({"question": draw_text(draw), "context": context, "answers": answers})
    return records


DRAWS = (draw_classes, draw_pairs, draw_label_sets, draw_tags, draw_ranking, draw_questions)


def write_records(file: Path, records: Records) -> None:
    """Write rows in the form that the ending of the file names."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        write_parquet(file, records)
    elif file.suffix == ".conll" and "tokens" in records[0]:
        columns = ([list_of(record.get(name)) for name in ("tokens", "tags")] for record in records)
        sentences = (zip(*column, strict=False) for column in columns)
        write_text(file, "\n".join("".join(f"{word}\t{tag}\n" for word, tag in sentence) for sentence in sentences))
    elif file.suffix in (".csv", ".tsv"):
        separator = "," if file.suffix == ".csv" else "\t"
        lines = [list(records[0]), *(list(record.values()) for record in records)]
        write_text(file, "\n".join(separator.join(write_cell(cell, separator) for cell in line) for line in lines))
    elif file.suffix == ".json":
        write_text(file, json.dumps(records))
    else:
        write_text(file, "".join(json.dumps(record) + "\n" for record in records))


def list_of(cell: Any) -> list[Any]:
    """Return a cell that should be a list as one."""
    return cell if isinstance(cell, list) else [cell]


def write_text(file: Path, text: str) -> None:
    """Write text, lone surrogates too."""
    file.write_bytes(text.encode("utf-8", "surrogatepass"))


def write_cell(cell: Any, separator: str) -> str:
    """Return a cell of a separated file; lists and objects are JSON."""
    text = json.dumps(cell) if isinstance(cell, list | dict) else str(cell)
    return '"' + text.replace('"', '""') + '"' if separator in text or '"' in text or "\n" in text else text


def write_parquet(file: Path, records: Records) -> None:
    """Write a parquet file, or JSON where arrow has no type for the cells."""
    import pyarrow
    from pyarrow import parquet

    try:
        parquet.write_table(pyarrow.Table.from_pylist(records), file)
    except (pyarrow.ArrowException, UnicodeError, OverflowError):
        write_text(file, json.dumps(records))


def alter_records(records: Records, draw: random.Random) -> str:
    """Change cells, or names of columns."""
    row = draw.randrange(len(records))
    name = draw.choice(list(records[0]))
    if draw.random() < 0.2:
        renamed = draw.choice((*records[0], "label", "text", "", " ", "TEXT", "id", "a" * 300, "é", "e\u0301"))
        for record in records:
            record[renamed] = record.pop(name, None)
        return f"column {name!r} named {renamed!r}"
    cell = draw.choice(ODD_CELLS)
    for changed in records if draw.random() < 0.15 else [records[row]]:
        if draw.random() < 0.1:
            changed.pop(name, None)
        else:
            changed[name] = [cell] if isinstance(changed.get(name), list) and draw.random() < 0.7 else cell
    return f"{name!r} of row {row} is {str(cell)[:40]!r}"


def alter_bytes(file: Path, draw: random.Random) -> str:
    """Flip, cut, insert, double or remove bytes."""
    content = file.read_bytes() or b"\0"
    start = draw.randrange(len(content))
    end = min(len(content), start + draw.choice((1, 2, 10, 100)))
    flipped = bytes((content[start] ^ (1 << draw.randrange(8)),))
    changes: dict[str, bytes] = {
        "flipped": content[:start] + flipped + content[start + 1 :],
        "cut": content[:start],
        "inserted": content[:start] + draw.choice(ODD_BYTES) + content[start:],
        "doubled": content[:end] + content[start:end] + content[end:],
        "removed": content[:start] + content[end:],
        "empty": b"",
        "in UTF-16": content.decode("utf-8", "replace").encode("utf-16"),
        "with carriage returns": content.replace(b"\n", b"\r\n"),
    }
    name = draw.choice(list(changes))
    file.write_bytes(changes[name])
    return f"bytes of {file.name} {name}"


def alter_names(folder: Path, file: Path, draw: random.Random) -> str:
    """Rename a file, copy it under another name, or add an odd one."""
    other = folder / draw.choice(NAMES)
    other.parent.mkdir(parents=True, exist_ok=True)
    match draw.randrange(4):
        case 0:
            file.rename(other)
        case 1:
            other.write_bytes(file.read_bytes())
        case 2:
            other.write_bytes(draw.choice((b"", b"{}", b"\n", b"a\tb\n", b"0\n1\n", b'{"text": "a"}\n')))
        case _:
            other = folder / f"{file.stem}.{draw.choice(ENDINGS)}".rstrip(".")
            file.rename(other)
    return f"{other.relative_to(folder)} beside {file.name}"


def make_case(folder: Path, draw: random.Random) -> tuple[Path, list[str]]:
    """Write the files of one round; return what --data names, and what was changed."""
    draw_records = draw.choice(DRAWS)
    endings = ("csv", "tsv", "jsonl", "parquet", "json")
    if draw_records in (draw_tags, draw_questions):
        endings = ("jsonl", "parquet", "json", "conll" if draw_records is draw_tags else "jsonl")
    ending = draw.choice(endings)
    changes = [draw_records.__name__, ending]
    names = draw.choice((("train",), ("train", "dev"), ("train", "dev", "test")))
    files = []
    for name in names:
        records = draw_records(draw)
        for _ in range(draw.choice((0, 0, 1, 1, 2))):
            changes.append(f"{name}: {alter_records(records, draw)}")
        files.append(folder / f"{name}.{ending}")
        write_records(files[-1], records)
    data = folder if len(files) > 1 else files[0]
    for _ in range(draw.choice((0, 0, 1))):
        file = draw.choice(files)
        if file.is_file():
            changes.append(alter_bytes(file, draw) if draw.random() < 0.6 else alter_names(folder, file, draw))
    return data, changes


def check_rows(splits: dict[str, Rows]) -> None:
    """Raise where a split is not whole."""
    for name, split in splits.items():
        for column in (split.first, split.second):
            texts = [] if column is None else list(column)
            if column is not None and len(texts) != len(split.labels):
                raise AssertionError(f"{name}: {len(texts)} texts, {len(split.labels)} labels")
            for text in texts:
                (text if isinstance(text, str) else " ".join(map(str, text))).encode()


def read_case(data: Path, folder: Path, draw: random.Random, *, pairs: bool) -> str:
    """Read a case as a run does; return the outcome."""
    fields: dict[str, Any] = {"task": "local", "data": str(data), "seed": draw.randrange(3)}
    if pairs:
        fields |= {"text": ("first", "second"), "label": "score"}
    if draw.random() < 0.2:
        fields["max_rows"] = draw.choice((2, 10))
    if draw.random() < 0.2:
        fields["test_share"] = 0.3
    others = [file for file in folder.rglob("*") if file.is_file()]
    if others and draw.random() < 0.2:
        fields |= {"unlabeled": str(draw.choice(others)), "unlabeled_share": 0.5}
    try:
        recipe = Recipe(**fields)
        check_header(recipe)
        check_rows(find_task(recipe).read_rows(recipe))
    except SpdError as error:
        if not str(error).strip():
            raise AssertionError("an error without a message") from error
        return "refused"
    return "read"


def fuzz_round(seed: int) -> tuple[str, str]:
    """Make and read the case of a seed; return the outcome, and what there is to say of a failure."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="fuzz-rows-") as name:
        data, changes = make_case(Path(name), draw)
        began = time.monotonic()
        try:
            outcome = read_case(data, Path(name), draw, pairs=draw_pairs.__name__ in changes)
        except Exception:
            return "failed", f"seed {seed}: {changes}\n{traceback.format_exc(limit=-4)}"
        if time.monotonic() - began > SLOW:
            return "slow", f"seed {seed}: {changes}: {time.monotonic() - began:.0f} s"
    return outcome, ""


def main() -> int:
    """Fuzz for some time; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--once", action="store_true", help="run the round of --seed alone")
    options = parser.parse_args()
    outcomes: Counter[str] = Counter()
    began, seed = time.monotonic(), options.seed
    while True:
        outcome, message = fuzz_round(seed)
        outcomes[outcome] += 1
        if message:
            print(message, flush=True)
        seed += 1
        if options.once or time.monotonic() - began > options.seconds:
            break
    print(f"rounds from seed {options.seed}: {dict(outcomes)}")
    return 1 if outcomes["failed"] or outcomes["slow"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
