"""The teacher's logits of every training row, computed once for all epochs, phases and runs that need nothing else."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import torch

from spdtool import cache, collectives, onednn, processes
from spdtool.data import Encoded
from spdtool.evaluation import Forward, predict
from spdtool.recipe import Distilled

COLUMN = "teacher_logits"


def suffice(section: Distilled, rows: int) -> bool:
    """Whether the phase reads nothing else of the teacher, and sees each of the `rows` at least once."""
    loss = section.loss
    return loss.hidden == loss.relation == loss.attention == 0 and section.steps_for(rows) * section.batch_size >= rows


def beside(rows: Encoded, teacher: Any, forward: Forward) -> Encoded:
    """`rows` with the teacher's float32 logits [rows, labels] beside them, from the cache or by one run over them.

    They are kept under a hash of the teacher's weights, the rows and the machine's arithmetic, so that a resumed stage
    reads the very same numbers. Several processes compute them one after the other: the first one for all.
    """

    def fill(append: cache.Append) -> None:
        append("logits", predict(forward, rows))

    name = cache.key(_hash(teacher), rows.digest, _arithmetic(teacher.device))
    if not processes.is_main():
        collectives.wait()
    logits = cache.arrays("teacher-logits", name, fill)["logits"]
    if processes.is_main():
        collectives.wait()
    return replace(rows, beside=rows.beside | {COLUMN: logits})


def _hash(model: Any) -> str:
    hashed = hashlib.blake2b(model.config.to_json_string().encode(), digest_size=16)
    for name, weight in model.state_dict().items():
        hashed.update(name.encode())
        hashed.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def _arithmetic(device: torch.device) -> list[Any]:
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return [torch.__version__, device.type, named, onednn.pays(), torch.get_num_threads()]
