"""Exchange tensors between the ranks of a job: sums, broadcasts and a barrier.

With one process every function returns at once. All ranks must call the same functions in the
same order.

Gradients are summed here, once a step, rather than by `DistributedDataParallel`, for three
reasons: the parameters that get a gradient change with each draw of grafted layers; some of them
lie outside the model (projections, and the stand-ins that count in the clipped norm); and the
micro-batches of a step are weighted by their share of the global batch, which DDP's mean over
ranks would undo. The price is that the sum does not overlap with the backward pass.
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
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from spdtool import ranks
from spdtool.errors import PeerLost
from spdtool.models import fsdp

BUCKET = 2**25  # numbers that travel together
# that ranks wait for one another, such as for rank 0 to write a snapshot to a slow disk
PATIENCE = timedelta(minutes=30)
POLL_SECONDS = 0.02  # between two looks for an offer


def join_process_group(backend: str) -> None:
    """Meet the other ranks, unless this process is alone or has met them already.

    Raises:
        PeerLost: one of them has ended, or did not come.
    """
    if ranks.world_size() == 1 or dist.is_initialized():
        return
    with _blame_peers():
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        prefixed = PrefixStore(agree_on_prefix(store, rank, size), store)
        dist.init_process_group(backend, store=prefixed, rank=rank, world_size=size, timeout=PATIENCE)


def agree_on_prefix(store: Store, rank: int, size: int) -> str:
    """Agree with the other ranks that are alive on a prefix for the keys of the process group.

    A launcher that starts ranks again may give them the store in which those before them have
    left their addresses (torchrun does), and whoever reads those waits for the dead. So rank 0
    offers a new prefix, each of the others answers it with a random word, and only an offer that
    repeats that word is from a living rank 0.

    Raises:
        RuntimeError: rank 0 did not come.
    """
    word = uuid.uuid4().hex
    if rank == 0:
        store.set("offer", word)
        answers = [store.get(f"{word}/{answering}").decode() for answering in range(1, size)]
        store.set(f"{word}/all", " ".join(answers))
        return word
    answered, deadline = "", time.monotonic() + PATIENCE.total_seconds()
    while time.monotonic() < deadline:
        offer: str = store.get("offer").decode()
        if offer != answered:
            store.set(f"{offer}/{rank}", word)
            answered = offer
        # an offer of a job that ended was confirmed with other words
        if store.check([f"{offer}/all"]) and word in store.get(f"{offer}/all").decode():
            return offer
        time.sleep(POLL_SECONDS)
    raise RuntimeError("rank 0 did not come")


def group_size() -> int:
    """Number of ranks that have met."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def group_rank() -> int:
    """This process's rank, from 0."""
    return dist.get_rank() if group_size() > 1 else 0


def barrier() -> None:
    """Wait until every rank has come here.

    Raises:
        PeerLost: one of them has ended.
    """
    if group_size() > 1:
        with _blame_peers():
            dist.all_reduce(flag := torch.zeros(1, device=_device()))
            flag.item()  # a device's queue would let us pass


@torch.no_grad()
def sum_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Sum each tensor over the ranks, in place. Shapes and order must be the same on all of them.

    Raises:
        PeerLost: a rank has ended.
    """
    if group_size() > 1:
        with _blame_peers():
            flattened = [(bucket, _flatten(bucket)) for bucket in _make_buckets(tensors)]
            # all are started before the first is waited for
            for work in [dist.all_reduce(flat, async_op=True) for _, flat in flattened]:
                work.wait()
            for bucket, flat in flattened:
                _unflatten(flat, bucket)


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite each tensor, in place, with that of rank 0.

    Sharded tensors stay as they are: each rank keeps other rows of them.

    Raises:
        PeerLost: a rank has ended.
    """
    if group_size() > 1:
        with _blame_peers():
            replicated = [tensor for tensor in tensors if not fsdp.is_sharded(tensor)]
            for bucket in _make_buckets(replicated):
                flat = _flatten(bucket)
                dist.broadcast(flat, src=0)
                _unflatten(flat, bucket)


def sum_array_over_ranks(array: np.ndarray) -> np.ndarray:
    """Sum a per-rank array over all ranks."""
    tensor = torch.from_numpy(array).to(_device())
    sum_over_ranks([tensor])
    total: np.ndarray = tensor.cpu().numpy()
    return total


def gradients_to_sum(parameters: Iterable[torch.nn.Parameter]) -> list[Tensor]:
    """List the gradients that must be summed over the ranks.

    Those of sharded parameters are left out: the backward pass has summed them.

    They are of the same parameters on every rank, as the draw is the same.
    """
    gradients = []
    for parameter in parameters:
        if parameter.grad is not None and not fsdp.is_sharded(parameter):
            gradients.append(parameter.grad)
    return gradients


def max_over_ranks(number: int) -> int:
    """Return the largest of a number that every rank has.

    Raises:
        PeerLost: a rank has ended.
    """
    if group_size() == 1:
        return number
    with _blame_peers():
        tensor = torch.tensor(number, device=_device())
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)


def broadcast_flag(flag: bool) -> bool:
    """Give every rank the flag of rank 0."""
    broadcast([tensor := torch.tensor(flag, device=_device())])
    return bool(tensor)


def _make_buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors of one type and device together, in order, up to `BUCKET` numbers."""
    open_buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        detached = tensor.detach()
        if detached.dtype == torch.bool:
            detached = detached.view(torch.uint8)  # gloo sends no bool
        kind = detached.dtype, detached.device
        bucket = open_buckets.setdefault(kind, [])
        if bucket and sum(map(torch.numel, bucket)) + detached.numel() > BUCKET:
            yield bucket
            bucket = open_buckets[kind] = []
        bucket.append(detached)
    yield from open_buckets.values()


def _flatten(bucket: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in bucket])


def _unflatten(flat: Tensor, bucket: Sequence[Tensor]) -> None:
    """Copy the numbers of `flat` back into the tensors that it was made of."""
    sizes = [tensor.numel() for tensor in bucket]
    for tensor, numbers in zip(bucket, torch.split(flat, sizes), strict=True):
        tensor.copy_(numbers.view_as(tensor))


def _device() -> torch.device:
    """The device whose tensors the backend sends."""
    if group_size() > 1 and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@contextmanager
def _blame_peers() -> Iterator[None]:
    """Report an error of torch inside as a lost rank: the arguments are ours, and right.

    Raises:
        PeerLost: torch raised.
    """
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(
            f"another of the {ranks.world_size()} processes has ended, and rank {ranks.rank()} cannot go on: {error}",
            "see what it said; the same command goes on from the last snapshot",
        ) from error
