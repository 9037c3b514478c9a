"""The device and the precision of a training stage, and the ranks that train it together."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin

from spdtool import console, ranks
from spdtool.errors import DeviceError
from spdtool.models import collectives
from spdtool.recipe.fields import Recipe


def create_accelerator(recipe: Recipe) -> Accelerator:
    """Create the Accelerator for the recipe's device and precision; if several ranks were launched, join them.

    Raises:
        DeviceError: CUDA is requested and does not answer, fp16 is requested on a CPU, or
            accelerate is told to shard.
    """
    on_cpu = recipe.device == "cpu" or not torch.cuda.is_available()
    _check_device(recipe, on_cpu)
    if recipe.shard and ranks.world_size() == 1:
        console.warn("shard is ignored: there is one process, which keeps everything")
    AcceleratorState._reset_state(reset_partial_state=True)  # one process may run stages of several recipes
    ranks.die_with_parent()
    collectives.join_process_group("gloo" if on_cpu else "nccl")
    precision = "no" if recipe.precision == "fp32" else recipe.precision  # accelerate's word for it
    # a plugin, because a number would give way to ACCELERATE_GRADIENT_ACCUMULATION_STEPS, and the recipe alone decides
    whole_batches = GradientAccumulationPlugin(num_steps=1)
    return Accelerator(cpu=on_cpu, mixed_precision=precision, gradient_accumulation_plugin=whole_batches)


def _check_device(recipe: Recipe, on_cpu: bool) -> None:
    """Refuse devices and launchers that the training loop cannot use."""
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("CUDA was demanded and no CUDA device answers", "see `spdtool doctor`, or use --device cpu")
    if on_cpu and recipe.precision == "fp16":
        raise DeviceError("fp16 training needs a CUDA device", "use --set precision=bf16 or fp32")
    for plugin in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() == "true":
            raise DeviceError(
                f"accelerate was told to use {plugin}, which this training loop does not go through",
                "leave it out; --set shard=true keeps a part of the weights in each process",
            )
    local_rank = ranks.local_rank()
    if not on_cpu and local_rank >= torch.cuda.device_count():
        raise DeviceError(
            f"process {local_rank} of this machine has no device: there are {torch.cuda.device_count()} CUDA devices",
            "start fewer processes, or use --device cpu",
        )
