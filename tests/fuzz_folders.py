"""Fuzz exported folders: a randomly altered copy must be refused or give the same answer, never a traceback.

    python tests/fuzz_folders.py RUN [--count 500] [--seed 0]

Every kind of folder in RUN/export is altered `count` times with its manifest, which verifies it, and `count` / 4 times
without a manifest, where any answer is allowed. Exit code 1: another answer (with a manifest) or a traceback.
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

JSON_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "manifest.json")
TEXTS = ["a very good film", "the bad book was cold", "good"]
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 10**9, 2**70, 0.5, 1e300, "", "0", "bad", "../x", "/etc/passwd", "\0", "\ud800",
    [], {}, [1], {"0": "a"}, ["a", "b"],
)  # fmt: skip
NAMES = ("special_tokens_map.json", "added_tokens.json", "vocab.txt", "notes.txt", "onnx/model.onnx_data", "x.json")


class Answers(NamedTuple):
    """Predictions of the model in a folder."""

    labels: list[Any]
    logits: np.ndarray


def answer(folder: Path, *, unverified: bool = False) -> Answers:
    """Open a folder, and classify the texts."""
    classify = spdtool.load(folder, threads=1, unverified=unverified)
    pairs = TEXTS[::-1] if classify.text is not None and len(classify.text) == 2 else None
    logits = classify.logits(TEXTS, pairs)
    return Answers(classify.decide(logits), logits)


def alter(folder: Path, other_folders: list[Path], draw: random.Random, *, only_json: bool = False) -> str:
    """Change one thing in a folder; return a description."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    file = draw.choice(files)
    changes: list[Callable[[], str]] = [lambda: edit_json(folder, draw)]
    if not only_json:
        changes += [
            lambda: flip_bit(file, draw),
            lambda: cut(file, draw),
            lambda: insert(file, draw),
            lambda: rename(file, folder, draw),
            lambda: swap(file, folder, draw.choice(other_folders)),
            lambda: remove(file),
            lambda: add(folder, draw),
            lambda: repeat_key(folder, draw),
        ]
    return draw.choice(changes)()


def flip_bit(file: Path, draw: random.Random) -> str:
    """Flip one bit."""
    content = bytearray(file.read_bytes() or b"\0")
    position = draw.randrange(len(content))
    content[position] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    return f"a bit of {file.name} at {position}"


def cut(file: Path, draw: random.Random) -> str:
    """Cut the end off."""
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(len(content) + 1)])
    return f"{file.name} cut"


def insert(file: Path, draw: random.Random) -> str:
    """Insert random bytes."""
    content = file.read_bytes()
    position = draw.randrange(len(content) + 1)
    file.write_bytes(content[:position] + draw.randbytes(draw.randrange(1, 9)) + content[position:])
    return f"bytes inserted into {file.name} at {position}"


def rename(file: Path, folder: Path, draw: random.Random) -> str:
    """Give a file the name of another one, or a new one."""
    names = [*NAMES, *(existing.relative_to(folder).as_posix() for existing in folder.rglob("*") if existing.is_file())]
    target = folder / draw.choice(names)
    target.parent.mkdir(exist_ok=True)
    file.rename(target)
    return f"{file.name} renamed to {target.name}"


def swap(file: Path, folder: Path, other_folder: Path) -> str:
    """Take the file of the same name from another folder."""
    source = other_folder / file.relative_to(folder)
    if source.is_file():
        shutil.copyfile(source, file)
    return f"{file.name} of another folder"


def remove(file: Path) -> str:
    """Remove a file."""
    file.unlink()
    return f"{file.name} removed"


def add(folder: Path, draw: random.Random) -> str:
    """Add a file that was not exported."""
    name = draw.choice(NAMES)
    (folder / name).write_text(draw.choice(["", "{}", '{"pad_token": "good"}', "good\nbad\n"]))
    return f"{name} added"


def edit_json(folder: Path, draw: random.Random) -> str:
    """Replace or remove the value at a random path of a JSON file."""
    file = folder / draw.choice([name for name in JSON_FILES if (folder / name).is_file()])
    content: Any = json.loads(file.read_text("utf-8"))
    node, path = content, []
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = draw.choice(keys)
        path.append(str(key))
        if isinstance(node[key], dict | list) and draw.random() < 0.7:
            node = node[key]
            continue
        if draw.random() < 0.2:
            del node[key]
        else:
            node[key] = draw.choice(VALUES)
        break
    file.write_text(json.dumps(content), "utf-8")
    return f"{file.name} at {'.'.join(path)}"


def repeat_key(folder: Path, draw: random.Random) -> str:
    """Repeat a key of a JSON file with another value."""
    file = folder / draw.choice([name for name in JSON_FILES if (folder / name).is_file()])
    text = file.read_text("utf-8").rstrip()
    key = draw.choice(list(json.loads(text)))
    file.write_text(f"{text[:-1]}, {json.dumps(key)}: {json.dumps(draw.choice(VALUES))}}}", "utf-8")
    return f"{file.name} says {key} twice"


def fuzz(
    folder: Path, other_folders: list[Path], count: int, seed: int, *, unverified: bool = False
) -> tuple[Counter[str], list[str]]:
    """Alter copies of `folder`; return the counts of the outcomes, and descriptions of the failures."""
    expected, draw = answer(folder), random.Random(seed)
    outcomes: Counter[str] = Counter()
    failures = []
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy"
        for number in range(count):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(folder, copy)
            if unverified:
                (copy / "manifest.json").unlink()
            description = alter(copy, other_folders, draw, only_json=unverified)
            try:
                answers = answer(copy, unverified=unverified)
            except SpdError:
                outcomes["refused"] += 1
                continue
            except BaseException as error:  # the faults to find, panics of Rust code included
                if isinstance(error, KeyboardInterrupt):
                    raise
                outcomes["traceback"] += 1
                failures.append(f"{number}: {description}: {type(error).__name__}: {error}")
                continue
            is_same = answers.labels == expected.labels and np.allclose(answers.logits, expected.logits, atol=1e-4)
            outcomes["same answer" if is_same else "another answer"] += 1
            if not is_same and not unverified:
                failures.append(f"{number}: {description}: another answer")
    return outcomes, failures


def main() -> int:
    """Fuzz every kind of folder of a run."""
    parser = argparse.ArgumentParser(description="Alter exported folders at random, and open them.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folders = sorted(manifest.parent for manifest in (options.run / "export").rglob("manifest.json"))
    if not folders:
        parser.error(f"{options.run} has no exported folder")
    failed = False
    for folder in folders:
        other_folders = [other_folder for other_folder in folders if other_folder != folder]
        for unverified, count in ((False, options.count), (True, options.count // 4)):
            outcomes, failures = fuzz(folder, other_folders, count, options.seed, unverified=unverified)
            kind = f"{folder.relative_to(options.run)}{' without manifest' if unverified else ''}"
            sys.stdout.write(f"{kind}: {dict(outcomes)}\n" + "".join(f"  {line}\n" for line in failures))
            sys.stdout.flush()
            failed = failed or bool(failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
