"""The device and the precision of a training stage, and the ranks that train it together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradientAccumulationPlugin, GradScalerKwargs

from spdtool import console, ranks
from spdtool.errors import DeviceError
from spdtool.models import collectives
from spdtool.models.arithmetic import probe_arithmetic
from spdtool.recipe import TRAINING
from spdtool.recipe.fields import Recipe
from spdtool.run.folder import Run

# accelerate reads these where it is not told otherwise, and changes results: the recipe alone decides
ACCELERATE_SETTINGS = ("ACCELERATE_", "PARALLELISM_CONFIG_", "FSDP_")
CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
# left over from another job's launcher or from MPI, they would make accelerate wait for processes
# that are not there
LEFT_BY_LAUNCHERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PMI_", "OMPI_COMM_", "MV2_COMM_")

Precision = Literal["fp32", "bf16", "fp16"]


def choose_threads(run: Run) -> None:
    """Set torch to the number of threads with which the run began: another number changes the last bits of sums.

    With several processes, each keeps the number of threads that its launcher gave it.
    """
    available = torch.get_num_threads()
    threads = run.recipe.threads or available
    if ranks.world_size() == 1:
        threads = run.recipe.threads or run.threads or available
        run.threads = threads
    if threads != available and not run.recipe.threads:
        console.say(
            f"computing with {threads} threads, as this run began, so that the weights are the same to the last bit; "
            f"--set threads={available} takes what this machine offers"
        )
    torch.set_num_threads(threads)  # even if it is the same: OMP and MKL have variables of their own


def compare_arithmetic(run: Run, device: torch.device) -> None:
    """Warn if this process does not compute the same last bits as the one that trained the last finished stage."""
    done = [stage for stage in TRAINING if run.done(stage)]
    machine = run.record(done[-1]).machine if done else None
    if machine is None or machine.arithmetic in (None, probe_arithmetic(device)):
        return
    console.warn(
        f"this process does not compute the same last bits as the one that trained {done[-1]} "
        f"({machine.training_threads} threads on {machine.system} there, {torch.get_num_threads()} threads here): "
        "another processor, another version of torch, or a switch such as MKL_CBWR"
    )


def create_accelerator(recipe: Recipe) -> Accelerator:
    """Create the Accelerator for the recipe's device and precision; if several ranks were launched, join them.

    Raises:
        DeviceError: CUDA is requested and does not answer, fp16 is requested where it cannot or
            need not be used, or accelerate is told to shard.
    """
    on_cpu = recipe.device == "cpu" or not torch.cuda.is_available()
    _check_device(recipe, on_cpu)
    if recipe.shard and ranks.world_size() == 1:
        console.warn("shard is ignored: there is one process, which keeps everything")
    AcceleratorState._reset_state(reset_partial_state=True)  # one process may run stages of several recipes
    GradientState._reset_state()  # a program around spdtool may accumulate in its own training
    ranks.die_with_parent()
    collectives.join_process_group("gloo" if on_cpu else "nccl")
    precision = choose_precision(recipe, on_cpu=on_cpu)
    choose_kernels(recipe)
    with _without_settings():
        return Accelerator(
            cpu=on_cpu,
            mixed_precision="no" if precision == "fp32" else precision,  # accelerate's word for it
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # microbatches.py accumulates
            kwargs_handlers=[GradScalerKwargs(enabled=False)],  # precision.py scales the loss of fp16
        )


def choose_kernels(recipe: Recipe) -> None:
    """Set torch's switches as the recipe says, on or off: one process may run stages of several recipes."""
    torch.backends.cuda.matmul.allow_tf32 = recipe.tf32
    if recipe.deterministic and CUBLAS_WORKSPACE not in os.environ:
        # cuBLAS reads it when it is first used; without it torch refuses its products
        os.environ[CUBLAS_WORKSPACE] = ":4096:8"
    torch.use_deterministic_algorithms(recipe.deterministic)
    torch.backends.cudnn.deterministic = recipe.deterministic
    if recipe.deterministic:
        torch.backends.cudnn.benchmark = False  # it would choose kernels by the clock


def choose_precision(recipe: Recipe, *, on_cpu: bool) -> Precision:
    """Return the precision in which the training stages compute: bf16 where a GPU has it, unless the recipe says."""
    if recipe.precision != "auto":
        return recipe.precision
    return "fp32" if on_cpu or not _has_bf16() else "bf16"


def _has_bf16() -> bool:
    # emulated, on GPUs older than Ampere, it is slower than float32
    is_supported: bool = torch.cuda.is_bf16_supported(including_emulation=False)
    return is_supported


@contextmanager
def _without_settings() -> Iterator[None]:
    """Hide variables of the environment that accelerate would read."""
    prefixes: tuple[str, ...] = ACCELERATE_SETTINGS
    if ranks.world_size() == 1:
        prefixes += LEFT_BY_LAUNCHERS
    hidden = {name: value for name, value in os.environ.items() if name.startswith(prefixes)}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def _check_device(recipe: Recipe, on_cpu: bool) -> None:
    """Refuse devices and launchers that the training loop cannot use."""
    if ranks.world_size() > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise DeviceError(
            f"RANK and WORLD_SIZE are set, as in one of {ranks.world_size()} processes, and MASTER_ADDR is not",
            "unset RANK and WORLD_SIZE if they are left over, or start the processes with --processes or torchrun",
        )
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("CUDA was demanded and no CUDA device answers", "see `spdtool doctor`, or use --device cpu")
    if on_cpu and recipe.precision == "fp16":
        raise DeviceError("fp16 training needs a CUDA device", "use --set precision=bf16 or fp32")
    if recipe.precision == "fp16" and _has_bf16():
        raise DeviceError(
            "precision=fp16 was asked for, and this GPU has bf16, which is as fast and never overflows",
            "use --set precision=bf16, or leave it out: auto takes bf16 here",
        )
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
