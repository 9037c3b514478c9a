"""Tables of the ledger: by layer for the terminal, by matrix for the report."""

from __future__ import annotations

from collections.abc import Sequence

from spdtool.run.records import Cell, LedgerEntry, ProductTimes

LEDGER_NOTE = (
    "One thread; one product at a time, repeated, so that its weights are in the cache: a dense one in onnxruntime, "
    "less what a model takes that does nothing; a sparse one as it runs inside the encoder. Matrices of equal shape "
    "whose densities agree to a percent share one timing. GFLOP/s of a sparse product count the weights there are. "
    "The bound is the larger of these operations at the measured peak and the packed weights at the measured bandwidth."
)


def ledger_table(entries: Sequence[LedgerEntry]) -> tuple[list[str], list[list[Cell]]]:
    """Columns and rows of the ledger by layer, at its largest number of tokens: sums over the layer's matrices."""
    tokens = max(entries[0].products)
    columns = ["layer", "nonzeros", "density", "dense bytes", "sparse bytes"]
    columns += [f"dense us ({tokens} tokens)", "sparse us", "speed", "bound us"]
    layers: dict[str, list[LedgerEntry]] = {}
    for entry in entries:
        layers.setdefault(entry.layer, []).append(entry)
    return columns, [layer_row(name, matrices, tokens) for name, matrices in layers.items()]


def layer_row(name: str, matrices: Sequence[LedgerEntry], tokens: int) -> list[Cell]:
    """One row of the ledger by layer."""
    products = [matrix.products[tokens] for matrix in matrices]
    nonzeros = sum(matrix.nonzeros for matrix in matrices)
    density = nonzeros / sum(matrix.rows * matrix.columns for matrix in matrices)
    dense_us = sum(product.dense_us for product in products)
    row: list[Cell] = [name, nonzeros, f"{density:.2%}", sum(matrix.dense_bytes for matrix in matrices)]
    row.append(sum_or_dash([matrix.sparse_bytes for matrix in matrices]))
    sparse_us = sum_or_dash([product.sparse_us for product in products])
    speed = "-" if isinstance(sparse_us, str) else f"{dense_us / sparse_us:.2f}x"
    return [*row, dense_us, sparse_us, speed, sum(product.bound_us for product in products)]


def sum_or_dash(values: Sequence[float | None]) -> float | str:
    """Sum of the values, or a dash if one of them is missing."""
    total: float = 0
    for value in values:
        if value is None:
            return "-"
        total += value
    return total


def matrix_table(entries: Sequence[LedgerEntry]) -> str:
    """The whole ledger as a Markdown table: every matrix at every number of tokens."""
    columns = ["matrix", "size", "nonzeros", "density", "dense bytes", "sparse bytes", "tokens"]
    columns += ["dense us", "GFLOP/s", "sparse us", "GFLOP/s", "speed", "bound us", "of the bound"]
    rows: list[list[Cell]] = []
    for entry in entries:
        matrix: list[Cell] = [entry.name, f"{entry.rows}x{entry.columns}", entry.nonzeros, f"{entry.density:.2%}"]
        matrix += [entry.dense_bytes, "-" if entry.sparse_bytes is None else entry.sparse_bytes]
        for tokens, product in entry.products.items():
            dense: list[Cell] = [tokens, f"{product.dense_us:.1f}", f"{product.dense_flops / 1e9:.1f}"]
            rows.append([*matrix, *dense, *sparse_cells(product)])
    return markdown_table(columns, rows)


def sparse_cells(product: ProductTimes) -> list[Cell]:
    """Cells of a sparse product; dashes for a matrix without a sparse form."""
    bound = f"{product.bound_us:.1f}"
    if product.sparse_us is None or product.sparse_flops is None:
        return ["-", "-", "-", bound, "-"]
    cells: list[Cell] = [f"{product.sparse_us:.1f}", f"{product.sparse_flops / 1e9:.1f}", f"{product.ratio:.2f}x"]
    return [*cells, bound, f"{product.bound_us / product.sparse_us:.0%}"]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A Markdown table; floats have four digits."""
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        lines.append([f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
