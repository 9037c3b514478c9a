"""Measure which share of the computed positions is padding, for several ways to make batches.

    python benchmarks/padding.py cola mrpc rte sst2 qnli --data GLUE --model all-MiniLM-L6-v2

Counts the positions of training batches over three epochs. Packing rows without padding could save no more than the
share that the first column shows. Needs the GLUE files and a tokenizer folder.
"""

from __future__ import annotations

import argparse
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--data", help="folder of the GLUE files")
    parser.add_argument("--model", required=True, help="encoder folder whose tokenizer is taken")
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    from spdtool.data import tokens as data
    from spdtool.models.load import load_tokenizer
    from spdtool.recipe import reading as recipe
    from spdtool.tasks.prepare import find_task

    tokenizer = load_tokenizer(options.model)
    for number, name in enumerate(options.tasks):
        settings = recipe.build_recipe("default", {"task": name, "data": options.data})
        rows = data.tokenize(tokenizer, find_task(settings).read_rows(settings)["train"], settings.max_length)
        shares = padding_shares(rows.lengths, options.batch, settings.max_length)
        if number == 0:
            print("| task | rows | tokens a row |", " | ".join(shares), "|\n|" + "---|" * (3 + len(shares)))
        cells = [name, f"{len(rows):,}", f"{rows.lengths.mean():.1f}", *(f"{share:.1%}" for share in shares.values())]
        print("|", " | ".join(cells), "|", flush=True)


def padding_shares(lengths: Any, batch_size: int, max_length: int, epochs: int = 3) -> dict[str, float]:
    """Return the share of padding among all positions, by the way to make batches.

    Args:
        lengths: tokens of each row.
    """
    import numpy as np

    from spdtool.data import tokens as data
    from spdtool.data.batches import training_batches

    split = data.Encoded({}, np.concatenate([[0], np.cumsum(lengths)]), np.zeros(len(lengths)), {}, pad_left=False)

    def share(bucketing: bool, length: int | None) -> float:
        positions = 0
        for epoch in range(epochs):
            batches = training_batches(split, batch_size, 0, epoch, pool=50 if bucketing else None)
            positions += sum(len(batch) * int(length or lengths[batch].max()) for batch in batches)
        return 1 - epochs * int(lengths.sum()) / positions

    return {
        "batches of like length": share(True, None),
        "random batches": share(False, None),
        f"all padded to {max_length}": share(False, max_length),
    }


if __name__ == "__main__":
    main()
