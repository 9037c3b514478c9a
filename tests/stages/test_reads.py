"""A training step copies no number from the device; on a GPU each copy would wait for all queued work."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spdtool.distillation.losses import distillation_loss
from spdtool.distillation.outputs import compute_outputs
from spdtool.models import predict as evaluation
from spdtool.models.layers import find_prunable_weights, install_capture_hooks
from spdtool.models.load import load_model
from spdtool.pruning.masks import Masks
from spdtool.recipe.training import Loss, Prune
from spdtool.run.folder import Run
from spdtool.tasks.classification import Classification
from spdtool.training import loop, prefetch
from spdtool.training.optimizer import create_adamw

ATEN = torch.ops.aten
READS = {  # operations that return a number to Python, or a tensor whose size depends on the data
    ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.equal, ATEN._unique2, ATEN.unique_dim,
    ATEN.unique_consecutive, ATEN.bincount, ATEN.repeat_interleave,
}  # fmt: skip
INDEXED = {ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_}
COPIES = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist}  # not dispatched for tensors on the CPU

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 asks `(mask == 1).all()`"
    ),
]


class Reads(TorchDispatchMode):
    """Counts the operations that copy numbers from the device, by training step."""

    def __init__(self) -> None:
        super().__init__()
        self.step: int | None = None
        self.counts: dict[int | None, Counter[str]] = {}

    def note(self, name: str) -> None:
        self.counts.setdefault(self.step, Counter())[name] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        is_masked_index = packet in INDEXED and any(
            argument is not None and argument.dtype == torch.bool for argument in args[1]
        )
        if packet in READS or is_masked_index:
            self.note(str(func))
        return func(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Counts copies to the processor that torch does not dispatch when the tensor is on the CPU."""

    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in COPIES:
            self.reads.note(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Count reads in every step of the training loop, where only the last step writes a log line."""
    counter, original = Reads(), prefetch.prefetch_batches

    @contextmanager
    def prefetch_watched(
        batches: Iterator[prefetch.StepBatch], device: torch.device
    ) -> Iterator[Iterator[prefetch.StepBatch]]:
        def watch_steps(batches: Iterator[prefetch.StepBatch]) -> Iterator[prefetch.StepBatch]:
            for batch in batches:
                counter.step = batch[0]
                with counter, Copies(counter):
                    yield batch

        with original(batches, device) as batches:
            yield watch_steps(batches)

    monkeypatch.setattr(prefetch, "prefetch_batches", prefetch_watched)
    monkeypatch.setattr(loop, "LOG_LINES", 1)
    return counter


def silent_steps(run: Run, stage: str) -> set[int]:
    """Return the steps, of 12, that log, save and prune nothing."""
    lines = (run.path / stage / "metrics.jsonl").read_text("utf-8").splitlines()
    return set(range(12)) - {event["step"] - 1 for event in map(json.loads, lines)}


HIDDEN = ("prune.loss.hidden=1.0", "prune.loss.relation=1.0", "prune.loss.relation_heads=2")
MAGNITUDE = ("prune.criterion=magnitude", "prune.calibration=0", "prune.first=none")


WAYS = {
    "default recipe": ((), True),
    "all losses": ((*HIDDEN, "prune.loss.attention=1.0", *MAGNITUDE, "prune.accumulate=2"), True),
    "fused attention": ((*HIDDEN, *MAGNITUDE), False),
    "scores learnt in every step": ((*MAGNITUDE, "prune.criterion=movement"), False),
    "blend, bf16": (("prune.grafting.kind=blend", "precision=bf16", *MAGNITUDE), False),
    "gold labels and regrowth": (("prune.loss.hardness=0.5", "prune.regrowth=true", *MAGNITUDE), False),
    "as published": (("prune.clip_over=all", "prune.loss.mask_padding=false", *MAGNITUDE), True),
}


@pytest.mark.parametrize(("sets", "eager"), WAYS.values(), ids=WAYS)
def test_no_step_without_an_event_reads_a_number_back(
    toy_run: Callable[..., Run], reads: Reads, monkeypatch: pytest.MonkeyPatch, sets: tuple[str, ...], eager: bool
) -> None:
    load = load_model
    if not eager:
        for stage in ("teacher", "phase"):
            monkeypatch.setattr(
                f"spdtool.stages.{stage}.load_model", lambda *args, **options: load(*args, **options | {"eager": False})
            )
    # products that skip zeros run on the CPU only, where reads are free
    shared = ("sparse_products=false", "prune.grafting.start=0.5", "prune.dropout=0.1", "teacher_states_gb=0.0")
    run = toy_run(*shared, *sets, until="teacher")
    for stage in ("teacher", "prune", "distill"):
        if stage != "teacher":
            reads.counts.clear()
            getattr(__import__(f"spdtool.stages.{stage}", fromlist=[stage]), stage)(run)
        silent = silent_steps(run, stage)
        assert len(silent) >= 6
        assert not {step: reads.counts[step] for step in silent & reads.counts.keys()}, stage
        assert reads.counts[11], "the watch sees what the log line reads"


class Crossings(TorchDispatchMode):
    """Collects operations that mix tensors of the CPU and of the device; scalars on the CPU are allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if torch.is_tensor(leaf)]
        if len({tensor.device for tensor in tensors if tensor.device.type == "meta" or tensor.dim()}) > 1:
            self.operations.append(str(func))
        return result


@pytest.mark.parametrize("attention", [0.0, 1.0])
def test_nothing_crosses_between_processor_and_device_within_a_step(toys: ModuleType, attention: float) -> None:
    implementation = {"attn_implementation": "eager" if attention else "sdpa"}
    student, teacher = toys.bert(2, dropout=0.1, **implementation).train(), toys.bert(2, **implementation)
    for model in (student, teacher):
        install_capture_hooks(model)
        model.to("meta")  # tensors of this device have no data, so reading a number is an error
    weights = Loss(hidden=1.0, attention=attention, hardness=0.5)
    captured = {"hidden_states": True, "attention": "scores" if attention else None}
    optimizer = create_adamw(student.parameters(), Prune(), torch.device("meta"))
    masks = Masks(find_prunable_weights(student))
    masks.attach(optimizer)
    batch = evaluation.to_device({name: column.numpy() for name, column in toys.batch().items()}, "meta")
    with Crossings() as crossings:
        for _ in range(2):
            with torch.no_grad():
                teacher_outputs = compute_outputs(teacher, batch, **captured)
            student_outputs = compute_outputs(student, batch, **captured)
            distillation_loss(student_outputs, teacher_outputs, batch, weights, logit_loss=Classification.logit_loss)[
                "loss"
            ].backward()
            masks.zero_gradients()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert not crossings.operations
        torch.ones(2).to("meta")
        assert crossings.operations, "a copy is seen"
