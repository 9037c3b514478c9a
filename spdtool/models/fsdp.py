"""Parameters of which each process holds some rows, for encoders that do not fit into one device (`shard = true`).

torch's fully sharded data parallelism (`fully_shard`; Zhao et al. 2023, arXiv 2304.11277) keeps the rows, makes a layer
whole while it computes, and sums its gradients into the rows of each process. What spdtool does with a weight between
two passes is done row by row, so each process does it for the rows that it has `held`; what ranks whole matrices asks
for the `whole`. A parameter that is not sharded is held whole, and these functions then give back what they were given.
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


def shard(model: nn.Module, layers: Iterable[nn.Module], device: torch.device) -> None:
    """Keep this process's rows of every parameter of `model`, on `device`; each of `layers` is made whole by itself.

    A pass through the model must be made by all processes at once, and by each as often. Freeze parameters before.
    """
    # of a head's logits, which nobody changes in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (*layers, model):
        made = fully_shard(part, mesh=mesh, reshard_after_forward=True)  # of the model too: it is scored between steps
        assert isinstance(made, FSDPModule)
        made.set_gradient_divide_factor(1.0)  # the losses carry each process's share: a sum, no mean
        made.set_force_sum_reduction_for_comms(True)


def is_sharded(tensor: Tensor) -> bool:
    """Whether other processes hold other rows of it."""
    return isinstance(tensor, DTensor)


def held(tensor: Tensor) -> Tensor:
    """The rows that this process holds, outside of autograd; a change in place changes the tensor."""
    plain = tensor.detach()
    return plain.to_local() if isinstance(plain, DTensor) else plain


def whole(rows: Tensor, like: Tensor) -> Tensor:
    """All rows, from those that each process gives; all call this together.

    Args:
        rows: shaped as what this process holds of `like`.
    """
    if not isinstance(like, DTensor):
        return rows
    sent = rows.view(torch.uint8) if rows.dtype == torch.bool else rows  # which gloo cannot send
    return joined(sent.to(like.device), like).full_tensor().view(rows.dtype)


def rows(full: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor, the rows that this process holds of `like`."""
    if not isinstance(like, DTensor):
        return full
    parts = full.chunk(like.device_mesh.size())
    own = like.device_mesh.get_local_rank()
    return parts[own].clone() if own < len(parts) else full[:0].clone()


def laid_out(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded as `like` is and on its device."""
    return full.to(like.device) if not isinstance(like, DTensor) else joined(rows(full, like).to(like.device), like)


def joined(own: Tensor, like: DTensor) -> DTensor:
    """The tensor that is sharded as `like` is and of which each process gives its rows."""
    own, shape, stride = own.contiguous(), like.shape, like.stride()
    return DTensor.from_local(own, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def summed(tensor: Tensor, like: Tensor) -> Tensor:
    """The sum over the processes that hold rows of `like`; all call this together."""
    if isinstance(like, DTensor):
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=like.device_mesh.get_group())
    return tensor


def mean(tensor: Tensor, like: Tensor) -> Tensor:
    """The mean of all numbers of a tensor of which each process gives the rows that it holds of `like`."""
    return summed(tensor.sum(), like) / like.numel() if isinstance(like, DTensor) else tensor.mean()


def state_dict(model: nn.Module, *, keep: bool) -> dict[str, Tensor] | None:
    """The whole weights of a sharded model, in the CPU's memory; all call this together. None: it is not sharded.

    Args:
        keep: whether this process wants them; empty otherwise.
    """
    state = model.state_dict()
    if not any(map(is_sharded, state.values())):
        return None
    gathered = ((name, whole(held(tensor), tensor)) for name, tensor in state.items())
    return {name: tensor.cpu() for name, tensor in gathered if keep}
