"""How this process computes: the number of threads, and the last bits of what it calculates.

The same recipe gives the same weights only where sums are added in the same order. That depends on
the number of threads, on the processor, and on switches in the environment (MKL_CBWR,
ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY and more than can be listed). So it is not listed but
measured: a fixed calculation, and the hash of its bits.
"""

from __future__ import annotations

import hashlib
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from spdtool.models import onednn

WIDTH = 384  # of the layers in the calculation, as small encoders have; edges of blocks come with the odd row numbers
ROWS = (1, 7, 64, 333)


def probe_arithmetic(device: torch.device | str = "cpu") -> str:
    """Hash the bits of a fixed calculation: equal hashes compute equal weights.

    It has the products, functions and sums of an encoder layer, forward and backward, and takes a
    tenth of a second.
    """
    return _probe(torch.device(device), torch.get_num_threads())


@cache
@torch.enable_grad()
def _probe(device: torch.device, _threads: int) -> str:
    digest = hashlib.blake2b(digest_size=8)
    weight = _numbers(4 * WIDTH, WIDTH).to(device).requires_grad_()
    for rows in ROWS:
        inputs = _numbers(rows, WIDTH).to(device)
        hidden = F.gelu(F.linear(inputs, weight))
        scores = torch.softmax(hidden @ hidden.T, -1)
        normalized = F.layer_norm(scores @ hidden, (4 * WIDTH,))
        loss = (torch.tanh(normalized).square().mean() + F.log_softmax(hidden, -1).sum(0).mean()).exp()
        (gradient,) = torch.autograd.grad(loss, weight)
        results = [loss, gradient, scores, normalized.norm()]
        if gradient.device.type == "cpu":
            results.append(onednn.multiply(inputs, weight.detach()))
        for result in results:
            digest.update(result.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _numbers(rows: int, columns: int) -> Tensor:
    """Return fixed numbers in [-0.5, 0.5): torch's generators stay as they are."""
    numbers = torch.arange(rows * columns, dtype=torch.int64)
    return ((numbers * 7919 % 10007).double() / 10007 - 0.5).float().view(rows, columns)
