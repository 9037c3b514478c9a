"""The gate on a graph's interface: a client finds its inputs and outputs, and a runtime can read the file.

Nothing else in the gates would notice these: inputs are fed by their names and outputs are taken by their order,
while clients take outputs by name; and the installed onnxruntime reads more than others do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from spdtool.errors import GateError, first_line
from spdtool.export import onnx_session
from spdtool.export.gates.reference import Reference
from spdtool.export.graph.protobuf import find_ancestors
from spdtool.export.graph.trace import input_names
from spdtool.export.graph.weights import parameters_of
from spdtool.export.target import Target
from spdtool.tasks.head import Head, head_of_model

# The runtimes in browsers and on GPUs' servers lag behind: those of early 2025 read no newer form of the file.
READABLE_IR = 10
WIDENING = ("Cast", "DequantizeLinear", "Identity")  # change a table's type, and no row's place
EPSILON = "epsilon"
EPSILON_MARK = "eps"  # in the names of a configuration's epsilons
EPSILON_FIELDS = ("eps", "variance_epsilon")  # of normalizations in torch and transformers

RANDOM_OPERATORS = frozenset(
    ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
)
TRAINING_INPUT = 2  # of the inputs of a Dropout: whether it drops
UNREAD_SHARE = 0.01  # of the bytes of all constants that nothing may read: an exporter may leave a shape behind

Axes = list[str | int | None]


def check_interface(target: Target, reference: Reference, files: Sequence[Path]) -> None:
    """Compare inputs, outputs and versions of an ONNX file with what its clients expect.

    Args:
        files: that hold the model, the ONNX file first.

    Raises:
        GateError: names the input, output or version.
    """
    try:
        proto = onnx.load(files[0], load_external_data=False)
    except Exception as error:  # protobuf raises kinds of its own
        raise GateError(f"{files[0].name} is no ONNX file: {first_line(error)}") from None
    check_inputs(proto.graph.input, input_names(reference.model, reference.tokenizer))
    head = head_of_model(reference.model)
    widths = head.name_outputs(reference.model.config.to_dict()) or reference.label_names
    check_outputs(proto.graph.output, head, len(widths), needs_all=target.traces_model)
    check_versions(proto, reference.recipe.export.opset)
    check_epsilons(proto, reference)
    check_lookups(proto, reference)
    check_determinism(proto.graph)
    check_unread_constants(proto.graph)
    check_external_files(proto, files)
    try:
        onnx.checker.check_model(str(files[0]))
    except Exception as error:  # the checker's errors share no base with protobuf's
        raise GateError(f"{files[0].name} is no valid ONNX file: {first_line(error)}") from None


def check_inputs(inputs: Sequence[onnx.ValueInfoProto], names: Sequence[str]) -> None:
    """Refuse inputs of other names, order or type, and axes that are not free; raises GateError."""
    listed = [value.name for value in inputs]
    if listed != list(names):
        raise GateError(f"the exported file takes {', '.join(listed)}; the checkpoint takes {', '.join(names)}")
    expected = _axes_of(inputs[0])
    for value in inputs:
        _require_type(value, TensorProto.INT64)
        axes = _axes_of(value)
        are_free = len(axes) == 2 and not any(isinstance(axis, int) for axis in axes)
        if not are_free or axes != expected or (axes[0] is not None and axes[0] == axes[1]):
            raise GateError(f"the exported file takes {value.name} of shape {axes}; rows and tokens are two free axes")


def check_outputs(outputs: Sequence[onnx.ValueInfoProto], head: Head, width: int, *, needs_all: bool) -> None:
    """Refuse outputs of other names, order, type or shape; raises GateError.

    Args:
        width: labels, or numbers of a vector.
        needs_all: whether vectors of tokens must be there, from which other clients pool by themselves.
    """
    listed, names = [value.name for value in outputs], list(head.outputs)
    if listed != names and (needs_all or not head.pools or listed != names[:1]):
        raise GateError(f"the exported file gives {', '.join(listed)}; clients look for {', '.join(names)}")
    for number, value in enumerate(outputs):
        _require_type(value, TensorProto.FLOAT)
        axes = _axes_of(value)
        free_count = 2 if head.per_token or number > 0 else 1
        is_right = not any(isinstance(axis, int) for axis in axes[:free_count])
        if head.per_token and len(names) > 1:  # each output is one label
            is_right = is_right and len(axes) == free_count
        else:
            is_right = is_right and len(axes) == free_count + 1 and (axes[-1] == width or not isinstance(axes[-1], int))
        if value.type.tensor_type.HasField("shape") and not is_right:
            raise GateError(f"the exported file gives {value.name} of shape {axes}; it has {width} numbers a row")


def check_versions(proto: onnx.ModelProto, opset: int) -> None:
    """Refuse a newer operator set than the recipe's, and a form of the file that fewer runtimes read; GateError."""
    versions = [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    if max(versions, default=0) > opset:
        raise GateError(f"the exported file needs operator set {max(versions)}; export.opset is {opset}")
    least = helper.find_min_ir_version_for(
        [entry for entry in proto.opset_import if entry.domain in ("", "ai.onnx")], ignore_unknown=True
    )
    if proto.ir_version > max(READABLE_IR, least):
        raise GateError(
            f"the exported file has the IR version {proto.ir_version}; runtimes read {READABLE_IR}",
            "it comes from a newer onnx or torch: say so to those who wrote the target",
        )


def check_epsilons(proto: onnx.ModelProto, reference: Reference) -> None:
    """Refuse a normalization with another epsilon than the checkpoint's: too little to be seen in logits."""
    expected = set()
    for name, value in reference.model.config.to_dict().items():
        if EPSILON_MARK in name and isinstance(value, float):
            expected.add(np.float32(value))
    for module in reference.model.modules():
        for name in EPSILON_FIELDS:
            if isinstance(getattr(module, name, None), float):
                expected.add(np.float32(getattr(module, name)))
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == EPSILON and expected and np.float32(attribute.f) not in expected:
                raise GateError(
                    f"{node.op_type} {node.name!r} of the exported file has the epsilon {attribute.f:.2g}; "
                    f"the checkpoint has {', '.join(f'{value:.2g}' for value in sorted(expected))}"
                )


def check_determinism(graph: onnx.GraphProto) -> None:
    """Refuse a graph that draws random numbers: noise below the tolerance, and another answer each time; GateError."""
    for node in graph.node:
        drops = node.op_type == "Dropout" and len(node.input) > TRAINING_INPUT and bool(node.input[TRAINING_INPUT])
        if node.op_type in RANDOM_OPERATORS or drops:
            raise GateError(f"{node.op_type} {node.name!r} of the exported file draws random numbers")
        for attribute in node.attribute:
            if attribute.HasField("g"):
                check_determinism(attribute.g)


def check_unread_constants(graph: onnx.GraphProto) -> None:
    """Refuse constants that no output depends on: whoever downloads the file pays for them; raises GateError."""
    read = find_ancestors(graph, (value.name for value in graph.output))
    sizes = {tensor.name: _constant_bytes(tensor) for tensor in graph.initializer}
    unread = {name: size for name, size in sizes.items() if name not in read}
    if sum(unread.values()) > UNREAD_SHARE * sum(sizes.values()):
        raise GateError(
            f"the exported file has {sum(unread.values()):,} bytes of constants that nothing reads, "
            f"{max(unread, key=unread.__getitem__)!r} among them"
        )


def _constant_bytes(tensor: onnx.TensorProto) -> int:
    """Return the bytes of a constant, wherever they are stored."""
    size: int = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    count: int = math.prod(tensor.dims)
    return count * size


def check_lookups(proto: onnx.ModelProto, reference: Reference) -> None:
    """Refuse a graph that looks some token up under another number: few rows hold that token, and no gate sees it.

    Raises:
        GateError: names a token and the number under which it is looked up.
    """
    embedding = reference.model.get_input_embeddings()
    if not isinstance(embedding, torch.nn.Embedding):  # a family that embeds its input in another way
        return
    table = embedding.weight
    names = {name for name, weight in reference.model.named_parameters(remove_duplicate=False) if weight is table}
    tables = {tensor.name for tensor in proto.graph.initializer if names.intersection(parameters_of(tensor))}
    indices = set[str]()
    for node in proto.graph.node:  # in the order of computation
        if node.op_type in WIDENING and node.input[0] in tables:
            tables.update(node.output)
        elif node.op_type == "Gather" and node.input[0] in tables:
            indices.add(node.input[1])
    tokens = np.arange(table.shape[0], dtype=np.int64)[None]
    for name in sorted(indices - {"input_ids"}):
        if "input_ids" not in find_ancestors(proto.graph, [name]):  # a fixed token
            continue
        numbers = _compute_from_tokens(proto, name, tokens).ravel()
        if numbers.size != tokens.size:  # of some tokens of a row only
            continue
        wrong = np.flatnonzero(numbers != tokens.ravel())
        if wrong.size:
            raise GateError(
                f"the exported file looks {wrong.size} of {tokens.size} tokens up under other numbers, among them "
                f"token {wrong[0]}"
            )


def _compute_from_tokens(proto: onnx.ModelProto, name: str, tokens: np.ndarray) -> np.ndarray:
    """Compute a tensor of the graph for one row of tokens."""
    needed = find_ancestors(proto.graph, [name])
    graph = onnx.GraphProto(name="tokens")
    graph.node.extend(node for node in proto.graph.node if needed.intersection(node.output))
    graph.initializer.extend(tensor for tensor in proto.graph.initializer if tensor.name in needed)
    graph.input.extend(value for value in proto.graph.input if value.name in needed)
    graph.output.append(onnx.ValueInfoProto(name=name))
    model = helper.make_model(graph, opset_imports=list(proto.opset_import), ir_version=proto.ir_version)
    inputs = {value.name: np.ones_like(tokens) for value in graph.input}
    session = onnx_session.open_session(model.SerializeToString())
    return np.asarray(session.run([name], inputs | {"input_ids": tokens})[0])


def check_external_files(proto: onnx.ModelProto, files: Iterable[Path]) -> None:
    """Refuse weights in files beside the model that the target does not name: whoever copies it would lose them."""
    listed = {file.name for file in files}
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value not in listed:
                named = ", ".join(sorted(listed))
                raise GateError(f"the exported file has {tensor.name} in {entry.value}; the target names {named}")


def _axes_of(value: onnx.ValueInfoProto) -> Axes:
    """List the axes of a value: their names or sizes; None for one of neither."""
    axes: Axes = []
    for axis in value.type.tensor_type.shape.dim:
        axes.append(axis.dim_value if axis.HasField("dim_value") else axis.dim_param or None)
    return axes


def _require_type(value: onnx.ValueInfoProto, expected: int) -> None:
    """Raise GateError for an input or output of another type."""
    number = value.type.tensor_type.elem_type
    if number != expected:
        names = TensorProto.DataType.Name(number), TensorProto.DataType.Name(expected)
        raise GateError(f"{value.name} of the exported file is of type {names[0]}; clients expect {names[1]}")
