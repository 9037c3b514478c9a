"""What the three products of a linear layer take in training when zeros are skipped, against dense ones.

    python benchmarks/sparse_training.py --zeros 0.5 0.7 0.9 --tokens 350 1700
    SPDTOOL_SPARSE_CPU_ISA=avx2 python benchmarks/sparse_training.py

One thread, CPU time, medians of interleaved rounds. Dense is the faster of torch's own product and oneDNN's, for each.
`of dense`: forward, input gradient, weight gradient; then all three (dense / sparse, with the spread over the rounds),
and forward and input gradient sparse beside a dense weight gradient, as where a criterion reads gradients of the dead.
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
    made = Products(dead)
    _, tiles = made.forward(weight, bias, x, keep_tiles=True)
    sparse: list[Work] = [
        lambda: made.forward(weight, bias, x, keep_tiles=True),
        lambda: made.backward(weight, gradient, None, needs_x=True),
        lambda: made.backward(weight, gradient, tiles, needs_x=False),
        lambda: made.backward(weight, gradient, tiles, needs_x=True),
    ]
    dense = [
        *ways(x, weight, bias),
        *ways(gradient, weight.t(), None),
        *ways(gradient.t(), x.t(), None),
    ]
    repeats = max(1, int(2e-2 / seconds(dense[0], 1)))
    found = [[seconds(work, repeats) for work in (*sparse, *dense)] for _ in range(rounds)]
    of, both, slow = zip(*(parts(each) for each in found), strict=True)
    shares = " ".join(f"{statistics.median(share):.2f}" for share in zip(*of, strict=True))
    total = statistics.median(whole(each) for each in found)
    speed = 6e-9 * outputs * inputs * tokens / total
    print(
        f"| {outputs} x {inputs} | {tokens} | {zeros:.0%} | {1e3 * total:.2f}, {speed:.0f} | {shares} | "
        f"{1e3 * statistics.median(each[0] + each[3] for each in found):.2f} | {spread(both)} | {spread(slow)} | "
        f"{1e3 * indexing:.1f} |",
        flush=True,
    )


def ways(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Work]:
    """Both libraries' product."""
    times = torch.ops.mkldnn._linear_pointwise
    return [lambda: F.linear(x, weight, bias), lambda: times(x, weight, bias, "none", [], "")]


def whole(times: list[float]) -> float:
    """Seconds of the three dense products."""
    return sum(min(times[at], times[at + 1]) for at in (4, 6, 8))


def parts(times: list[float]) -> tuple[list[float], float, float]:
    """Each product's share of the dense one; how many times as fast all three are, and so with a dense third one."""
    best = [min(times[at], times[at + 1]) for at in (4, 6, 8)]
    shares = [mine / its for mine, its in zip(times[:3], best, strict=True)]
    return shares, sum(best) / (times[0] + times[3]), sum(best) / (times[0] + times[1] + best[2])


def spread(ratios: tuple[float, ...]) -> str:
    """The median with the least and the largest."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def seconds(work: Work, repeats: int) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - start) / repeats


if __name__ == "__main__":
    main()
