"""The teacher's hidden states of all rows on the GPU, in bf16, where they fit: a step reads them instead of computing.

They are computed once a phase, by one pass in the precision of the training. Whether they fit
depends on what else is on the device, so they are no part of what a snapshot is identified by: a
stage may go on without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from spdtool.data.batches import evaluation_batches
from spdtool.data.tokens import LABELED, Encoded
from spdtool.distillation.outputs import ModelOutputs
from spdtool.distillation.teacher_cache import TeacherForward, needs_hidden_states
from spdtool.models import collectives, device
from spdtool.models.predict import BATCH_SIZE, to_device
from spdtool.recipe.fields import Recipe
from spdtool.recipe.training import Distilled

ROW_NUMBERS = "teacher_rows"  # column of a batch


class DeviceStates:
    """Logits and hidden states of rows by their number.

    Args:
        logits: one vector for each row, [rows, labels], float32.
        states: [layers, tokens, width], bf16: the tokens of all rows, one after the other.
        starts: number of the first token of each row, [rows].
    """

    def __init__(self, logits: Tensor, states: Tensor, starts: Tensor) -> None:
        self._logits, self._states, self._starts = logits, states, starts

    def read(self, rows: Tensor, tokens: int) -> ModelOutputs:
        """Return the outputs of some rows, padded on the right to `tokens` with states of other rows.

        Args:
            rows: row numbers, on the device.
        """
        positions = self._starts[rows].unsqueeze(1) + torch.arange(tokens, device=rows.device)
        # beyond the end of the last row there is nothing to read
        flat = positions.flatten().clamp(max=self._states.shape[1] - 1)
        states = self._states.index_select(1, flat).unflatten(1, (len(rows), tokens))  # type: ignore[no-untyped-call]
        return ModelOutputs(self._logits[rows], states.unbind(0))


def count_state_bytes(rows: Encoded, teacher: PreTrainedModel, layers: Sequence[int]) -> int:
    """Count the bytes of the hidden states of all rows, in bf16."""
    width: int = teacher.config.hidden_size
    return 2 * int(rows.lengths.sum(dtype=np.int64)) * len(layers) * width


def should_keep_on_device(
    recipe: Recipe, section: Distilled, rows: Encoded, size: int, target: torch.device, *, precision: str
) -> bool:
    """Whether hidden states of `size` bytes save time in the phase of `section`, and fit.

    Args:
        precision: of the training: only bf16 loses nothing by them.
    """
    if not device.is_gpu(target) or precision != "bf16" or not needs_hidden_states(section.loss):
        return False
    # a mask is needed, since padding reads other rows; with padding on the left, a row's outputs
    # depend on its batch
    if section.loss.attention > 0 or not section.loss.mask_padding or rows.pad_left:
        return False
    # logits of each token would need room of their own for each row
    if rows.labels_per_token or rows.labels_are_positions:
        return False
    if collectives.group_size() > 1:  # each rank reads other rows in every epoch
        return False
    if section.length(rows.epoch_rows).steps * section.batch_size < 2 * len(rows):
        return False
    return size <= recipe.teacher_states_share * free_device_memory(target)


def free_device_memory(target: torch.device) -> int:
    """Return the bytes of a GPU's memory that this process may still take."""
    free, _ = torch.cuda.mem_get_info(target)
    # what torch holds and does not use is free too
    return free + torch.cuda.memory_reserved(target) - torch.cuda.memory_allocated(target)


@torch.no_grad()
def compute_device_states(
    rows: Encoded,
    teacher: PreTrainedModel,
    forward: TeacherForward,
    layers: Sequence[int],
    autocast: AbstractContextManager[object],
) -> tuple[Encoded, DeviceStates]:
    """Compute the teacher's outputs of all rows; return rows with their numbers, and the outputs.

    Args:
        layers: the teacher's, from 0, the embeddings' output, whose hidden states `forward` returns.
        autocast: of the training.
    """
    target, tokens = teacher.device, int(rows.lengths.sum(dtype=np.int64))
    logits = torch.empty(0, device=target)
    states = torch.empty(len(layers), tokens, teacher.config.hidden_size, dtype=torch.bfloat16, device=target)
    with autocast:
        for numbers in evaluation_batches(rows, BATCH_SIZE):
            batch = rows.collate(numbers)
            batch.pop(LABELED, None)  # no model reads it
            mask = batch["attention_mask"].astype(bool)
            outputs = forward(to_device(batch, target))
            assert outputs.hidden_states is not None
            if not len(logits):
                logits = outputs.logits.new_empty(len(rows), *outputs.logits.shape[1:], dtype=torch.float32)
            logits[torch.from_numpy(numbers).to(target)] = outputs.logits.float()
            real_positions = torch.from_numpy(np.flatnonzero(mask)).to(target)
            # Numbers among the tokens of all rows, by which `DeviceStates.read` finds them.
            positions = rows.offsets[numbers][:, None] + np.arange(mask.shape[1])
            token_numbers = torch.from_numpy(positions[mask]).to(target)
            for layer, hidden_state in enumerate(outputs.hidden_states):
                real = hidden_state.flatten(0, 1).index_select(0, real_positions)
                states[layer].index_copy_(0, token_numbers, real.to(states.dtype))
    starts = torch.from_numpy(np.asarray(rows.offsets[:-1], np.int64)).to(target)
    numbered = replace(rows, per_row=rows.per_row | {ROW_NUMBERS: np.arange(len(rows))})
    return numbered, DeviceStates(logits, states, starts)
