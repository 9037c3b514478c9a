"""Hold out training rows of SST-2 as a large test set, and compare checkpoints on it row by row.

    python benchmarks/held_out.py split GLUE/SST-2/train.tsv --trained train-12k.tsv --rows 6000 --to runs/held-out
    python benchmarks/held_out.py score runs/held-out/test.tsv teacher=RUN/teacher default=RUN/finetune ...

SST-2's dev set has 872 rows, on which two students must differ by three points before it means anything. Its training
file holds phrases, many of them parts of others. So `split` takes only rows of which none contains, or is contained in,
a row that was trained on. It writes `test.tsv`, and `texts.txt`: all other sentences without their labels, without
those that contain a test row or are contained in one.

`score` prints the accuracy of each checkpoint, and its difference to the first one with a 95 % interval. Both answer
the same rows, so the interval is that of the mean of the rows' own differences, and narrower than that of two scores.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from glue import SPLIT_SEED, TASKS, predict, read_rows

NORMAL_95 = 1.96  # standard errors to either side
TASK = TASKS["sst2"]


def list_phrases(sentence: str) -> set[str]:
    """Return every run of neighbouring words of a sentence, itself included."""
    words = sentence.split()
    ends = range(1, len(words) + 1)
    return {" ".join(words[start:end]) for end in ends for start in range(end)}


class Overlap:
    """Sentences, and all that they contain; says whether another one contains, or is contained in, any of them."""

    def __init__(self, sentences: Iterable[str]) -> None:
        self._sentences = {" ".join(sentence.split()) for sentence in sentences}
        self._phrases = set[str]().union(*map(list_phrases, self._sentences))

    def touches(self, sentence: str) -> bool:
        """Whether one of the two is a part of the other."""
        return " ".join(sentence.split()) in self._phrases or not self._sentences.isdisjoint(list_phrases(sentence))


def split(options: argparse.Namespace) -> None:
    """Write the test rows, and the sentences without labels."""
    (sentences,), labels = read_rows(TASK, options.train)
    (trained_sentences,), _ = read_rows(TASK, options.trained)
    trained = Overlap(trained_sentences)
    candidates = {sentence.strip(): label for sentence, label in zip(sentences, labels, strict=True)}
    free = [sentence for sentence in candidates if not trained.touches(sentence)]
    if len(free) < options.rows:
        raise SystemExit(f"only {len(free):,} rows have nothing in common with {options.trained}")
    random.Random(SPLIT_SEED).shuffle(free)
    tested = free[: options.rows]
    test = Overlap(tested)
    texts = [sentence for sentence in candidates if not test.touches(sentence)]
    options.to.mkdir(parents=True, exist_ok=True)
    lines = ["sentence\tlabel", *(f"{sentence}\t{candidates[sentence]}" for sentence in tested)]
    (options.to / "test.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    (options.to / "texts.txt").write_text("\n".join(texts) + "\n", "utf-8")
    print(f"{options.to}: {len(tested):,} of {len(free):,} possible test rows, {len(texts):,} texts without labels")


def compare(gold: Sequence[int], first: Sequence[int], second: Sequence[int]) -> tuple[float, float]:
    """Return the difference of two accuracies, second minus first, and the half width of its 95 % interval."""
    answers = zip(gold, first, second, strict=True)
    differences = [(label == at_second) - (label == at_first) for label, at_first, at_second in answers]
    return statistics.fmean(differences), NORMAL_95 * statistics.stdev(differences) / len(differences) ** 0.5


def score(options: argparse.Namespace) -> None:
    """Print a table of the checkpoints."""
    columns, gold = read_rows(TASK, options.test)
    if options.unread is not None:
        read = Overlap(options.unread.read_text("utf-8").splitlines())
        rows = [row for row, sentence in enumerate(columns[0]) if not read.touches(sentence)]
        columns, gold = [[column[row] for row in rows] for column in columns], [gold[row] for row in rows]
    first: list[int] | None = None
    print(f"| {len(gold):,} rows | accuracy | to the first | 95 % interval |\n|---|---|---|---|", flush=True)
    for argument in options.checkpoints:
        name, _, checkpoint = argument.rpartition("=")
        predictions = predict(Path(checkpoint), columns)
        accuracy = statistics.fmean(label == answer for label, answer in zip(gold, predictions, strict=True))
        cells = [name, f"{100 * accuracy:.2f}", "", ""]
        if first is None:
            first = predictions
        else:
            difference, half_width = compare(gold, first, predictions)
            cells[2:] = [f"{100 * difference:+.2f}", f"± {100 * half_width:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Run one of the two subcommands."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    splitting = commands.add_parser("split", help="write test rows, and sentences without labels")
    splitting.add_argument("train", type=Path, help="SST-2's train.tsv")
    splitting.add_argument("--trained", type=Path, required=True, help="its rows that are trained on, as tsv")
    splitting.add_argument("--rows", type=int, default=6000)
    splitting.add_argument("--to", type=Path, required=True)
    splitting.set_defaults(run=split)
    scoring = commands.add_parser("score", help="compare checkpoints")
    scoring.add_argument("test", type=Path)
    scoring.add_argument("--unread", type=Path, help="leave out rows that have something in common with these lines")
    scoring.add_argument("checkpoints", nargs="+", help="NAME=FOLDER; the others are compared with the first")
    scoring.set_defaults(run=score)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
