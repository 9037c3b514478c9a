"""What the ranks of a job exchange: sums of tensors, the main process's tensors, and a place to wait.

With one process every function returns at once. All ranks must call the same functions in the same order.

Gradients are summed here, once a step, rather than by `DistributedDataParallel`, for three reasons: the parameters
that get a gradient change with each draw of grafted layers; some of them lie outside the model (projections, and the
stand-ins that count in the clipped norm); and a step's pieces are weighted by their share of the whole batch, which
DDP's mean over ranks would undo. The price is that the sum does not overlap with the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from spdtool.errors import PeerLost

BUCKET = 2**25  # numbers that travel together


def count() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This one's number, from 0."""
    return dist.get_rank() if count() > 1 else 0


def wait() -> None:
    """Return when every rank has come here.

    Raises:
        PeerLost: one of them has ended.
    """
    if count() > 1:
        with _peers():
            dist.all_reduce(flag := torch.zeros(1, device=_device()))
            flag.item()  # a device's queue would let us pass


@torch.no_grad()
def total(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor, in place, by its sum over the ranks; shapes and order are the same on all of them.

    Raises:
        PeerLost: a rank has ended.
    """
    if count() > 1:
        with _peers():
            sent = [(bucket, _flat(bucket)) for bucket in _buckets(tensors)]
            for work in [dist.all_reduce(flat, async_op=True) for _, flat in sent]:
                work.wait()
            for bucket, flat in sent:
                _spread(flat, bucket)


@torch.no_grad()
def from_main(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor, in place, by the main process's.

    Raises:
        PeerLost: a rank has ended.
    """
    if count() > 1:
        with _peers():
            for bucket in _buckets(tensors):
                flat = _flat(bucket)
                dist.broadcast(flat, src=0)
                _spread(flat, bucket)


def total_array(array: np.ndarray) -> np.ndarray:
    """The sum over the ranks of an array that each has its own of."""
    tensor = torch.from_numpy(array).to(_device())
    total([tensor])
    return tensor.cpu().numpy()


def gradients(parameters: Iterable[torch.nn.Parameter]) -> list[Tensor]:
    """The gradients of those parameters that have one: the same parameters on every rank, as the draw is the same."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type and device together, in order, up to `BUCKET` numbers; bool travels as bytes."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        tensor = tensor.detach()
        plain = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
        bucket = kinds.setdefault((plain.dtype, plain.device), [])
        if bucket and sum(map(torch.numel, bucket)) + plain.numel() > BUCKET:
            yield bucket
            bucket = kinds[plain.dtype, plain.device] = []
        bucket.append(plain)
    yield from kinds.values()


def _flat(bucket: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in bucket])


def _spread(flat: Tensor, bucket: Sequence[Tensor]) -> None:
    for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _device() -> torch.device:
    on_cuda = count() > 1 and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")


@contextmanager
def _peers() -> Iterator[None]:
    """What torch raises inside is taken for a rank that has gone: the arguments are ours, and the same on all."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(
            f"another of the {count()} processes has ended, and rank {rank()} cannot go on: {error}",
            "see what it said; the same command goes on from the last snapshot",
        ) from error
