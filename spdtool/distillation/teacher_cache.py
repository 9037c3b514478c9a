"""What the teacher shows of every training row, computed once for all epochs, phases and runs that read the same.

Logits alone are kept wherever a phase reads nothing else. Hidden states are large: they are kept for training on a
CPU, where reading them is faster than a forward pass, if they fit `teacher_states_gb` and the disk, and if the
student's phases see the rows twice at least. Attention maps are never kept.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from spdtool import ranks as processes
from spdtool.data import cache
from spdtool.data.tokens import Encoded, evaluation_batches
from spdtool.distillation.outputs import Observation
from spdtool.models import collectives, onednn
from spdtool.models.predict import BATCH, predict, to_device
from spdtool.recipe.fields import PHASES, Distilled, Loss, Recipe

Look = Callable[[dict[str, torch.Tensor]], Observation]
"""What the teacher shows of a batch, as the student's layers are compared with it."""

LOGITS, STATES = "teacher_logits", "teacher_states"
PIECE = 1 << 27  # bytes of hidden states that are in memory at a time


def reads_states(loss: Loss) -> bool:
    """Whether the loss looks at hidden states."""
    return loss.hidden > 0 or loss.relation > 0


def worth_keeping(recipe: Recipe, stage: str, rows: Encoded, teacher: Any, layers: Sequence[int]) -> bool:
    """Whether `beside` saves time in the stage, and takes no more of the disk than it may.

    Args:
        layers: the teacher's, from 0, the embeddings' output, whose hidden states the student is compared with.
    """
    section = recipe.section(stage)
    assert isinstance(section, Distilled)
    if section.loss.attention > 0 or rows.left:  # padded on the left, what a row gives depends on its batch
        return False
    if recipe.shard and collectives.world_size() > 1:  # one process would compute them for all
        return False
    if not reads_states(section.loss):
        return _visits(section, len(rows)) >= len(rows)
    if teacher.device.type != "cpu" or not section.loss.mask_padding:  # else padding is read too, and has no place
        return False
    visits = sum(_visits(each, len(rows)) for each in _reading_states(recipe))
    needed = 4 * int(rows.lengths.sum(dtype=np.int64)) * len(layers) * teacher.config.hidden_size
    return visits >= 2 * len(rows) and needed <= recipe.teacher_states_gb * 1e9 and 2 * needed <= _free()


def beside(rows: Encoded, teacher: Any, look: Look, layers: Sequence[int]) -> Encoded:
    """`rows` with the teacher's outputs beside them, from the cache or by one run over them.

    They are float32: logits [rows, labels], and hidden states [tokens, layers, width] where there are `layers`. They
    are kept under a hash of the teacher's weights, the rows and the machine's arithmetic, so that a resumed stage reads
    the very same numbers. Of several processes the first one computes them for all. Hidden states for which the disk
    has no room after all are left out.

    Args:
        look: the teacher's view of a batch.
        layers: whose hidden states it shows, from 0, the embeddings' output; empty: none.
    """
    name = cache.key(_hash(teacher), rows.digest, _arithmetic(teacher.device), list(layers))
    if not processes.is_main():
        collectives.barrier()
    if layers:
        found = cache.stored("teacher-states", name, lambda append: _fill(append, rows, teacher, look))
    else:
        found = cache.arrays("teacher-logits", name, lambda append: append("logits", _logits(rows, teacher, look)))
    if processes.is_main():
        collectives.barrier()
    if found is None:
        return rows
    kept = replace(rows, beside=rows.beside | {LOGITS: found["logits"]})
    return replace(kept, per_token=rows.per_token | {STATES: found["states"]}) if layers else kept


def take(batch: dict[str, torch.Tensor]) -> Observation | None:
    """What the teacher shows of the batch, out of which it is taken; None where it was not kept.

    Its hidden states are those of the `layers` that `beside` was given.
    """
    logits, states = batch.pop(LOGITS, None), batch.pop(STATES, None)
    if logits is None:
        return None
    return Observation(logits, None if states is None else states.unbind(2))


def _visits(section: Distilled, rows: int) -> int:
    return section.steps_for(rows) * section.batch_size


def _reading_states(recipe: Recipe) -> Iterator[Distilled]:
    for phase in PHASES:
        section = recipe.section(phase)
        if isinstance(section, Distilled) and reads_states(section.loss):
            yield section


def _free() -> int:
    folder = cache.folder()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@torch.inference_mode()
def _logits(rows: Encoded, teacher: Any, look: Look) -> np.ndarray:
    return predict(lambda batch: look(to_device(batch, teacher.device)).logits.float().cpu().numpy(), rows)


def _fill(append: cache.Append, rows: Encoded, teacher: Any, look: Look) -> None:
    """Logits and hidden states, some rows at a time, of which those of like length are one batch."""
    row_bytes = 4 * (teacher.config.num_hidden_layers + 1) * teacher.config.hidden_size * rows.lengths.astype(np.int64)
    pieces = np.cumsum(row_bytes) // PIECE
    for piece in np.unique(pieces):
        logits, states = _outputs(rows.take(np.flatnonzero(pieces == piece)), teacher, look)
        append("logits", logits)
        append("states", states)


@torch.inference_mode()
def _outputs(rows: Encoded, teacher: Any, look: Look) -> tuple[np.ndarray, np.ndarray]:
    logits, states = np.empty((len(rows), teacher.config.num_labels), np.float32), np.empty(0, np.float32)
    for numbers in evaluation_batches(rows, BATCH):
        batch = rows.collate(numbers)
        shown, real = look(to_device(batch, teacher.device)), batch["attention_mask"].astype(bool)
        assert shown.hidden is not None
        if not len(states):
            states = np.empty((rows.offsets[-1], len(shown.hidden), shown.hidden[0].shape[-1]), np.float32)
        logits[numbers] = shown.logits.numpy()
        for place, layer in enumerate(shown.hidden):
            for row, number in enumerate(numbers):
                states[rows.offsets[number] : rows.offsets[number + 1], place] = layer[row].numpy()[real[row]]
    return logits, states


def _hash(model: Any) -> str:
    hashed = hashlib.blake2b(model.config.to_json_string().encode(), digest_size=16)
    for name, weight in model.state_dict().items():
        hashed.update(name.encode())
        hashed.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def _arithmetic(device: torch.device) -> list[Any]:
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return [torch.__version__, device.type, named, onednn.is_faster(), torch.get_num_threads()]
