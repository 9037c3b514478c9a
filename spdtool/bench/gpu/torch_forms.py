"""A checkpoint in torch as the bench times it: eager or compiled, in a precision, in a CUDA graph, or in 2:4.

Nothing here imports torch at the top: a process that times onnxruntime loads this module too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from spdtool.errors import SpdError, first_line
from spdtool.export import onnx_session

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from spdtool.bench.engines import Batch, Engine, OpenEngine

DEVICE_CALLS = 5  # forward passes between two events: the host queues ahead, so that its own time is hidden
CAPTURE_WARMUP = 3  # passes before a capture: libraries choose kernels and allocate in the first ones
TAKEN_INPUTS = ("input_ids", "attention_mask")  # without token types the model takes zeros, as the batches hold
COMPILE_ROWS, COMPILE_TOKENS = 2, 9  # shape of the batch that shows whether compiling works


def open_torch(engine: Engine) -> OpenEngine:
    """Open a checkpoint in torch.

    Raises:
        SpdError: torch has no such device, or cannot compile, capture or sparsify the model.
    """
    import torch

    from spdtool.bench.engines import OpenEngine, Shape, make_batch
    from spdtool.models.predict import torch_forward

    torch.set_num_threads(engine.threads or onnx_session.usable_cores())
    # "high" is TF32 on a GPU, and full float32 on a CPU
    torch.set_float32_matmul_precision("high" if engine.precision == "tf32" else "highest")
    model = load_form(engine)
    description = f"torch {engine.provider}"
    if engine.graph:
        graphed = GraphedForward(model, engine.provider)
        return OpenEngine(_without_token_types(graphed), description, None, graphed.measure_device)
    forward = torch_forward(model, engine.provider)
    run = _without_token_types(forward)
    if engine.compiled:
        try:  # compiling starts with the first batch, and may be impossible here
            run(make_batch(Shape(COMPILE_ROWS, COMPILE_TOKENS), engine))
        except Exception as error:  # the compiler's front and back ends raise many kinds
            reason = first_line(error)
            raise SpdError(f"torch.compile does not work here: {reason}", "it needs a C++ compiler") from None
    if engine.provider == "cpu":
        return OpenEngine(run, description, None)
    return OpenEngine(run, description, None, lambda batch: measure_model(model, batch, engine.provider))


def load_form(engine: Engine) -> Any:
    """Load the model on its device, in the engine's precision, shape and layout of weights."""
    import torch

    from spdtool.models.load import load_model
    from spdtool.models.shrink import shrink

    model: Any = load_model(engine.path)
    if engine.shrinks:
        model = shrink(model)
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    try:
        model = model.to(engine.provider).to(types.get(engine.precision, torch.float32)).eval()
        if engine.semi_structured:
            use_two_of_four(model)
    except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
        # an AssertionError is how a torch without CUDA answers
        raise SpdError(
            f"torch cannot hold the model so: {first_line(error)}", "spdtool doctor says what works"
        ) from None
    if engine.compiled:
        model = torch.compile(model, dynamic=True)
    return model


def use_two_of_four(model: PreTrainedModel) -> None:
    """Store each linear layer inside the encoder with two weights of four, in the format of sparse tensor cores.

    The two largest of four stay. Nothing was trained for it: the row shows speed, and its score means nothing.
    """
    import torch
    from torch.sparse import to_sparse_semi_structured

    from spdtool.models.layers import find_prunable_weights

    names = set(find_prunable_weights(model))
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and f"{path}.weight" in names:
            sparse = to_sparse_semi_structured(keep_two_of_four(module.weight.detach()))
            module.weight = torch.nn.Parameter(sparse, requires_grad=False)


def keep_two_of_four(weight: torch.Tensor) -> torch.Tensor:
    """Zero the two smallest of each four neighbours in a row of `weight` [rows, columns]."""
    groups = weight.reshape(-1, 4)
    smallest = groups.abs().argsort(dim=1)[:, :2]
    return groups.scatter(1, smallest, 0).reshape(weight.shape)


class GraphedForward:
    """A forward pass that is captured in a CUDA graph for each shape, with and without padding, and replayed."""

    def __init__(self, model: Any, device: str) -> None:
        self.model = model
        self.device = device
        self.captures: dict[tuple[tuple[int, ...], bool], Capture] = {}

    def __call__(self, batch: Batch) -> np.ndarray:
        """Copy a batch to the device, replay, and copy the logits back."""
        capture = self._capture_of(batch)
        capture.fill(batch)
        capture.replay()
        logits: np.ndarray = capture.logits.float().cpu().numpy()
        return logits

    def measure_device(self, batch: Batch) -> float:
        """Milliseconds of one replay on the device."""
        capture = self._capture_of({name: batch[name] for name in TAKEN_INPUTS})
        return time_on_device(capture.replay)

    def _capture_of(self, batch: Batch) -> Capture:
        mask = batch["attention_mask"]
        key = (mask.shape, bool(mask.all()))  # without padding the model leaves the mask out: another graph
        if key not in self.captures:
            self.captures[key] = Capture(self.model, self.device, batch)
        return self.captures[key]


class Capture:
    """One captured pass: its inputs stay at their addresses, and `replay` computes `logits` from them."""

    def __init__(self, model: Any, device: str, batch: Batch) -> None:
        import torch

        from spdtool.models.padding import PaddingMask

        self.inputs = {name: torch.as_tensor(column).to(device) for name, column in batch.items()}
        unpadded = bool(batch["attention_mask"].all())
        # The model asks whether there is padding: reading that from the device would break the capture.
        arguments: dict[str, Any] = dict(self.inputs)
        arguments["attention_mask"] = PaddingMask.of(self.inputs["attention_mask"], unpadded=unpadded)

        def compute() -> torch.Tensor:
            with torch.no_grad():
                logits: torch.Tensor = model(**arguments).logits
            return logits

        try:
            self.replay, self.logits = capture_graph(compute)
        except RuntimeError as error:
            message = f"this model cannot be captured in a CUDA graph: {first_line(error)}"
            raise SpdError(message, "the row without a graph is timed all the same") from None

    def fill(self, batch: Batch) -> None:
        """Copy a batch of the same shape into the inputs."""
        import torch

        for name, tensor in self.inputs.items():
            tensor.copy_(torch.as_tensor(batch[name]), non_blocking=True)


def capture_graph(compute: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """Capture a computation; return the function that replays it, and the tensor with its result."""
    import torch

    from spdtool.models.device import recorded_in

    # On a stream of its own, as a capture must not see work that was queued on the default one.
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(CAPTURE_WARMUP):
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with recorded_in(graph):
        result = compute()
    return graph.replay, result


def measure_model(model: Any, batch: Batch, device: str) -> float:
    """Milliseconds of one pass of a model on the device, whose inputs are already there."""
    import torch

    from spdtool.models.predict import to_device

    inputs = to_device({name: batch[name] for name in TAKEN_INPUTS}, device)

    def compute() -> None:
        with torch.no_grad():
            model(**inputs)

    return time_on_device(compute)


def time_on_device(compute: Callable[[], object], stream: Any = None) -> float:
    """Milliseconds of one call between two CUDA events, as the mean of several calls in a row.

    Args:
        stream: where the calls are queued; None: the current one.
    """
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record(stream)
    for _ in range(DEVICE_CALLS):
        compute()
    end.record(stream)
    end.synchronize()
    return float(start.elapsed_time(end)) / DEVICE_CALLS


def _without_token_types(forward: Callable[[Batch], object]) -> Callable[[Batch], object]:
    return lambda batch: forward({name: batch[name] for name in TAKEN_INPUTS})
