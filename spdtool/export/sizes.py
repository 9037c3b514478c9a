"""Bytes that exported files will have, from the number of parameters: for the plan, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable

from spdtool import plugins
from spdtool.export.target import ChosenTarget
from spdtool.recipe.fields import Recipe
from spdtool.run.records import WeightCounts

BYTES = {"fp32": 4, "fp16": 2, "int8": 1, "int6": 0.75}
INDEX_BYTES = 1  # beside each weight that a packed matrix keeps: which column it belongs to
GRAPH_BYTES = 20_000  # nodes and names of a small model


def estimate_files(
    recipe: Recipe, chosen: Iterable[ChosenTarget], counts: WeightCounts, embeddings: int
) -> dict[str, int]:
    """Return the bytes of the student in the form of each target, by its name; right to about a fifth.

    Args:
        embeddings: weights of the word embeddings.
    """
    packing = plugins.library_targets()  # only their operators read matrices without zeros
    graph_weights = counts.prunable
    if recipe.removes_structures:
        graph_weights -= counts.zeros
    sizes = {}
    for choice in chosen:
        formats = choice.target.storage_formats(recipe)
        matrix_bytes = BYTES.get(formats.matrices, 4) * graph_weights
        if choice.name in packing:
            matrix_bytes = (BYTES.get(formats.matrices, 4) + INDEX_BYTES) * (counts.prunable - counts.zeros)
        embedding_bytes = BYTES.get(formats.embeddings, 4) * embeddings
        others = 4 * (counts.all - counts.prunable - embeddings)
        sizes[choice.name] = int(matrix_bytes + embedding_bytes + others + GRAPH_BYTES)
    return sizes
