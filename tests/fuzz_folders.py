"""Alter copies of exported folders at random, and open them: refused or harmless, never another answer or a traceback.

    python tests/fuzz_folders.py RUN [--count 500] [--seed 0]

Every kind of folder in RUN/export is altered `count` times as it is (verified by its manifest), and a quarter as often
with its manifest removed, where only `SpdError` or an answer may follow, whatever it is. Exit code 1: something was
opened with another answer, or ended in a traceback.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import spdtool
from spdtool.errors import SpdError

KINDS = ("student", "teacher", "bundle", "sparse-cpu/student", "onnx-int8/student")
JSON_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "manifest.json")
TEXTS = ["a very good film", "the bad book was cold", "good"]
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 10**9, 2**70, 0.5, 1e300, "", "0", "bad", "../x", "/etc/passwd", "\0", "\ud800",
    [], {}, [1], {"0": "a"}, ["a", "b"],
)  # fmt: skip
NAMES = ("special_tokens_map.json", "added_tokens.json", "vocab.txt", "notes.txt", "onnx/model.onnx_data", "x.json")


class Answers(NamedTuple):
    """What a folder answers."""

    labels: list[Any]
    logits: np.ndarray


def answer(folder: Path, *, unverified: bool = False) -> Answers:
    """Open a folder, and classify the texts."""
    classify = spdtool.load(folder, threads=1, unverified=unverified)
    pairs = TEXTS[::-1] if classify.text is not None and len(classify.text) == 2 else None
    logits = classify.logits(TEXTS, pairs)
    return Answers(classify.decide(logits), logits)


def alter(folder: Path, others: list[Path], chance: random.Random, *, only_json: bool = False) -> str:
    """Change one thing in a folder; return a description."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    file = chance.choice(files)
    changes: list[Callable[[], str]] = [lambda: edit_json(folder, chance)]
    if not only_json:
        changes += [
            lambda: flip_bit(file, chance),
            lambda: cut(file, chance),
            lambda: insert(file, chance),
            lambda: rename(file, folder, chance),
            lambda: swap(file, folder, chance.choice(others)),
            lambda: remove(file),
            lambda: add(folder, chance),
            lambda: repeat_key(folder, chance),
        ]
    return chance.choice(changes)()


def flip_bit(file: Path, chance: random.Random) -> str:
    """Flip one bit."""
    content = bytearray(file.read_bytes() or b"\0")
    place = chance.randrange(len(content))
    content[place] ^= 1 << chance.randrange(8)
    file.write_bytes(content)
    return f"a bit of {file.name} at {place}"


def cut(file: Path, chance: random.Random) -> str:
    """Cut the end off."""
    content = file.read_bytes()
    file.write_bytes(content[: chance.randrange(len(content) + 1)])
    return f"{file.name} cut"


def insert(file: Path, chance: random.Random) -> str:
    """Insert random bytes."""
    content = file.read_bytes()
    place = chance.randrange(len(content) + 1)
    file.write_bytes(content[:place] + chance.randbytes(chance.randrange(1, 9)) + content[place:])
    return f"bytes inserted into {file.name} at {place}"


def rename(file: Path, folder: Path, chance: random.Random) -> str:
    """Give a file the name of another one, or a new one."""
    names = [*NAMES, *(other.relative_to(folder).as_posix() for other in folder.rglob("*") if other.is_file())]
    target = folder / chance.choice(names)
    target.parent.mkdir(exist_ok=True)
    file.rename(target)
    return f"{file.name} renamed to {target.name}"


def swap(file: Path, folder: Path, other: Path) -> str:
    """Take the file of the same name from another folder."""
    source = other / file.relative_to(folder)
    if source.is_file():
        shutil.copyfile(source, file)
    return f"{file.name} of another folder"


def remove(file: Path) -> str:
    """Remove a file."""
    file.unlink()
    return f"{file.name} removed"


def add(folder: Path, chance: random.Random) -> str:
    """Add a file that was not exported."""
    name = chance.choice(NAMES)
    (folder / name).write_text(chance.choice(["", "{}", '{"pad_token": "good"}', "good\nbad\n"]))
    return f"{name} added"


def edit_json(folder: Path, chance: random.Random) -> str:
    """Put another value at a random path of a JSON file, or remove what is there."""
    file = folder / chance.choice([name for name in JSON_FILES if (folder / name).is_file()])
    content: Any = json.loads(file.read_text("utf-8"))
    node, path = content, []
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = chance.choice(keys)
        path.append(str(key))
        if isinstance(node[key], dict | list) and chance.random() < 0.7:
            node = node[key]
            continue
        if chance.random() < 0.2:
            del node[key]
        else:
            node[key] = chance.choice(VALUES)
        break
    file.write_text(json.dumps(content), "utf-8")
    return f"{file.name} at {'.'.join(path)}"


def repeat_key(folder: Path, chance: random.Random) -> str:
    """Say one thing twice, and differently."""
    file = folder / chance.choice([name for name in JSON_FILES if (folder / name).is_file()])
    text = file.read_text("utf-8").rstrip()
    key = chance.choice(list(json.loads(text)))
    file.write_text(f"{text[:-1]}, {json.dumps(key)}: {json.dumps(chance.choice(VALUES))}}}", "utf-8")
    return f"{file.name} says {key} twice"


def fuzz(
    folder: Path, others: list[Path], count: int, seed: int, *, unverified: bool = False
) -> tuple[Counter[str], list[str]]:
    """Alter copies of `folder`; return how many ended how, and what must not have happened."""
    expected, chance = answer(folder), random.Random(seed)
    outcomes: Counter[str] = Counter()
    failures = []
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy"
        for number in range(count):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(folder, copy)
            if unverified:
                (copy / "manifest.json").unlink()
            what = alter(copy, others, chance, only_json=unverified)
            try:
                answers = answer(copy, unverified=unverified)
            except SpdError:
                outcomes["refused"] += 1
                continue
            except BaseException as error:  # this is what is looked for, panics of Rust code too
                if isinstance(error, KeyboardInterrupt):
                    raise
                outcomes["traceback"] += 1
                failures.append(f"{number}: {what}: {type(error).__name__}: {error}")
                continue
            same = answers.labels == expected.labels and np.allclose(answers.logits, expected.logits, atol=1e-4)
            outcomes["same answer" if same else "another answer"] += 1
            if not same and not unverified:
                failures.append(f"{number}: {what}: another answer")
    return outcomes, failures


def main() -> int:
    """Fuzz every kind of folder of a run."""
    parser = argparse.ArgumentParser(description="Alter exported folders at random, and open them.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folders = [options.run / "export" / kind for kind in KINDS]
    folders = [folder for folder in folders if folder.is_dir()]
    failed = False
    for folder in folders:
        others = [other for other in folders if other != folder]
        for unverified, count in ((False, options.count), (True, options.count // 4)):
            outcomes, failures = fuzz(folder, others, count, options.seed, unverified=unverified)
            kind = f"{folder.relative_to(options.run)}{' without manifest' if unverified else ''}"
            sys.stdout.write(f"{kind}: {dict(outcomes)}\n" + "".join(f"  {line}\n" for line in failures))
            sys.stdout.flush()
            failed = failed or bool(failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
