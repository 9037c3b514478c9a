"""Compare two solvers of a layerwise prune event: rows padded to the longest of the matrix, and to the longest near.

    python benchmarks/row_solvers.py --model FOLDER

Without a model the inputs are random, with a spectrum that decays. Prints, for each matrix and share of zeros, the
processor seconds of each solver and the largest difference of a weight, relative to the largest weight.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from spdtool.pruning.second_order import factorize, layerwise, solve_rows
from spdtool.pruning.statistics import Stats

SENTENCES = Path(__file__).parents[1] / "docs"


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of an encoder whose real inputs are taken")
    parser.add_argument("--rows", type=int, default=10_000, help="rows of each matrix to solve")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.7, 0.8, 0.9], help="shares of zeros")
    return parser.parse_args()


def random_matrices() -> dict[str, tuple[Tensor, Tensor]]:
    """Return name to weight and second moment of the inputs, random."""
    matrices = {}
    for width in (384, 1536):
        basis = torch.randn(width, width) / width**0.5
        inputs = torch.randn(4 * width, width) * torch.logspace(0.7, -1, width) @ basis
        matrices[f"random {width}"] = 0.05 * torch.randn(384, width), inputs.T @ inputs / len(inputs)
    return matrices


def model_matrices(folder: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return name to weight and second moment of the inputs, of the first and last layer of an encoder."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    depth = model.config.num_hidden_layers
    grams: dict[str, Tensor] = {}
    layers = {}
    for name, module in model.named_modules():
        is_chosen = any(f".layer.{index}." in f".{name}" for index in (0, depth - 1))
        if is_chosen and isinstance(module, torch.nn.Linear):
            layers[name] = module

    def watch(name: str) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], None]:
        def add(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            tokens = inputs[0].reshape(-1, inputs[0].shape[-1])
            grams[name] = grams.get(name, torch.zeros(())) + tokens.T @ tokens

        return add

    for name, module in layers.items():
        module.register_forward_pre_hook(watch(name))
    lines = []
    for file in sorted(SENTENCES.rglob("*.md")):
        lines += [line.strip() for line in file.read_text("utf-8").splitlines() if len(line) > 60]
    with torch.no_grad():
        for start in range(0, min(len(lines), 400), 32):
            model(**tokenizer(lines[start : start + 32], return_tensors="pt", padding=True, truncation=True))
    return {name: (module.weight.detach(), grams[name]) for name, module in layers.items()}


def solve_padded(matrix: Tensor, wanted: Tensor, sets: Tensor) -> Tensor:
    """Solve as `solve_rows` did until 2026-11-30: in the order of the rows, 2^25 numbers at a time."""
    longest = int(sets.sum(1).max())
    solution = torch.zeros_like(wanted)
    members = sets.byte().sort(dim=1, descending=True, stable=True).indices[:, :longest]
    length = max(1, 2**25 // longest**2)
    chunks = (torch.split(tensor, length) for tensor in (members, wanted, solution, sets))
    for columns, row, into, is_in_set in zip(*chunks, strict=True):
        is_member = is_in_set.gather(1, columns)
        system = matrix[columns.unsqueeze(2), columns.unsqueeze(1)]
        system.mul_(is_member.unsqueeze(2)).mul_(is_member.unsqueeze(1)).diagonal(dim1=-2, dim2=-1).add_(~is_member)
        targets = (row.gather(1, columns) * is_member).unsqueeze(2)
        into.scatter_(1, columns, torch.cholesky_solve(targets, factorize(system)).squeeze(2))
    return solution


def timed(solve: Callable[..., Tensor], *operands: Tensor) -> tuple[float, Tensor]:
    """Return the processor seconds of a solver, and its solution."""
    started = time.process_time()
    solution = solve(*operands)
    seconds = time.process_time() - started
    return seconds, solution


def main() -> None:
    """Print a table."""
    arguments = read_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    matrices = model_matrices(arguments.model) if arguments.model else random_matrices()
    print("| matrix | zeros | padded to the longest, s | to the longest near, s | ratio | largest difference |")
    print("|---|---|---|---|---|---|")
    totals = [0.0, 0.0]
    for name, (weight, gram) in matrices.items():
        gram.diagonal().add_(0.01 * gram.diagonal().mean())
        scores = layerwise(weight, Stats(input_gram=gram))
        for share in arguments.shares:
            least = scores.flatten().kthvalue(int(share * scores.numel())).values
            rows, alive = weight[: arguments.rows], (scores > least)[: arguments.rows]
            wanted = (rows * ~alive) @ gram
            before, padded = timed(solve_padded, gram, wanted, alive)
            now, solved = timed(solve_rows, gram, wanted, alive)
            difference = float((solved - padded).abs().max() / ((rows + padded) * alive).abs().max())
            totals = [totals[0] + before, totals[1] + now]
            print(
                f"| {name} | {share:.0%} | {before:.2f} | {now:.2f} | {before / now:.1f} | {difference:.0e} |",
                flush=True,
            )
    print(f"| all | | {totals[0]:.2f} | {totals[1]:.2f} | {totals[0] / totals[1]:.1f} | |")


if __name__ == "__main__":
    main()
