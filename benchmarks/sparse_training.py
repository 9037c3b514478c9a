"""Time the three products of a linear layer in training with skipped zeros, against dense products.

    python benchmarks/sparse_training.py --zeros 0.5 0.7 0.9 --tokens 350 1700
    SPDTOOL_SPARSE_CPU_ISA=avx2 python benchmarks/sparse_training.py

One thread, CPU time, medians of interleaved rounds. Dense is the faster of torch's own product and oneDNN's, for each.
`of dense`: forward, input gradient, weight gradient; then all three (dense / sparse, with the spread over the rounds),
and forward and input gradient sparse with a dense weight gradient, as for a criterion that reads gradients of dead
weights. Needs the plugin spdtool-sparse-cpu with its compiled library.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from spdtool_sparse_cpu import library
from spdtool_sparse_cpu.products import Products
from torch import Tensor
from torch.nn import functional as F

# [outputs x inputs] of the layers of MiniLM (width 384) and BERT base (width 768)
SHAPES = ("384x384", "1536x384", "384x1536", "768x768", "3072x768", "768x3072")
Work = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=SHAPES, metavar="OUTxIN")
    parser.add_argument("--tokens", nargs="*", type=int, default=[350, 1700])
    parser.add_argument("--zeros", nargs="*", type=float, default=[0.5, 0.7, 0.9, 0.95])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"kernels: {library.isa()}\n")
    print("| matrix | tokens | zeros | dense ms, GFLOP/s | of dense | sparse ms | all three | dense dW | index ms |")
    print("|---|---|---|---|---|---|---|---|---|")
    for shape in options.shapes:
        outputs, inputs = (int(word) for word in shape.split("x"))
        for tokens in options.tokens:
            for zeros in options.zeros:
                compare(outputs, inputs, tokens, zeros, options.rounds)


def compare(outputs: int, inputs: int, tokens: int, zeros: float, rounds: int) -> None:
    """Print a row of the table."""
    torch.manual_seed(0)
    dead = torch.rand(outputs, inputs) < zeros
    weight, bias = torch.randn(outputs, inputs).masked_fill(dead, 0), torch.randn(outputs)
    x, gradient = torch.randn(tokens, inputs), torch.randn(tokens, outputs)
    indexing = seconds(lambda: Products(dead), 1)
    products = Products(dead)
    _, tiles = products.forward(weight, bias, x, keep_tiles=True)
    sparse: list[Work] = [
        lambda: products.forward(weight, bias, x, keep_tiles=True),
        lambda: products.backward(weight, gradient, None, needs_x=True),
        lambda: products.backward(weight, gradient, tiles, needs_x=False),
        lambda: products.backward(weight, gradient, tiles, needs_x=True),
    ]
    dense = [
        *dense_products(x, weight, bias),
        *dense_products(gradient, weight.t(), None),
        *dense_products(gradient.t(), x.t(), None),
    ]
    repeats = max(1, int(2e-2 / seconds(dense[0], 1)))
    rounds_of_times = [[seconds(call, repeats) for call in (*sparse, *dense)] for _ in range(rounds)]
    product_shares, all_sparse, dense_last = zip(*(compare_products(times) for times in rounds_of_times), strict=True)
    shares = " ".join(f"{statistics.median(share):.2f}" for share in zip(*product_shares, strict=True))
    total = statistics.median(dense_seconds(times) for times in rounds_of_times)
    speed = 6e-9 * outputs * inputs * tokens / total  # GFLOP/s: three products of two operations for each weight
    sparse_seconds = statistics.median(times[0] + times[3] for times in rounds_of_times)
    print(
        f"| {outputs} x {inputs} | {tokens} | {zeros:.0%} | {1e3 * total:.2f}, {speed:.0f} | {shares} | "
        f"{1e3 * sparse_seconds:.2f} | {spread(all_sparse)} | {spread(dense_last)} | {1e3 * indexing:.1f} |",
        flush=True,
    )


def dense_products(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Work]:
    """Return the product in torch and in oneDNN."""
    times = torch.ops.mkldnn._linear_pointwise
    return [lambda: F.linear(x, weight, bias), lambda: times(x, weight, bias, "none", [], "")]


def dense_seconds(times: list[float]) -> float:
    """Sum the seconds of the faster dense form of each product."""
    return sum(min(times[index], times[index + 1]) for index in (4, 6, 8))


def compare_products(times: list[float]) -> tuple[list[float], float, float]:
    """Return each product's share of the dense time, the speedup of all three, and with a dense weight gradient."""
    best = [min(times[index], times[index + 1]) for index in (4, 6, 8)]
    shares = [sparse_time / dense_time for sparse_time, dense_time in zip(times[:3], best, strict=True)]
    return shares, sum(best) / (times[0] + times[3]), sum(best) / (times[0] + times[1] + best[2])


def spread(ratios: tuple[float, ...]) -> str:
    """Format the median with the smallest and the largest ratio."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def seconds(call: Work, repeats: int) -> float:
    """Measure the CPU seconds of one call."""
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


if __name__ == "__main__":
    main()
