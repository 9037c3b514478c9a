"""What the ranks of a job exchange: sums of tensors, the main process's tensors, and a place to wait.

With one process every function returns at once. All ranks must call the same functions in the same order.

Gradients are summed here, once a step, rather than by `DistributedDataParallel`, for three reasons: the parameters
that get a gradient change with each draw of grafted layers; some of them lie outside the model (projections, and the
stand-ins that count in the clipped norm); and a step's pieces are weighted by their share of the whole batch, which
DDP's mean over ranks would undo. The price is that the sum does not overlap with the backward pass.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from spdtool import ranks as processes
from spdtool.errors import PeerLost
from spdtool.models import fsdp as shards

BUCKET = 2**25  # numbers that travel together
PATIENCE = timedelta(minutes=30)  # that ranks wait for one another, such as for the main one to write a snapshot


def join(backend: str) -> None:
    """Meet the other ranks, unless this process is alone or has met them already.

    Raises:
        PeerLost: one of them has ended, or did not come.
    """
    if processes.count() == 1 or dist.is_initialized():
        return
    with _peers():
        store, rank, ranks = next(dist.rendezvous("env://", timeout=PATIENCE))
        own = dist.PrefixStore(_agreed(store, rank, ranks), store)
        dist.init_process_group(backend, store=own, rank=rank, world_size=ranks, timeout=PATIENCE)


def _agreed(store: dist.Store, rank: int, ranks: int) -> str:
    """A name under which the ranks that are alive meet.

    A launcher that starts ranks again may give them the store in which those before them have left their addresses
    (torchrun does), and whoever reads those waits for the dead. So rank 0 offers a new name, the others answer with a
    word of their own, and what rank 0 has confirmed with that word is no relic.
    """
    word = uuid.uuid4().hex
    if rank == 0:
        store.set("offer", word)
        answers = [store.get(f"{word}/{other}").decode() for other in range(1, ranks)]
        store.set(f"{word}/all", " ".join(answers))
        return word
    answered, until = "", time.monotonic() + PATIENCE.total_seconds()
    while time.monotonic() < until:
        offer = store.get("offer").decode()
        if offer != answered:
            store.set(f"{offer}/{rank}", word)
            answered = offer
        if store.check([f"{offer}/all"]) and word in store.get(f"{offer}/all").decode():
            return offer
        time.sleep(0.02)
    raise RuntimeError("rank 0 did not come")


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
    """Replace each tensor, in place, by the main process's; sharded ones, of which each has its own rows, are left.

    Raises:
        PeerLost: a rank has ended.
    """
    if count() > 1:
        with _peers():
            for bucket in _buckets(tensor for tensor in tensors if not shards.is_sharded(tensor)):
                flat = _flat(bucket)
                dist.broadcast(flat, src=0)
                _spread(flat, bucket)


def total_array(array: np.ndarray) -> np.ndarray:
    """The sum over the ranks of an array that each has its own of."""
    tensor = torch.from_numpy(array).to(_device())
    total([tensor])
    return tensor.cpu().numpy()


def gradients(parameters: Iterable[torch.nn.Parameter]) -> list[Tensor]:
    """The gradients of those parameters that have one: the same parameters on every rank, as the draw is the same.

    Those of sharded parameters are left out: they are summed by the backward pass.
    """
    whole = (parameter for parameter in parameters if not shards.is_sharded(parameter))
    return [parameter.grad for parameter in whole if parameter.grad is not None]


def as_main(said: bool) -> bool:
    """What the main process says."""
    from_main([flag := torch.tensor(said, device=_device())])
    return bool(flag)


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
        ranks, rank = processes.count(), processes.rank()
        raise PeerLost(
            f"another of the {ranks} processes has ended, and rank {rank} cannot go on: {error}",
            "see what it said; the same command goes on from the last snapshot",
        ) from error
