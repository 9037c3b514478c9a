"""An onnxruntime session whose inputs and outputs stay on the device, and which may run as a CUDA graph."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spdtool.errors import ModelError, SpdError, first_line
from spdtool.export import onnx_session

if TYPE_CHECKING:
    from spdtool.bench.engines import Batch, Engine, OpenEngine

NUMBERS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
GRAPH_ID = "gpu_graph_id"  # run option: which captured graph; one for each shape
NO_WAIT = "disable_synchronize_execution_providers"  # run option: return before the device has finished
GRAPH_OPTION = "enable_cuda_graph"  # provider option
STREAM_OPTION = "user_compute_stream"  # provider option: address of the stream on which all kernels are queued


class BoundSession:
    """A session with one set of device buffers for each shape."""

    def __init__(self, session: Any, device: str, *, graphed: bool) -> None:
        self.session = session
        self.device = device
        self.graphed = graphed
        self.buffers: dict[tuple[int, ...], Buffers] = {}

    def run(self, batch: Batch) -> np.ndarray:
        """Copy a batch to the device, compute, and copy the first output back."""
        buffers = self.buffers_of(batch)
        buffers.fill(batch)
        self.compute(buffers)
        result: np.ndarray = buffers.outputs[0].numpy()
        return result

    def compute(self, buffers: Buffers, *, waits: bool = True) -> None:
        """Run on what the buffers hold."""
        self.session.run_with_iobinding(buffers.binding, buffers.waiting if waits else buffers.queued)

    def buffers_of(self, batch: Batch) -> Buffers:
        """Return the buffers for a batch of this shape; they are made when it is seen first."""
        shape = batch["input_ids"].shape
        if shape not in self.buffers:
            graph_id = len(self.buffers) + 1 if self.graphed else None  # 0 is a graph without a number
            self.buffers[shape] = Buffers(self.session, self.device, batch, graph_id)
        return self.buffers[shape]


class Buffers:
    """Inputs and outputs of one shape on the device, bound to a session."""

    def __init__(self, session: Any, device: str, batch: Batch, graph_id: int | None) -> None:
        onnxruntime = onnx_session.require_onnxruntime()
        self.inputs = {}
        self.binding = session.io_binding()
        for value in session.get_inputs():
            # ascontiguousarray: the bytes are copied as they lie
            column = np.ascontiguousarray(batch[value.name])
            self.inputs[value.name] = onnxruntime.OrtValue.ortvalue_from_numpy(column, device, 0)
            self.binding.bind_ortvalue_input(value.name, self.inputs[value.name])
        rows, tokens = batch["input_ids"].shape
        self.outputs = []
        for value in session.get_outputs():
            shape = resolve_axes(value.shape, {"batch": rows, "sequence": tokens})
            buffer = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, NUMBERS[value.type], device, 0)
            self.outputs.append(buffer)
            self.binding.bind_ortvalue_output(value.name, buffer)
        self.waiting, self.queued = onnxruntime.RunOptions(), onnxruntime.RunOptions()
        self.queued.add_run_config_entry(NO_WAIT, "1")
        if graph_id is not None:
            for options in (self.waiting, self.queued):
                options.add_run_config_entry(GRAPH_ID, str(graph_id))

    def fill(self, batch: Batch) -> None:
        """Copy a batch of the same shape into the inputs."""
        for name, buffer in self.inputs.items():
            buffer.update_inplace(np.ascontiguousarray(batch[name]))


def open_bound(engine: Engine) -> OpenEngine:
    """Open a model file in onnxruntime, with buffers on the device, and as CUDA graphs if the engine says so.

    Raises:
        DeviceError, ModelError: as `onnx_session.open_session`.
        SpdError: a shape cannot be bound or captured.
    """
    from spdtool.bench.engines import OpenEngine

    options: dict[str, str] = {}
    if engine.graph:
        options[GRAPH_OPTION] = "1"
    stream = torch_stream() if engine.provider == "cuda" else None
    if stream is not None:
        options[STREAM_OPTION] = str(stream.cuda_stream)
    session = onnx_session.open_session(
        Path(engine.path), engine.provider, engine.threads, engine.libraries, provider_options=options
    )
    bound = BoundSession(session, engine.provider, graphed=engine.graph)

    def run(batch: Batch) -> object:
        try:
            return bound.run(batch)
        except SpdError:
            raise
        except Exception as error:  # onnxruntime's errors share no base of their own
            raise SpdError(f"onnxruntime cannot run it so: {first_line(error)}", "the plain row is timed") from None

    def measure_device(batch: Batch) -> float:
        from spdtool.bench.gpu.torch_forms import time_on_device

        buffers = bound.buffers_of(batch)
        return time_on_device(lambda: bound.compute(buffers, waits=False), stream)

    measures = measure_device if stream is not None else None
    return OpenEngine(run, session.get_providers()[0], onnx_session.node_placement(session), measures)


def resolve_axes(axes: list[int | str | None], sizes: dict[str, int]) -> list[int]:
    """Replace the names of free axes by their sizes.

    Raises:
        ModelError: an axis has another name.
    """
    resolved = []
    for axis in axes:
        size = axis if isinstance(axis, int) else sizes.get(axis or "")
        if size is None:
            raise ModelError(f"the output has an axis {axis!r}, whose size is not known before it is computed")
        resolved.append(size)
    return resolved


def torch_stream() -> Any | None:
    """A CUDA stream of torch, on whose events device time is measured; None where torch has no CUDA."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]
