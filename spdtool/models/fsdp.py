"""Sharded parameters: each rank keeps some rows of them (`shard = true`).

They are for encoders that do not fit into one device.

torch's fully sharded data parallelism (`fully_shard`; Zhao et al. 2023, arXiv 2304.11277) keeps
the rows, gathers a layer while it computes, and sums its gradients into the rows of each rank.
What spdtool does with a weight between two passes is done row by row, so each rank does it for
its `local_rows`; what ranks all weights of a matrix gathers them (`gather_rows`). For a parameter
that is not sharded every function here gives back its argument.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


def shard_model(model: nn.Module, layers: Iterable[nn.Module], device: torch.device) -> None:
    """Keep this rank's rows of every parameter of `model`, on `device`.

    Each of `layers` is gathered by itself.

    Freeze parameters before. From then on all ranks must run forward and backward passes
    together, equally often.
    """
    # of a head's logits, which nobody changes in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*layers, model):
        # after the forward pass of the model itself too: it is scored between steps, with no
        # backward pass to free it
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        assert isinstance(sharded, FSDPModule)
        # the losses carry each rank's share of the batch, so gradients are summed, not averaged
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def is_sharded(tensor: Tensor) -> bool:
    """Whether other ranks keep other rows of it."""
    return isinstance(tensor, DTensor)


def local_rows(tensor: Tensor) -> Tensor:
    """The rows that this rank keeps, outside of autograd; a change in place changes the tensor."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def gather_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Gather all rows of a matrix from the ranks. Collective: call on every rank.

    Args:
        rows: this rank's rows, shaped as `local_rows(like)`.
    """
    if not isinstance(like, DTensor):
        return rows
    sent = rows.view(torch.uint8) if rows.dtype == torch.bool else rows  # gloo sends no bool
    gathered: Tensor = _from_local_rows(sent.to(like.device), like).full_tensor()
    return gathered.view(rows.dtype)


def take_local_rows(full: Tensor, like: Tensor) -> Tensor:
    """Take from a full tensor the rows that this rank keeps of `like`."""
    if not isinstance(like, DTensor):
        return full
    chunks = full.chunk(like.device_mesh.size())
    rank = like.device_mesh.get_local_rank()
    if rank >= len(chunks):  # fewer rows than ranks
        return full[:0].clone()
    return chunks[rank].clone()


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """Shard a full tensor as `like` is, and move it to its device."""
    if not isinstance(like, DTensor):
        return full.to(like.device)
    return _from_local_rows(take_local_rows(full, like).to(like.device), like)


def sum_over_shards(tensor: Tensor, like: Tensor) -> Tensor:
    """Sum a tensor over the ranks that keep rows of `like`. Collective: call on every rank."""
    if isinstance(like, DTensor):
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=like.device_mesh.get_group())
    return tensor


def mean_over_shards(rows: Tensor, like: Tensor) -> Tensor:
    """Mean of all numbers of a matrix from each rank's rows. Collective: call on every rank.

    Args:
        rows: this rank's rows, shaped as `local_rows(like)`.
    """
    if not isinstance(like, DTensor):
        return rows.mean()
    return sum_over_shards(rows.sum(), like) / like.numel()


def gather_state_dict(model: nn.Module, *, keep: bool) -> dict[str, Tensor] | None:
    """Gather the full weights of a sharded model in the CPU's memory; None if it is not sharded.

    Collective: call on every rank.

    Args:
        keep: whether this rank wants them; otherwise its dict is empty.
    """
    state = model.state_dict()
    if not any(map(is_sharded, state.values())):
        return None
    gathered = {}
    for name, tensor in state.items():  # one after the other: a device need not have room for all
        full = gather_rows(local_rows(tensor), tensor)
        if keep:
            gathered[name] = full.cpu()
    return gathered


def _from_local_rows(rows: Tensor, like: DTensor) -> DTensor:
    """Make the tensor that is sharded as `like` is, of each rank's rows."""
    placed: DTensor = DTensor.from_local(
        rows.contiguous(),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return placed
