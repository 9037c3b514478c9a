"""The teacher's outputs for every training row, computed once for all epochs, phases and runs.

Logits alone are cached wherever a phase reads nothing else. Hidden states are large: they are
cached for training on a CPU, where reading them is faster than a forward pass, if they fit
`teacher_states_gb`, and if the student's phases read the rows at least twice. Attention maps are
never cached.

Cached outputs and those of a teacher that runs on each training batch differ in their last bits,
because the batches differ. So the recipe and the rows alone decide what is cached, and never how
full a disk is. Without room on the disk the same numbers are computed in memory; without room in
memory the run stops with an error.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from spdtool import console, ranks
from spdtool.data import cache
from spdtool.data.batches import evaluation_batches
from spdtool.data.tokens import LABELED, Batch, Encoded
from spdtool.distillation.outputs import ModelOutputs
from spdtool.errors import DeviceError
from spdtool.models import collectives
from spdtool.models.arithmetic import probe_arithmetic
from spdtool.models.predict import BATCH_SIZE, Forward, predict, predict_dev_sets, to_device
from spdtool.recipe.fields import Recipe
from spdtool.recipe.training import Distilled, Loss
from spdtool.tasks.head import head_of_model

TeacherForward = Callable[[dict[str, torch.Tensor]], ModelOutputs]
"""Computes the teacher's outputs for a batch, in the order of the student's layers."""

LOGITS, STATES = "teacher_logits", "teacher_states"
CHUNK_BYTES = 1 << 27  # of hidden states that are in memory at a time: 128 MB


def needs_hidden_states(loss: Loss) -> bool:
    """Whether the loss compares hidden states."""
    return loss.hidden > 0 or loss.relation > 0


def is_worth_caching(
    recipe: Recipe, section: Distilled, rows: Encoded, teacher: PreTrainedModel, layers: Sequence[int]
) -> bool:
    """Whether `cache_outputs` saves time in the phase of `section`, and fits the size that the recipe allows.

    Args:
        layers: the teacher's, from 0, the embeddings' output, whose hidden states the loss
            compares.
    """
    if section.loss.attention > 0 or rows.pad_left:  # with left padding, a row's outputs depend on its batch
        return False
    if recipe.shard and collectives.group_size() > 1:  # one process would compute them for all
        return False
    if not needs_hidden_states(section.loss):
        # a pass over all rows costs as much as running the teacher on each batch of one epoch
        return _count_reads(section, rows.epoch_rows) >= len(rows)
    # without a mask the loss reads the states of padding too, which are not stored
    if teacher.device.type != "cpu" or not section.loss.mask_padding:
        return False
    if count_state_reads(recipe, rows.epoch_rows) < 2 * len(rows):
        return False
    return _count_bytes(rows, teacher, layers) <= recipe.teacher_states_gb * 1e9


def count_state_reads(recipe: Recipe, epoch_rows: int) -> int:
    """Count the rows whose hidden states the student's phases read; a row counts each time it is read.

    Args:
        epoch_rows: number of rows in an epoch.
    """
    reads = 0
    for section in recipe.phases.values():
        if needs_hidden_states(section.loss):
            reads += _count_reads(section, epoch_rows)
    return reads


def cache_outputs(rows: Encoded, teacher: PreTrainedModel, forward: TeacherForward, layers: Sequence[int]) -> Encoded:
    """Return `rows` with the teacher's outputs as further columns, computed by one pass if need be.

    They are float32: logits as `predict` returns them, and hidden states [tokens, layers, width] if there are
    `layers`. They are stored under a hash of the teacher's weights, the rows and the machine's
    arithmetic, so that a resumed stage reads the very same numbers. Of several processes the first
    one computes them for all. What the cache cannot hold is computed in memory.

    Args:
        layers: the teacher's, from 0, the embeddings' output, whose hidden states `forward`
            returns; empty: none.

    Raises:
        DeviceError: neither the disk nor the memory has room for the hidden states.
    """
    name = cache.cache_key(_hash_model(teacher), rows.digest, _describe_arithmetic(teacher.device), list(layers))
    if not ranks.is_main():
        collectives.barrier()  # rank 0 fills the cache, from which the others then read
    if layers:
        size = _count_bytes(rows, teacher, layers)
        arrays = _cache_states(name, size, lambda append: _compute_states(append, rows, teacher, forward))
    else:
        arrays = cache.cached_arrays(
            "teacher-logits", name, lambda append: _compute_logits(append, rows, teacher, forward)
        )
    if ranks.is_main():
        collectives.barrier()
    if head_of_model(teacher).per_token:
        with_logits = replace(rows, per_token=rows.per_token | {LOGITS: arrays["logits"]})
    else:
        with_logits = replace(rows, per_row=rows.per_row | {LOGITS: arrays["logits"]})
    if not layers:
        return with_logits
    return replace(with_logits, per_token=with_logits.per_token | {STATES: arrays["states"]})


def cache_dev_outputs(splits: Mapping[str, Encoded], teacher: PreTrainedModel, forward: Forward) -> cache.Arrays:
    """Compute the teacher's outputs of every dev set once for all phases, and store them as training rows' are.

    Args:
        forward: the teacher's.
    """
    digests = {name: rows.digest for name, rows in splits.items()}
    name = cache.cache_key(_hash_model(teacher), digests, _describe_arithmetic(teacher.device))

    def fill(append: cache.Append) -> None:
        for split, outputs in predict_dev_sets(forward, splits).items():
            append(split, outputs)

    return cache.cached_arrays("teacher-dev", name, fill)


def pop_cached_outputs(batch: dict[str, torch.Tensor]) -> ModelOutputs | None:
    """Remove the cached outputs of the teacher from a batch and return them; None without any.

    The hidden states are those of the `layers` that `cache_outputs` was called with.
    """
    logits, states = batch.pop(LOGITS, None), batch.pop(STATES, None)
    if logits is None:
        return None
    return ModelOutputs(logits, None if states is None else states.unbind(2))


def _cache_states(name: str, size: int, fill: cache.Fill) -> cache.Arrays:
    """Read or compute hidden states of `size` bytes: from the cache, or in memory where the disk has no room for them.

    Raises:
        DeviceError: the memory has no room either.
    """
    arrays = cache.read_entry("teacher-states", name)
    # twice the size, so that the cache never fills the disk
    if arrays is None and 2 * size <= free_disk_space():
        arrays = cache.arrays_on_disk("teacher-states", name, fill)
    if arrays is not None:
        return arrays
    folder = cache.cache_folder()
    # several processes on a machine keep a copy each
    if 2 * size * ranks.world_size() > free_memory():
        raise DeviceError(
            f"the teacher's hidden states of all rows take {size / 1e9:.1f} GB, for which neither {folder} nor the "
            f"memory has room ({free_disk_space() / 1e9:.1f} and {free_memory() / 1e9:.1f} GB are free, and half is "
            "left to others)",
            "free some space, or set XDG_CACHE_HOME to a folder on another disk; with --set teacher_states_gb=0 the "
            "teacher runs on every batch instead: slower, and the weights differ in their last bits",
        )
    console.warn(f"the cache {folder} has no room for the teacher's hidden states: they are computed in memory")
    return cache.arrays_in_memory(fill)


def free_memory() -> int:
    """Return the bytes of memory that this process may still take; `sys.maxsize` where the system does not tell."""
    free = sys.maxsize
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                free = int(value.split()[0]) * 1024
    with suppress(OSError, ValueError):  # a container may have less than its machine; the text "max": no limit
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text("ascii") for name in ("max", "current"))
        free = min(free, int(limit) - int(used))
    return free


def _count_bytes(rows: Encoded, teacher: PreTrainedModel, layers: Sequence[int]) -> int:
    """Count the bytes of the hidden states of all rows."""
    width: int = teacher.config.hidden_size
    return 4 * int(rows.lengths.sum(dtype=np.int64)) * len(layers) * width


def free_disk_space() -> int:
    """Return the free bytes of the disk that holds, or would hold, the cache."""
    folder = cache.cache_folder()
    while not folder.exists():
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:  # it may not be entered
        return 0


def _count_reads(section: Distilled, epoch_rows: int) -> int:
    """Count the rows that the phase of `section` reads; a row counts each time it is read."""
    return section.length(epoch_rows).steps * section.batch_size


@torch.inference_mode()
def _compute_logits(append: cache.Append, rows: Encoded, teacher: PreTrainedModel, forward: TeacherForward) -> None:
    def compute_batch(batch: Batch) -> np.ndarray:
        batch = {name: column for name, column in batch.items() if name != LABELED}
        logits: np.ndarray = forward(to_device(batch, teacher.device)).logits.float().cpu().numpy()
        return logits

    append("logits", predict(compute_batch, rows))


def _compute_states(append: cache.Append, rows: Encoded, teacher: PreTrainedModel, forward: TeacherForward) -> None:
    """Append logits and hidden states chunk by chunk; rows of like length of a chunk form a batch."""
    layer_bytes = 4 * teacher.config.hidden_size * rows.lengths.astype(np.int64)
    row_bytes = (teacher.config.num_hidden_layers + 1) * layer_bytes
    chunk_numbers = np.cumsum(row_bytes) // CHUNK_BYTES
    for number in np.unique(chunk_numbers):
        chunk = rows.select(np.flatnonzero(chunk_numbers == number))
        logits, states = _compute_chunk(chunk, teacher, forward)
        append("logits", logits)
        append("states", states)


@torch.inference_mode()
def _compute_chunk(rows: Encoded, teacher: PreTrainedModel, forward: TeacherForward) -> tuple[np.ndarray, np.ndarray]:
    """Compute the logits, and the hidden states of real tokens [tokens, layers, width]."""
    logits, states = np.empty(0, np.float32), np.empty(0, np.float32)
    for numbers in evaluation_batches(rows, BATCH_SIZE):
        batch = rows.collate(numbers)
        batch.pop(LABELED, None)
        outputs, mask = forward(to_device(batch, teacher.device)), batch["attention_mask"].astype(bool)
        assert outputs.hidden_states is not None
        if not len(states):
            depth, width = len(outputs.hidden_states), outputs.hidden_states[0].shape[-1]
            states = np.empty((rows.offsets[-1], depth, width), np.float32)
            logits = rows.make_outputs(outputs.logits.numpy())
        rows.store_outputs(logits, numbers, outputs.logits.numpy())
        for layer, hidden_state in enumerate(outputs.hidden_states):
            for row, number in enumerate(numbers):
                tokens = slice(rows.offsets[number], rows.offsets[number + 1])
                states[tokens, layer] = hidden_state[row].numpy()[mask[row]]
    return logits, states


def _hash_model(model: PreTrainedModel) -> str:
    """Hash the configuration and the weights."""
    # the configuration too: with another activation the same weights compute other outputs
    digest = hashlib.blake2b(model.config.to_json_string().encode(), digest_size=16)
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _describe_arithmetic(device: torch.device) -> list[str | int]:
    """List what changes the last bits of a forward pass."""
    return [torch.__version__, device.type, torch.get_num_threads(), probe_arithmetic(device)]
